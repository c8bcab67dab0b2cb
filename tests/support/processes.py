"""Real processes for the tests: instances on strings, their ends, their descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0
"""Seconds after which whatever a test waits for has not happened."""

TIMEOUT = 0.5
"""The takeover timeout where a test is about its running out."""

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def open_descriptors(pid: int | str = "self") -> dict[str, str]:
    """Each descriptor of a process and what it leads to."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that reads this directory
            found[entry.name] = os.readlink(entry)
    return found


def pending(pid: int) -> set[int]:
    """The signals that were sent to a process and have not come to it yet: proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (int(line.split()[1], 16) for line in status.splitlines() if line[:6] == "ShdPnd")
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


def wait_readable(fd: int, what: str, seconds: float = DEADLINE) -> None:
    """Wait until `fd` is readable; `what` is said if it never is."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(seconds * 1000), f"{what}: not within {seconds:g} s"


_kept: list[socket.socket] = []


def free_address(family: socket.AddressFamily = socket.AF_INET) -> str:
    """An address that nobody listens on, and that the kernel gives to nobody else in this test.

    A socket stays bound to it: with SO_REUSEADDR on both, and only one that listens, it can be
    bound again by whoever names it.
    """
    sock = socket.socket(family)
    _kept.append(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((LOOPBACK[family], 0))
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_addresses(number: int) -> list[str]:
    """As many addresses, no two the same."""
    return [free_address() for _ in range(number)]


def give_back_addresses() -> None:
    """The test is over, and its addresses are anybody's."""
    while _kept:
        _kept.pop().close()


def connect(address: str) -> socket.socket:
    """A connection to a listener, by its name on the wire."""
    if address.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        where: Any = address
    else:
        host, _, port = address.rpartition(":")
        sock = socket.socket(socket.AF_INET6 if "[" in host else socket.AF_INET)
        where = (host.strip("[]"), int(port))
    try:
        sock.settimeout(DEADLINE)
        sock.connect(where)
    except BaseException:
        sock.close()
        raise
    return sock


def answer(sock: socket.socket) -> int:
    """The pid in the answer of whoever serves; closes the connection."""
    with sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while more := sock.recv(4096):
            received += more
    return int(received.split()[-1])


def who_answers(address: str) -> int:
    """The pid of the process that answers a new connection to this address."""
    return answer(connect(address))


def can_connect(address: str) -> bool:
    """Whether a listener is there."""
    try:
        connect(address).close()
    except OSError:
        return False
    return True


def fill_queue(path: str | Path) -> int:
    """Send to a datagram socket until its queue is full; the number of datagrams that it held.

    Each sender has room for a few hundred datagrams that nobody has read, and the queue may be
    longer (net.unix.max_dgram_qlen): it is full when the first datagram of a new sender finds no
    room.
    """
    number = 0
    while number < 100_000:
        before = number
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            contextlib.suppress(BlockingIOError),
        ):
            sender.setblocking(False)
            while True:
                sender.sendto(b"\xff", str(path))
                number += 1
        if number == before:
            return number
    raise AssertionError(f"the queue of {path} takes more than {number} datagrams")


