"""The other side: the child that a parent watches, and the listeners held for it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import os
import select
from collections.abc import Callable
from typing import Any, Protocol

from hotrestart_plugins.rendezvous import Claim


def _unpatched_poll() -> Any:
    """poll(2), also where gevent has put its own in the place of it.

    That one waits in the hub even for no time at all, and fails where the hub itself calls.
    """
    found: Any = select.poll
    spec = importlib.util.find_spec("select")
    if isinstance(found, type(len)) or spec is None or spec.loader is None:
        return found
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    return untouched.poll


_poll = _unpatched_poll()


class Logger(Protocol):
    """What is needed of a logger: the standard one's methods, gunicorn's have them too."""

    def debug(self, msg: str, *args: Any) -> None:
        """Each listener."""

    def info(self, msg: str, *args: Any) -> None:
        """Each step."""

    def warning(self, msg: str, *args: Any) -> None:
        """What went otherwise."""

    def error(self, msg: str, *args: Any) -> None:
        """What somebody has to look at."""


class Child:
    """The process that asks this one for its listeners. Owns a pidfd of it, if there is one."""

    def __init__(self, pid: int, birth: int, succeeded: Callable[[], bool]) -> None:
        """`pid`: 0 for a process of another pid namespace, of which there is no pidfd.

        `birth`: see `MeetingPlace.child_birth`. `succeeded`: for a pid of 0, see
        `MeetingPlace.succeeded`.
        """
        self.pid = pid
        self.birth = birth
        self.given: set[str] = set()
        """The addresses whose listeners it was given."""
        self._pidfd = -1
        self._gone = False
        self._poll = _poll()
        self._succeeded = succeeded
        try:
            self._pidfd = os.pidfd_open(pid)
            self._poll.register(self._pidfd, select.POLLIN)
        except OSError as error:  # ESRCH; or a pid of 0
            self._gone = error.errno == errno.ESRCH

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends.

        -1 if there is none: then look at `alive` now and then.
        """
        return self._pidfd

    @property
    def alive(self) -> bool:
        """Whether the process still runs; without a pidfd, whether anybody has come after."""
        if not self._gone:
            self._gone = bool(self._poll.poll(0)) if self._pidfd >= 0 else not self._succeeded()
        return not self._gone

    def close(self) -> None:
        """Close the pidfd."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Held:
    """One registered listener. Owns a duplicate of the descriptor that was registered."""

    def __init__(self, fd: int, path: str | None) -> None:
        """`path`: the file of a Unix listener. Raises OSError if `fd` is not open."""
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        self.claim: Claim | None = None
        if path is not None:
            with contextlib.suppress(OSError):
                self.claim = Claim(path)

    def close(self) -> None:
        """Close the duplicate."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
