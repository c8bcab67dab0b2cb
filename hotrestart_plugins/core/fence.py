"""Keeps faults of this package away from the server that it runs in."""

from __future__ import annotations

import time
from types import TracebackType

from hotrestart_plugins.core import events
from hotrestart_plugins.core.events import Event
from hotrestart_plugins.core.journal import Journal

_LOUD_FAULTS = 3  # in a row, each with its traceback in the log
SECONDS_BETWEEN_TRACEBACKS = 60.0
"""After that."""


class Fence:
    """A context, to be entered again and again: an exception in it is logged and goes no further.

    This package runs in callbacks and signal handlers of a server, whose event loop or main loop
    an exception could end. What ends a loop on purpose passes: StopIteration, with which gunicorn
    ends its own, and whatever is no Exception, such as HaltServer, SystemExit, KeyboardInterrupt.
    """

    def __init__(self, journal: Journal, event: Event = events.FAULT) -> None:
        """`event`: what a fault is in the log; one without fields."""
        self._journal = journal
        self._event = event
        self._in_row = 0
        self._next_traceback = 0.0
        self.faults = 0
        """How many it has kept in."""

    def __enter__(self) -> None:
        """Nothing to do: one fence can be entered within itself."""

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, StopIteration):
            return False
        self.faults += 1
        self._in_row += 1
        now = time.monotonic()
        if self._in_row <= _LOUD_FAULTS or now >= self._next_traceback:
            self._next_traceback = now + SECONDS_BETWEEN_TRACEBACKS
            self._journal.emit(self._event, traceback=error)
        return True

    def all_well(self) -> None:
        """A whole round went by without a fault: the next one is logged at once."""
        self._in_row = 0
