"""gunicorn instances for the tests: how they are started, and what is looked for in their logs."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from demo_app.deploys import DEADLINE, DeployError, Deploys, Instance
from tests.support import instances

if TYPE_CHECKING:
    from typing_extensions import Self

STOPPED = instances.STOPPED
STOPPED_OR_GONE = (STOPPED, "; exiting")
"""Without a window, workers that take longer than a second to stop accepting are stopped."""
WORKERS = ("sync", "gthread", "gevent", "asgi", "uvicorn")
EACH_WORKER = pytest.mark.parametrize("worker", WORKERS)
# Of uvicorn's earlier versions with later ones of websockets nobody needs to hear.
STRICT = {"PYTHONWARNINGS": "error::DeprecationWarning,ignore:websockets:DeprecationWarning"}
QUICK = {**STRICT, **instances.QUICK}
WINDOW = {**STRICT, **instances.WINDOW}
EX_CONFIG = 78
INSTALL = "from hotrestart_plugins.gunicorn import install\ninstall(globals())\n"


def gunicorn(worker: str, address: str, *more: str) -> list[str]:
    """The demo's command line; without the control socket, whose place all of them share.

    gunicorn's own two seconds of keep-alive are over for a client that has to wait for the
    processor.
    """
    return instances.demo(f"gunicorn {worker}", address, "--keep-alive", "60", *more)


def own_config(worker: str, address: str, config: Path, *more: str) -> list[str]:
    """The same with a config file of one's own."""
    args = gunicorn(worker, address, *more)
    args[args.index("-c") + 1] = str(config)
    return args


def inside(directory: Path, args: list[str]) -> list[str]:
    """The same, started in another directory."""
    return ["sh", "-c", 'cd "$0" && exec "$@"', str(directory), *args]


def start(place: Deploys, args: list[str], **env: str) -> Instance:
    """An instance, as soon as it runs."""
    return place.start(args, **env)


def up(place: Deploys, args: list[str], **env: str) -> Instance:
    """A first parent that serves."""
    return instances.up(place, args, **{**QUICK, **env})


def successor(place: Deploys, old: Instance, args: list[str], **env: str) -> Instance:
    """An instance that has taken over; the old one has ended with 0."""
    return instances.successor(place, old, args, **{**QUICK, **env})


def takes_over(place: Deploys, old: Instance, args: list[str], **env: str) -> Instance:
    """An instance that has taken over; the old one stands by."""
    return instances.takes_over(place, old, args, **{**WINDOW, **env})


def booted(instance: Instance) -> list[int]:
    """The pids of its workers, in the order in which they were started, by its log."""
    return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", instance.log)]


def workers_of(instance: Instance) -> set[int]:
    """The pids of its workers."""
    return set(booted(instance))


def only_line(log: str, text: str) -> str:
    (line,) = [line for line in log.splitlines() if text in line]
    return line


def children_of(pid: int) -> set[int]:
    """The workers that a master has, by the kernel's word."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def parent_of(pid: int) -> int:
    """A worker's master."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Daemons:
    """gunicorn's daemons, which have a session of their own; ended with the `with`."""

    def __init__(self, place: Deploys, args: list[str], pid_file: Path) -> None:
        self._place = place
        # What a daemon says can be read then, and that it has gone.
        self._args = [*args, "--daemon", "--pid", str(pid_file), "--enable-stdio-inheritance"]
        self._pid_file = pid_file
        self._pidfds: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)

    def start(self, said: str) -> tuple[Instance, int]:
        """One that has said this: who started it, with its log, and its pid."""
        launcher = start(self._place, self._args, **QUICK)
        assert launcher.wait() == 0
        launcher.wait_for(said)
        pid = int(self._pid_file.read_text())
        self._pidfds.append(os.pidfd_open(pid))
        return launcher, pid


def wait_for_end(launcher: Instance) -> None:
    """Until no process holds the output of it: of a daemon's, none is left."""
    with pytest.raises(DeployError, match="ended without"):
        launcher.wait_for("no such line")


def kill(instance: Instance) -> None:
    """SIGKILL, and wait until its workers have gone, as they do by themselves."""
    with contextlib.ExitStack() as stack:
        ends = [os.pidfd_open(pid) for pid in workers_of(instance)]
        for fd in ends:
            stack.callback(os.close, fd)
        instance.signal(signal.SIGKILL)
        for fd in ends:
            assert select.select([fd], [], [], DEADLINE)[0], "a worker without a master stays"


def listening_inode(address: str) -> str:
    """The inode of the listener on a TCP address of IPv4, as in /proc/PID/fd: proc_net(5)."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = {row[9] for row in rows if row[1].endswith(port) and row[3] == "0A"}
    return inode


def holds_socket(pid: int, inode: str) -> bool:
    """Whether a process has a descriptor of the socket; no if it has ended."""
    with contextlib.suppress(FileNotFoundError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(entry) == f"socket:[{inode}]":
                    return True
    return False
