"""A fence between a handover and the server it runs in."""

from __future__ import annotations

import time
from types import TracebackType

from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal

_ALWAYS_LOGGED = 3  # faults
_LOG_INTERVAL = 60.0  # seconds between two faults that are logged after those


class Fence:
    """Logs an unexpected exception in a ``with`` block, and suppresses it.

    A handover runs inside callbacks of the server, whose event loop an exception could end. What
    is no `Exception`, such as a SystemExit that a signal handler raises, passes.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._faults = 0
        self._next_log = 0.0

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._faults += 1
        now = time.monotonic()
        if self._faults <= _ALWAYS_LOGGED or now >= self._next_log:
            self._next_log = now + _LOG_INTERVAL
            self._journal.emit(events.HANDOVER_FAULT, traceback=error)
        return True
