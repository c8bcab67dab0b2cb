"""Says what happens: one event, in the log and in the record of the takeover."""

from __future__ import annotations

import logging

from hotrestart_plugins.core.events import Event, Logger, write
from hotrestart_plugins.core.record import Record


class Journal:
    """Where one process says what happens: in its log, and in the record of its takeover."""

    def __init__(self, logger: Logger) -> None:
        """The record is added later, if there is a takeover to record."""
        self.logger = logger
        self.record: Record | None = None

    def emit(
        self,
        event: Event,
        /,
        *,
        traceback: BaseException | None = None,
        facts: dict[str, object] | None = None,
        **fields: object,
    ) -> None:
        """Say that `event` happened. Never raises because of the record.

        `traceback`: the error whose traceback goes into the log. `facts`: what else the record
        notes, by its name there. `fields`: the event's own.
        """
        # First the record: whoever has seen the line may read there what it says.
        if self.record is not None and (event.step or event.outcome or facts):
            self.record.note(event.step, outcome=event.outcome, **(facts or {}))
        write(self.logger, event, traceback=traceback, **fields)


def journal_of(logger: Logger | Journal | None) -> Journal:
    """`logger` itself if it is a journal, else a journal that writes to it.

    None: the standard library's logger ``hotrestart``.
    """
    if isinstance(logger, Journal):
        return logger
    return Journal(logging.getLogger("hotrestart") if logger is None else logger)
