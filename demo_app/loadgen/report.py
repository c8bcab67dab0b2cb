"""What can be asked of a load, and the account of it."""

from __future__ import annotations

import array
import base64
import errno
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

FAILURES = ("refused", "reset", "eof", "cut_short", "timed_out", "status", "garbled", "local")
CLIENTS = ("one_shot", "keep_alive", "slow", "upload", "sse", "websocket")

MOST_SAMPLES = 2_000_000
MOST_DETAILS = 5  # of each kind of failure, for each kind of client

Json = dict[str, Any]


@dataclass
class Mix:
    """How many clients of each kind; each is a closed loop of one request at a time.

    one_shot    a new connection for each request
    keep_alive  one connection for as long as the server keeps it; so do all of the following
    slow        GET /slow
    upload      POST /upload, the body sent in pieces over time, its checksum compared
    sse         GET /events, the sequence checked
    websocket   one message on /ws and its echo is one request
    """

    one_shot: int = 0
    keep_alive: int = 0
    slow: int = 0
    upload: int = 0
    sse: int = 0
    websocket: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in CLIENTS)


@dataclass(frozen=True)
class Sizes:
    """How slow is slow, how large is an upload, and so on."""

    slow_seconds: float = 1.0
    upload_kib: int = 64
    upload_pieces: int = 8
    upload_seconds: float = 0.5
    sse_events: int = 10


class Sample(NamedTuple):
    """One request: `start` includes the connect, if there was one; pid 0 is unknown."""

    start: float
    end: float
    pid: int
    new_connection: bool
    failure: str | None
    client: str


class Samples:
    """A sequence of `Sample`, 21 bytes each; those beyond MOST_SAMPLES are counted as dropped."""

    def __init__(self) -> None:
        self._columns: tuple[array.array[Any], ...] = tuple(array.array(code) for code in "ddiB")
        self.dropped = 0

    def add(self, sample: Sample) -> None:
        if len(self) >= MOST_SAMPLES:
            self.dropped += 1
            return
        start, end, pid, new, failure, client = sample
        what = CLIENTS.index(client) << 5 | new << 4
        if failure:
            what |= FAILURES.index(failure) + 1
        for column, value in zip(self._columns, (start, end, pid, what), strict=True):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[Sample]:
        for start, end, pid, what in zip(*self._columns, strict=True):
            failure = FAILURES[(what & 15) - 1] if what & 15 else None
            yield Sample(start, end, pid, bool(what & 16), failure, CLIENTS[what >> 5])

    def extend(self, other: Samples) -> None:
        for mine, more in zip(self._columns, other._columns, strict=True):
            mine.extend(more)
        self.dropped += other.dropped

    def to_json(self) -> Json:
        columns = [base64.b64encode(column.tobytes()).decode() for column in self._columns]
        return {"columns": columns, "dropped": self.dropped}

    @classmethod
    def from_json(cls, value: Json) -> Samples:
        samples = cls()
        for column, text in zip(samples._columns, value["columns"], strict=True):
            column.frombytes(base64.b64decode(text))
        samples.dropped = value["dropped"]
        return samples


@dataclass
class PidTally:
    """What one server process answered. A time of 0.0 means never."""

    answers: int = 0
    new: int = 0  # answers that were the first on their connection
    first: float = 0.0  # when its first answer was complete
    last: float = 0.0
    last_begun: float = 0.0  # the latest start of a connect() whose connection it answered

    def merge(self, other: PidTally) -> PidTally:
        return PidTally(
            self.answers + other.answers,
            self.new + other.new,
            min(filter(None, (self.first, other.first)), default=0.0),
            max(self.last, other.last),
            max(self.last_begun, other.last_begun),
        )


@dataclass
class ClientTally:
    """What the clients of one kind saw."""

    answered: int = 0
    failed: int = 0
    slowest: float = 0.0  # seconds, of the answered ones

    def merge(self, other: ClientTally) -> ClientTally:
        return ClientTally(
            self.answered + other.answered,
            self.failed + other.failed,
            max(self.slowest, other.slowest),
        )


@dataclass
class FailureDetail:
    """One failed request, as one would want to know it when looking for the cause."""

    time: float
    kind: str
    client: str
    start: float
    pid: int  # of the last answer on this connection; 0 if there was none
    carried: int  # answers that this connection had carried before
    received: int  # bytes of this answer
    errno: int | None
    note: str

    def __str__(self) -> str:
        number = f" ({errno.errorcode.get(self.errno, self.errno)})" if self.errno else ""
        before = f"after {self.carried} answers, the last by pid {self.pid}"
        return (
            f"{self.client}: {self.kind}{number} {self.time - self.start:.3f} s after its start, "
            f"{before if self.carried else 'on a new connection'}, "
            f"{self.received} bytes received{': ' if self.note else ''}{self.note}"
        )


