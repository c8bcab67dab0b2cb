"""What the benchmarks share.

Lines of progress, what machine this is, processes seen from outside, and a page with tables.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import os
import platform
import re
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
_PACKAGES = ("uvicorn", "gunicorn", "granian", "starlette", "uvloop", "httptools", "websockets")
_cache = tempfile.TemporaryDirectory(prefix="bytecode-")
BYTECODE = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": _cache.name}
"""For every server's environment: all code is compiled once, ours too, as an installed wheel is."""

_LISTENING = "0A"  # a state in /proc/net/tcp, include/net/tcp_states.h


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def clean_up_on_sigterm() -> None:
    """Leave every `with` on SIGTERM and SIGINT, so that no server is left behind."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def machine(*more: str) -> str:
    """What the numbers were measured with; `more` are versions of other programs."""
    versions = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    kernel = ".".join(platform.release().split(".")[:2])
    return (
        f"{os.cpu_count()} cores, Linux {kernel}, Python {platform.python_version()}, "
        + ", ".join([*versions, *more])
    )


def load_average() -> str:
    """How busy the machine is, with whatever else runs there."""
    return f"load average {os.getloadavg()[0]:.1f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    rule = [" --- ", *(" ---: " for _ in head[1:])]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_page(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text()
    new, found = re.subn(
        f"{begin}\n.*?{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL
    )
    if not found:
        raise SystemExit(f"{page} has no {begin} ... {end}: put both on lines of their own")
    page.write_text(new)
    say(f"\nwritten to {page.name}: {name}")


# -- processes, seen from outside ------------------------------------------------------------------


def members(session: int) -> list[int]:
    """The processes of a session: an instance and its workers."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry)) == session:
                    found.append(int(entry))
    return sorted(found)


def ended(pids: Iterable[int], seconds: float) -> list[int]:
    """Wait until these processes have ended; those that have not in time."""
    deadline = time.monotonic() + seconds
    left = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    left.append(pid)
            finally:
                os.close(fd)
    return left


def processor_time(session: int) -> float:
    """Seconds that the processes of a session have run, of their threads that are alive."""
    total = 0
    for pid in members(session):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in os.listdir(f"/proc/{pid}/task"):
                total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


@dataclass(frozen=True)
class Footprint:
    """What the processes of an instance hold, its clients' connections left out."""

    processes: int
    descriptors: collections.Counter[str]
    threads: int
    memory: int
    """Bytes resident, of all its processes."""

    @property
    def mebibytes(self) -> float:
        """The memory in a unit for people."""
        return self.memory / 2**20

    def __str__(self) -> str:
        return (
            f"{self.descriptors.total()} descriptors, {self.threads} threads, "
            f"{self.processes} processes, {self.mebibytes:.1f} MiB"
        )


def footprint(session: int) -> Footprint:
    """Of each process of the instance that leads this session."""
    pids = members(session)
    descriptors: collections.Counter[str] = collections.Counter()
    threads = memory = count = 0
    for pid in pids:
        try:
            seen = _descriptors(pid)
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        descriptors += seen
        threads += int(_field(status, "Threads"))
        memory += int(_field(status, "VmRSS").split()[0]) * 1024
        count += 1
    return Footprint(count, descriptors, threads, memory)


def _field(status: str, name: str) -> str:
    found = re.search(rf"^{name}:\s+(.+)$", status, re.MULTILINE)
    return found[1] if found else "0 kB"


def _descriptors(pid: int) -> collections.Counter[str]:
    links = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    named = _named_sockets()
    found: collections.Counter[str] = collections.Counter()
    for link in links:
        if link.startswith("socket:"):
            kind = named.get(link[len("socket:[") : -1])
            if kind:
                found[kind] += 1
        else:
            # Of gunicorn's heartbeat files, each has a name by chance.
            found[re.sub(r":\[\d+\]|(?<=/wgunicorn-)\w+", "", link)] += 1
    return found


def _named_sockets() -> dict[str, str]:
    """Sockets that are no connections of clients, by inode."""
    named = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == _LISTENING:
                named[parts[9]] = "listener"
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        named[line.split()[6]] = "Unix socket"
    return named
