"""What wakes gunicorn's arbiter, without a thread: signals into its own queue.

SIGIO says that a descriptor has become readable, SIGALRM that a deadline has passed. Both are
queued as the SIGCHLD that they resemble ('something has happened, look what'): gunicorn logs that
one at debug level, and all of them lead to one method that looks at everything.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from types import FrameType
from typing import Any

_SOONEST = 0.001  # seconds; setitimer(2) takes 0 for 'never'
SIGNALS = (signal.SIGIO, signal.SIGALRM)


class ArbiterEvents:
    """The arbiter's descriptors to watch, and its deadlines, by name."""

    def __init__(self, server: Any) -> None:
        self._queue = server.SIG_QUEUE  # a SimpleQueue: a signal handler may put into it
        self._deadlines: dict[str, float] = {}
        for number in SIGNALS:
            signal.signal(number, self._signalled)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self.now()

    def now(self) -> None:
        """Wake the arbiter."""
        self._queue.put_nowait(signal.SIGCHLD)

    def watch(self, fd: int) -> None:
        """Wake the arbiter whenever `fd` becomes readable; look once, it may be so already."""
        if fd < 0:
            return
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
        self.now()

    def set_deadline(self, seconds: float, name: str) -> None:
        """Set, or set anew, the deadline of that name."""
        self._deadlines[name] = time.monotonic() + seconds
        self._arm()

    def clear_deadline(self, name: str) -> None:
        """Drop the deadline of that name, if there is one."""
        if self._deadlines.pop(name, None) is not None:
            self._arm()

    def expired(self, name: str) -> bool:
        """Whether the deadline of that name has passed; it is dropped then."""
        if self._deadlines.get(name, float("inf")) > time.monotonic():
            return False
        del self._deadlines[name]
        self._arm()
        return True

    def _arm(self) -> None:
        now = time.monotonic()
        ahead = [when for when in self._deadlines.values() if when > now]
        if len(ahead) < len(self._deadlines):
            self.now()
        signal.setitimer(signal.ITIMER_REAL, max(_SOONEST, min(ahead) - now) if ahead else 0)

    def close(self) -> None:
        """No more deadlines, and nothing is watched any more."""
        self._deadlines.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Processes that gunicorn forks without a word to us, its dirty arbiter's, share the watched
        # pipe. They may end later, and at its very end Python would let SIGIO kill this one.
        signal.signal(signal.SIGIO, signal.SIG_IGN)


def forget_in_worker() -> None:
    """In a forked worker: the signals are the app's to use."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
