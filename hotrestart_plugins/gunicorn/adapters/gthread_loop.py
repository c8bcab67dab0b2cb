"""The event loop of a gthread worker, with the interface that a handover needs.

What is called here is called between the loop's own calls and its look at deadlines: a connection
that leaves the loop during its calls may have a call of its own still to come in that turn.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from hotrestart_plugins.gunicorn._compat.gthread import GthreadWorker


class GthreadEventLoop:
    """The `EventLoop` of a gthread worker."""

    def __init__(self, worker: GthreadWorker) -> None:
        self._worker = worker
        self._timers: deque[Timer] = deque()
        worker.around_each_turn(self._wait, self._run_timers)

    def _wait(self, wait: Callable[[float], object], timeout: float) -> None:
        # Of a copy: a signal handler may add one meanwhile, which then wakes the loop.
        times = (timer.when for timer in tuple(self._timers) if timer.callback is not None)
        when = min(times, default=None)
        if when is not None:
            timeout = min(timeout, max(0.0, when - time.monotonic()))
        wait(timeout)

    def _run_timers(self) -> None:
        for _ in range(len(self._timers)):
            timer = self._timers.popleft()
            if timer.when <= time.monotonic():
                timer.run()
            elif timer.callback is not None:
                self._timers.append(timer)

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Call back whenever `fd` is readable."""
        self._worker.add_reader(fd, lambda: self._add(0.0, callback))

    def _add(self, when: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(when, callback)
        self._timers.append(timer)
        return timer

    def remove_reader(self, fd: int) -> None:
        """Stop watching `fd`."""
        self._worker.remove_reader(fd)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        """Call back in this turn or the next. Can be called by a signal handler."""
        timer = self._add(0.0, functools.partial(callback, *args))
        self._worker.wake()
        return timer

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call back after `delay` seconds. Called in the loop, which has yet to wait."""
        return self._add(time.monotonic() + delay, functools.partial(callback, *args))


class Timer:
    """A call to come."""

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        """`when`: in monotonic seconds."""
        self.when = when
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Do not call it."""
        self.callback = None

    def run(self) -> None:
        """Call it, unless it was cancelled."""
        if self.callback is not None:
            self.callback()
