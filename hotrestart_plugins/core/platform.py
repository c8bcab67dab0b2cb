"""What differs between systems: poll(2) from the system itself, and the end of a process."""

from __future__ import annotations

import errno
import importlib.util
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import cast


def unpatched_poll() -> Callable[[], select.poll]:
    """poll(2), also where gevent has put its own in its place.

    gevent's waits in the hub even for no time at all, and fails where the hub itself calls it.
    """
    found: object = select.poll
    spec = importlib.util.find_spec("select")
    if isinstance(found, type(len)) or spec is None or spec.loader is None:
        return cast("Callable[[], select.poll]", found)
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    return cast("Callable[[], select.poll]", untouched.poll)


poll = unpatched_poll()


class ProcessWatch:
    """Tells when a process ends. Owns a pidfd of it, where the system has pidfds.

    Where it has none (an old kernel, a sandbox that denies the call, a Python built without it),
    the time at which the process was started tells it from a later one with the same pid.
    """

    def __init__(self, pid: int) -> None:
        """`pid`: 0 for a process of another pid namespace, which cannot be watched."""
        self._pid = pid
        self._pidfd = -1
        self._started: bytes | None = None
        self._ended = False
        self._poll = poll()
        if pid <= 0:
            return
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) == errno.ESRCH:
                self._ended = True
                return
            self._started = _start_time(pid)
            self._ended = self._started is None and not _exists(pid)
        else:
            self._poll.register(self._pidfd, select.POLLIN)

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends; -1 if there is none."""
        return self._pidfd

    def ended(self) -> bool | None:
        """Whether the process has ended; None if that cannot be known here."""
        if self._ended:
            return True
        if self._pidfd >= 0:
            self._ended = bool(self._poll.poll(0))
        elif self._started is not None:
            self._ended = _start_time(self._pid) != self._started
        else:
            return None
        return self._ended

    def close(self) -> None:
        """Close the pidfd."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _start_time(pid: int) -> bytes | None:
    """When the process was started, in clock ticks since the boot; None once it has ended.

    None as well where /proc is hidden from this process.
    """
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # Field 2, the program's name, may contain anything; proc(5). Field 3 is the state, 22 the time.
    fields = content.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it runs as another user
    return True
