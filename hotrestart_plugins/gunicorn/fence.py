"""Keeps faults in this package away from gunicorn's main loop, which would end the master."""

from __future__ import annotations

import time
from types import TracebackType

from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal

_LOUD_FAULTS = 3  # in a row, each with its traceback in the log
SECONDS_BETWEEN_TRACEBACKS = 60.0
"""After that."""


class Fence:
    """A context, to be entered again and again: an exception in it is logged and goes no further.

    What ends gunicorn's main loop on purpose passes: StopIteration, and whatever is no Exception,
    such as HaltServer, SystemExit and KeyboardInterrupt.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
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
            self._journal.emit(events.FAULT, traceback=error, kind=type(error).__name__)
        return True

    def all_well(self) -> None:
        """A whole round went by without a fault: the next one is logged at once."""
        self._in_row = 0
