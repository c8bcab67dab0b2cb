"""Statistics of a drain: what became of the connections that were open when it began."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class DrainStats:
    """What a drain did. Counts are of connections, except where a field says otherwise."""

    requests: int = 0
    """Requests answered since it began."""
    finished: int = 0
    """Closed after an answer."""
    handed_over: int = 0
    """Handed over to the other instance."""
    idle: int = 0
    """Closed without a further request, by the client or by the keep-alive timeout."""
    websockets: int = 0
    """WebSockets closed with code 1012."""
    streams: int = 0
    """Event streams that were ended."""
    aborted_requests: int = 0
    """Requests still in flight when the drain timeout was over."""
    aborted_websockets: int = 0
    """WebSockets still open when the drain timeout was over."""
    aborted_idle: int = 0
    """Idle connections still open when the drain timeout was over."""
    aborted_tasks: int = 0
    """Background tasks still running when the drain timeout was over."""

    @classmethod
    def by_numbers(cls, before: int, left: int, answers: int, handed_over: int = 0) -> DrainStats:
        """Return the statistics of a server that knows only numbers.

        `before` and `left` are the connections open at the start of the drain and now, `answers`
        the answers in between. Each answer closes its connection, so a connection that ended
        without an answer was idle.
        """
        ended = max(0, before - left - handed_over)
        finished = min(answers, ended)
        return cls(
            requests=answers, finished=finished, handed_over=handed_over, idle=ended - finished
        )

    def __add__(self, other: DrainStats) -> DrainStats:
        """Add the statistics of another worker."""
        mine, theirs = asdict(self), asdict(other)
        return DrainStats(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def aborted(self) -> int:
        """How many requests, connections and tasks were cut off."""
        return (
            self.aborted_requests + self.aborted_websockets + self.aborted_idle + self.aborted_tasks
        )

    def aborted_text(self) -> str:
        """Return what was aborted, in words: '1 request, 2 idle connections'."""
        return _counts(
            (self.aborted_requests, "request"),
            (self.aborted_websockets, "WebSocket"),
            (self.aborted_idle, "idle connection"),
            (self.aborted_tasks, "background task"),
        )

    def counts(self) -> dict[str, int]:
        """Return the counts by name, for the record."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            _counts(
                (self.requests, "request", " answered"),
                (self.handed_over, "connection", " handed over"),
                (self.finished, "connection", " closed after an answer"),
                (self.idle, "idle connection", " closed"),
                (self.websockets, "WebSocket", " closed"),
                (self.streams, "event stream", " ended"),
                (self.aborted, "", "aborted"),
            )
            or "nothing was open"
        )


def _counts(*counted: tuple[int, str] | tuple[int, str, str]) -> str:
    """Return '1 request answered, 2 WebSockets closed': numbers, nouns, verbs, and no zeros."""
    parts = []
    for number, noun, *verb in counted:
        plural = "s" if noun and number != 1 else ""
        if number:
            parts.append(f"{number} {noun}{plural}{''.join(verb)}")
    return ", ".join(parts)