class Process:
    """One process that a test started, ended by its pid at the end of the test."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self.status: int | None = None
        self._log = log
        self._pidfd = os.pidfd_open(pid)

    @property
    def log(self) -> str:
        """What it wrote to standard error."""
        return self._log.read_text()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal, and wait for the end of the process where that is what it means."""
        if self.status is None:
            signal.pidfd_send_signal(self._pidfd, number)
        if number == signal.SIGKILL:
            self.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.kill(signal.SIGSTOP)
        os.waitid(os.P_PIDFD, self._pidfd, os.WSTOPPED)

    def resume(self) -> None:
        """SIGCONT."""
        self.kill(signal.SIGCONT)

    def wait(self) -> int:
        """The exit status, negative for a signal, once it has ended."""
        if self.status is None:
            wait_readable(self._pidfd, f"the end of pid {self.pid}; it wrote: {self.log}")
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return self.status is None and not poll.poll(0)

    def close(self) -> None:
        """Kill it if it runs; close what leads to it."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self.wait()
        os.close(self._pidfd)
        self._log.unlink(missing_ok=True)


class Command(Process):
    """A program; what it writes to standard output comes line by line."""

    def __init__(self, args: list[str], log: Path, **more: Any) -> None:
        with log.open("w") as stderr:
            self._popen = subprocess.Popen(
                args, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT,
                **{"stdin": subprocess.DEVNULL, **more},
            )  # fmt: skip
        super().__init__(self._popen.pid, log)
        assert self._popen.stdout is not None
        self._out = self._popen.stdout.fileno()
        self._received = b""
        self.lines: list[str] = []

    def line(self) -> str:
        """The next line of standard output."""
        while b"\n" not in self._received:
            wait_readable(self._out, f"a line from pid {self.pid}; it wrote: {self.log}")
            more = os.read(self._out, 65536)
            assert more, f"pid {self.pid} ended; it wrote: {self.lines} {self.log}"
            self._received += more
        first, _, self._received = self._received.partition(b"\n")
        self.lines.append(first.decode())
        return self.lines[-1]

    def until(self, start: str) -> str:
        """The next line that starts so."""
        while not self.line().startswith(start):
            pass
        return self.lines[-1]

    def wait(self) -> int:
        """The exit status, once it has ended."""
        if self.status is None:
            wait_readable(self._pidfd, f"the end of pid {self.pid}; it wrote: {self.log}")
            self.status = self._popen.wait()
        return self.status

    def close(self) -> None:
        super().close()
        assert self._popen.stdout is not None
        self._popen.stdout.close()


class Told(Exception):
    """An error that an instance reported, by the name of its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class Instance(Process):
    """A `HotRestart` in a process of its own that does what it is told, one step at a time."""

    def __init__(self, pid: int, log: Path, line: socket.socket) -> None:
        super().__init__(pid, log)
        self._line = line
        self._received = b""
        self._events: list[list[Any]] = []

    def begin(self, verb: str, *args: object) -> None:
        """Tell it to do something; `end` waits until it has."""
        self._line.sendall(json.dumps([verb, *args]).encode() + b"\n")

    def end(self) -> Any:
        """The result of what was begun; raises `Told` for its error."""
        while True:
            kind, *rest = self._next()
            if kind == "event":
                self._events.append(rest)
            elif kind == "error":
                raise Told(*rest)
            else:
                return rest[0]

    def call(self, verb: str, *args: object) -> Any:
        """Tell it to do something, and wait until it has."""
        self.begin(verb, *args)
        return self.end()

    def expect(self, event: str) -> list[Any]:
        """Wait until it says, unasked, that something happened to it."""
        while True:
            for found in self._events:
                if found[0] == event:
                    self._events.remove(found)
                    return found[1:]
            kind, *rest = self._next()
            assert kind == "event", f"{kind} {rest} instead of the event {event}"
            self._events.append(rest)

    def descriptors(self) -> dict[str, str]:
        """Its open descriptors, once it has read all that was sent to it."""
        self.call("role")
        return open_descriptors(self.pid)

    def serve(self, directory: Path, addresses: list[str], **options: object) -> Instance:
        """The whole of a start: initialize, listen, ready, accept."""
        self.call("initialize", str(directory), len(addresses), options)
        self.call("listen", addresses)
        self.call("ready")
        return self

    def _next(self) -> list[Any]:
        while b"\n" not in self._received:
            wait_readable(self._line.fileno(), f"a word of pid {self.pid}; it wrote: {self.log}")
            try:
                more = self._line.recv(65536)
            except ConnectionResetError:  # it ended without having read all that it was told
                more = b""
            assert more, f"pid {self.pid} ended; it wrote: {self.log}"
            self._received += more
        first, _, self._received = self._received.partition(b"\n")
        found: list[Any] = json.loads(first)
        return found

    def close(self) -> None:
        super().close()
        self._line.close()


class Processes:
    """Starts processes; whatever still runs when this is left is killed by its pid."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._logs = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hr-log-")))
        self._number = 0

    def close(self) -> None:
        """Kill what still runs."""
        self._stack.close()

    def _log(self) -> Path:
        self._number += 1
        return self._logs / str(self._number)

    def _kept(self, process: Process) -> None:
        self._stack.callback(process.close)

    def instance(self, *prefix: str, module: str = "tests.support.puppet") -> Instance:
        """An instance: the program `module`, whose command line begins with `prefix` (strace)."""
        ours, theirs = socket.socketpair()
        log = self._log()
        args = [
            *prefix,
            sys.executable,
            "-W",
            "error",
            "-m",
            module,
            str(theirs.fileno()),
            str(log),
        ]
        with theirs:
            # Its pid is waited for here, not by subprocess.
            pid = os.posix_spawnp(
                args[0],
                args,
                {**os.environ, "PYTHONPATH": str(ROOT)},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno())],
            )
            log.touch()
        process = Instance(pid, log, ours)
        self._kept(process)
        return process

    def command(self, *args: str, **more: Any) -> Command:
        """A program."""
        process = Command(list(args), self._log(), **more)
        self._kept(process)
        return process

    def python(self, code: str, *args: str, **more: Any) -> Command:
        """A Python program, given as text."""
        return self.command(sys.executable, "-c", code, *args, **more)


@contextlib.contextmanager
def stopped(process: Process) -> Iterator[None]:
    """The process is stopped inside the block, and goes on behind it."""
    process.stop()
    try:
        yield
    finally:
        process.resume()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what no descriptor tells of, such as a file that another process removes."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE:g} s"
        os.sched_yield()
