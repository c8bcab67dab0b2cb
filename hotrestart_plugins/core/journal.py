"""Says what happens: one event, in the log and in the record of the takeover."""

from __future__ import annotations

from hotrestart_plugins.core.events import Event, Logger
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
        if event.level:
            log = getattr(self.logger, event.level)
            if traceback is None:
                log("%s", event.text(**fields))
            else:
                log("%s", event.text(**fields), exc_info=traceback)
        if self.record is not None and (event.step or event.outcome or facts):
            self.record.note(event.step, outcome=event.outcome, **(facts or {}))
