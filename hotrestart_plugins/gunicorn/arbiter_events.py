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

from hotrestart_plugins.gunicorn._compat import arbiter
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter

_SOONEST = 0.001  # seconds; setitimer(2) takes 0 for 'never'
SIGNALS = (signal.SIGIO, signal.SIGALRM)


class ArbiterEvents:
    """The descriptors that the arbiter watches, and its deadlines, by name. Owns no descriptor."""

    def __init__(self, server: Arbiter) -> None:
        self._wake = arbiter.waker(server)
        self._deadlines: dict[str, float] = {}
        for number in SIGNALS:
            signal.signal(number, self._signalled)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._wake()

    def now(self) -> None:
        """Wake the arbiter."""
        self._wake()

    def watch(self, fd: int) -> None:
        """Wake the arbiter whenever `fd` becomes readable, and once now: it may be so already."""
        if fd < 0:
            return
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
        self.now()

    def set_deadline(self, seconds: float, name: str) -> None:
        """Set the deadline of that name, or change it. `seconds`: from now."""
        self._deadlines[name] = time.monotonic() + seconds
        self._arm()

    def clear_deadline(self, name: str) -> None:
        """Drop the deadline of that name, if there is one."""
        if self._deadlines.pop(name, None) is not None:
            self._arm()

    def expired(self, name: str) -> bool:
        """Whether the deadline of that name has passed; if so, it is dropped."""
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
        """Drop every deadline, and watch nothing any more."""
        self._deadlines.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        # gunicorn forks processes without a call of ours, its dirty arbiter's, which share the
        # watched pipe. They may end later, and at its very end Python would let SIGIO kill this
        # process.
        signal.signal(signal.SIGIO, signal.SIG_IGN)


def forget_in_worker() -> None:
    """In a forked worker: leave the signals to the app."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
