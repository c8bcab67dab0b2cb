"""What a callback of the running instance raises goes no further."""

from __future__ import annotations

import time

from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal

_SAID_IN_A_ROW = 3  # faults in a row of which each has its traceback in the log
_SAID_AGAIN_AFTER = 60.0  # seconds between two tracebacks from then on


class Fence:
    """Says what was caught, and does not fill the log if it comes again and again."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._in_a_row = 0
        self._said_at = 0.0

    def passed(self) -> None:
        """Note that a callback returned: the next fault is the first one again."""
        self._in_a_row = 0

    def caught(self, error: Exception) -> None:
        """Log the traceback of `error`, unless the last one like it is less than a minute old."""
        self._in_a_row += 1
        now = time.monotonic()
        if self._in_a_row <= _SAID_IN_A_ROW or now >= self._said_at + _SAID_AGAIN_AFTER:
            self._said_at = now
            self._journal.emit(events.CALLBACK_FAILED, traceback=error)
