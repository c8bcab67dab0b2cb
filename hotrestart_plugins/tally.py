"""The account of a drain: what became of the connections that were open when it began."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Tally:
    """What a drain did, in connections unless it says otherwise."""

    requests: int = 0
    """Requests answered since it began."""
    finished: int = 0
    """Closed after an answer."""
    moved: int = 0
    """Handed over to the successor."""
    idle: int = 0
    """Closed without a further request, by the client or by the keep-alive timeout."""
    websockets: int = 0
    """WebSockets closed with 1012."""
    streams: int = 0
    """Event streams brought to their end."""
    cut_requests: int = 0
    """Requests under way when the time was over."""
    cut_websockets: int = 0
    cut_idle: int = 0
    cut_tasks: int = 0
    """Background tasks, likewise."""

    @classmethod
    def by_numbers(cls, before: int, left: int, answers: int, moved: int = 0) -> Tally:
        """Where only numbers are known: of connections before and now, and of answers since.

        Each answer closes its connection, so those that ended without one were idle.
        """
        ended = max(0, before - left - moved)
        finished = min(answers, ended)
        return cls(requests=answers, finished=finished, moved=moved, idle=ended - finished)

    def __add__(self, other: Tally) -> Tally:
        """The sum, of several workers."""
        mine, theirs = asdict(self), asdict(other)
        return Tally(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def cut(self) -> int:
        """All that was cut off."""
        return self.cut_requests + self.cut_websockets + self.cut_idle + self.cut_tasks

    def cut_text(self) -> str:
        """What was cut off, in words."""
        return (
            f"cutting off {self.cut_requests} requests, {self.cut_websockets} WebSockets, "
            f"{self.cut_idle} idle connections, {self.cut_tasks} background tasks"
        )

    def __str__(self) -> str:
        ended = self.finished + self.idle + self.websockets + self.streams
        return (
            f"{self.requests} requests answered while draining; {self.moved} connections handed "
            f"over, {ended} ended ({self.finished} after an answer, {self.idle} idle, "
            f"{self.websockets} WebSockets, {self.streams} event streams), {self.cut} cut off"
        )