@dataclass
class Report:
    """What became of the requests; the module's docstring says what is counted as what."""

    started: float = 0.0
    ended: float = 0.0  # 0.0: it has not
    sent: int = 0
    answered: int = 0
    abandoned: int = 0
    reconnects: int = 0
    closed_idle: int = 0
    ws_restarts: int = 0
    failed: dict[str, int] = field(default_factory=dict)  # only the kinds that occurred
    by_client: dict[str, ClientTally] = field(default_factory=dict)
    by_pid: dict[int, PidTally] = field(default_factory=dict)
    first_failures: list[FailureDetail] = field(default_factory=list)  # some of each kind
    samples: Samples | None = None

    @property
    def failures(self) -> int:
        return sum(self.failed.values())

    @property
    def slowest(self) -> float:
        """Seconds that the slowest answered request took, the connect included."""
        return max((tally.slowest for tally in self.by_client.values()), default=0.0)

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds if self.seconds > 0 else 0.0

    def merge(self, other: Report) -> Report:
        """Both runs as one."""
        samples = None
        if self.samples or other.samples:
            samples = Samples()
            for part in filter(None, (self.samples, other.samples)):
                samples.extend(part)
        kinds = [kind for kind in FAILURES if kind in self.failed or kind in other.failed]
        details = sorted(self.first_failures + other.first_failures, key=lambda one: one.time)
        return Report(
            started=min(filter(None, (self.started, other.started)), default=0.0),
            ended=max(self.ended, other.ended),
            sent=self.sent + other.sent,
            answered=self.answered + other.answered,
            abandoned=self.abandoned + other.abandoned,
            reconnects=self.reconnects + other.reconnects,
            closed_idle=self.closed_idle + other.closed_idle,
            ws_restarts=self.ws_restarts + other.ws_restarts,
            failed={kind: self.failed.get(kind, 0) + other.failed.get(kind, 0) for kind in kinds},
            by_client={
                kind: self.by_client.get(kind, ClientTally()).merge(
                    other.by_client.get(kind, ClientTally())
                )
                for kind in CLIENTS
                if kind in self.by_client or kind in other.by_client
            },
            by_pid={
                pid: self.by_pid.get(pid, PidTally()).merge(other.by_pid.get(pid, PidTally()))
                for pid in [*self.by_pid, *(pid for pid in other.by_pid if pid not in self.by_pid)]
            },
            first_failures=details,
            samples=samples,
        )

    def to_json(self, *, samples: bool = True) -> Json:
        value: Json = {one.name: getattr(self, one.name) for one in fields(self)}
        value["by_client"] = {kind: asdict(tally) for kind, tally in self.by_client.items()}
        value["by_pid"] = {str(pid): asdict(tally) for pid, tally in self.by_pid.items()}
        value["first_failures"] = [asdict(one) for one in self.first_failures]
        value["samples"] = self.samples.to_json() if self.samples and samples else None
        return value

    @classmethod
    def from_json(cls, value: Json) -> Report:
        value = dict(value)
        value["by_client"] = {kind: ClientTally(**one) for kind, one in value["by_client"].items()}
        value["by_pid"] = {int(pid): PidTally(**one) for pid, one in value["by_pid"].items()}
        value["first_failures"] = [FailureDetail(**one) for one in value["first_failures"]]
        value["samples"] = Samples.from_json(value["samples"]) if value["samples"] else None
        return cls(**value)

    def __str__(self) -> str:
        """A table."""
        outcome = f"{self.failures} failed, {self.abandoned} abandoned"
        connections = f"{self.reconnects} reconnects, {self.closed_idle} closed idle"
        lines = [
            f"{self.sent} sent in {self.seconds:.1f} s",
            f"{self.answered} answered ({self.rate:.0f} a second), {outcome}",
            f"{connections}, {self.ws_restarts} WebSocket restarts",
            "",
            f"{'client':<12}{'answered':>10}{'failed':>10}{'slowest':>12}",
        ]
        for kind, client in self.by_client.items():
            slowest = f"{client.slowest * 1000:.1f} ms"
            lines.append(f"{kind:<12}{client.answered:>10}{client.failed:>10}{slowest:>12}")
        lines += ["", f"{'pid':<12}{'answered':>10}{'new conn.':>10}{'first':>12}{'last':>12}"]
        for pid, tally in self.by_pid.items():
            first, last = (f"{at - self.started:.3f} s" for at in (tally.first, tally.last))
            lines.append(f"{pid:<12}{tally.answers:>10}{tally.new:>10}{first:>12}{last:>12}")
        if self.failed:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.failed.items())
            lines += ["", f"failed: {kinds}; the first ones:"]
        for one in self.first_failures:
            lines.append(f"  {one.time - self.started:.3f} s  {one}")
        return "\n".join(lines)
