"""Server instances that are started, awaited by their log lines, and ended; for demo and tests."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

HERE = Path(__file__).resolve().parent
DEADLINE = 60.0  # seconds that any single step may take

SERVERS: dict[str, tuple[str, ...]] = {
    "uvicorn": ("hotrestart-uvicorn", "app:app", "--no-access-log"),
    "uvicorn4": ("hotrestart-uvicorn", "app:app", "--no-access-log", "--workers", "4"),
    "gunicorn sync": ("gunicorn", "wsgi:app", "-k", "sync", "-w", "4"),
    "gunicorn gthread": ("gunicorn", "wsgi:app", "-k", "gthread", "-w", "2", "--threads", "16"),
    "gunicorn gevent": ("gunicorn", "wsgi:app", "-k", "gevent", "-w", "2"),
    "gunicorn asgi": ("gunicorn", "app:app", "-k", "asgi", "-w", "2"),
    "gunicorn uvicorn": (
        *("gunicorn", "app:app", "-k", "uvicorn_worker.UvicornWorker", "-w", "2"),
    ),
}
"""The commands without an address, by the name that the tables show."""

CONFIG = "python:hotrestart_plugins.gunicorn_conf"


class DeployError(Exception):
    """An instance did not do what it should have."""


def _own_ports() -> Iterator[int]:
    """In any order; none comes again before all the others have."""
    lane = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    ports = range(20000 + lane, 32768, 16)
    return itertools.cycle(random.sample(ports, len(ports)))


_ports = _own_ports()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, nor any client may be given meanwhile.

    The kernel gives clients ports from 32768 on (ip_local_port_range, ip(7)). Test runs beside
    each other (pytest-xdist's workers) choose from ports of their own. Two calls give two ports.
    """
    while True:
        port = next(_ports)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def command(name: str, address: str, *more: str, plain: bool = False) -> list[str]:
    """The command line of a server; `plain` without hot restarts."""
    program, *rest = SERVERS[name]
    if program == "gunicorn":
        rest += ["-b", address] + ([] if plain else ["-c", CONFIG])
    else:
        if plain:
            program = "uvicorn"
        if address.startswith("unix:"):
            rest += ["--uds", address.removeprefix("unix:")]
        else:
            host, _, port = address.rpartition(":")
            rest += ["--host", host.strip("[]"), "--port", port]
    scripts = Path(sysconfig.get_path("scripts"))
    return [sys.executable, str(scripts / program), *rest, *more]


@dataclass
class Instance:
    """One server process; owns it and its log. Its output is read whenever it is waited for."""

    args: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    pass_fds: Sequence[int] = ()
    cwd: Path = HERE
    started: float = 0.0
    """When it was started, monotonic seconds."""

    def __post_init__(self) -> None:
        environ = {key: value for key, value in os.environ.items() if key[:11] != "HOTRESTART_"}
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            self.args,
            cwd=self.cwd,
            env={**environ, "PYTHONUNBUFFERED": "1", **self.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=self.pass_fds,
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._log = bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written."""
        self._read()
        return self._log.decode(errors="replace")

    def _read(self) -> bool:
        """Read what is there; False at the end of it."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._out.fileno(), 1 << 16):
                self._log += data
            return False
        return True

    def wait_for(self, *texts: str, count: int = 1, seconds: float = DEADLINE) -> float:
        """Wait until it has written one of `texts`, `count` times; when that was seen."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._out.fileno(), select.POLLIN)
        while True:
            goes_on = self._read()
            log = self._log.decode(errors="replace")  # as of that: what comes now wakes the poll
            if any(log.count(text) >= count for text in texts):
                return time.monotonic()
            if not goes_on:
                raise DeployError(f"pid {self.pid} ended without {texts}:\n{log}")
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise DeployError(
                    f"no {texts} within {seconds:g} s from pid {self.pid}:\n{self.log}"
                )

    def wait(self, seconds: float = DEADLINE) -> int:
        """Its exit status, once it has ended; its output is read meanwhile."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        out = self._out.fileno()
        poll.register(out, select.POLLIN)
        while self._process.poll() is None:
            events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not events:
                raise DeployError(f"pid {self.pid} has not ended in {seconds:g} s:\n{self.log}")
            if any(fd == out for fd, _ in events) and not self._read():
                poll.unregister(out)
        self._read()
        return self._process.wait()

    def owns(self, pid: int) -> bool:
        """Whether it is this process or a worker of it: each instance has a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            return os.getsid(pid) == self.pid
        return False

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        if self.running:
            self._process.terminate()
        return self.wait()

    def close(self) -> None:
        """Kill what is left of it: the process and those of its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._out.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Deploys:
    """Instances on one address, in a meeting directory of their own; all ended at the end."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.directory = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hotrestart-"))
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def record_of(self, child_pid: int) -> dict[str, Any]:
        """What the record says of the takeover by this child."""
        for path in (self.directory / "meet").glob("handover-*.json"):
            record: dict[str, Any] = json.loads(path.read_text())
            if record["new"]["pid"] == child_pid:
                return record
        raise DeployError(f"no record of a takeover by pid {child_pid}")

    def start(self, args: Sequence[str], **env: str) -> Instance:
        """Start an instance; `env` is added to its environment."""
        return self.start_passing((), args, **env)

    def start_passing(self, fds: Sequence[int], args: Sequence[str], **env: str) -> Instance:
        """As `start`; the descriptors `fds` stay open in it, under their numbers."""
        meet = {"HOTRESTART_DIR": str(self.directory / "meet")}
        instance = Instance(args, {**meet, **env}, fds)
        self._stack.callback(instance.close)
        return instance


TOOK_OVER = "Took over from pid"
UP = ("Uvicorn running on", "Hot restart: ready")
