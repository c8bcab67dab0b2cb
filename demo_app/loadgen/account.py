"""What the clients of one load share: what to do, when to stop, and the account they keep."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from demo_app.loadgen.connection import Connection, Failed, Target, resolve
from demo_app.loadgen.report import (
    MOST_DETAILS,
    ClientTally,
    FailureDetail,
    PidTally,
    Report,
    Sample,
    Sizes,
)

Condition = Callable[[Report], bool]


@dataclass
class Account:
    """Each request is entered once: by `count_answer` or by `count_failure`."""

    target: Target
    tls: ssl.SSLContext | None
    timeout: float
    pause: float
    sizes: Sizes
    report: Report
    most_requests: float = math.inf
    stopping: bool = False
    opened: set[Connection] = field(default_factory=set)
    _naps: set[asyncio.Future[None]] = field(default_factory=set)
    _conditions: dict[asyncio.Future[None], Condition] = field(default_factory=dict)
    _details: dict[tuple[str, str], int] = field(default_factory=dict)

    def goes_on(self) -> bool:
        return not self.stopping and self.report.sent < self.most_requests

    def stop(self) -> None:
        """No request begins any more, and nobody naps."""
        self.stopping = True
        for nap in self._naps:
            resolve(nap)

    async def nap(self, seconds: float, connection: Connection | None = None) -> None:
        """Wait so many seconds, or until a stop, or until something happens on the connection."""
        if self.stopping or (connection and connection.ended):
            return
        loop = asyncio.get_running_loop()
        nap = loop.create_future()
        timer = loop.call_later(seconds, resolve, nap)
        self._naps.add(nap)
        if connection:
            connection.waiter = nap
        try:
            await nap
        finally:
            timer.cancel()
            self._naps.discard(nap)
            if connection:
                connection.waiter = None

    def count_answer(
        self, client: str, start: float, pid: int, new_connection: Connection | None
    ) -> None:
        """`new_connection` is the connection, if this was the first answer on it."""
        report = self.report
        now = time.monotonic()
        report.answered += 1
        tally = report.by_client[client]
        tally.answered += 1
        tally.slowest = max(tally.slowest, now - start)
        by_pid = report.by_pid.get(pid)
        if by_pid is None:
            by_pid = report.by_pid[pid] = PidTally(first=now)
        by_pid.answers += 1
        by_pid.last = now
        if new_connection:
            by_pid.new += 1
            by_pid.last_begun = max(by_pid.last_begun, new_connection.begun)
        if report.samples is not None:
            new = new_connection is not None
            report.samples.add(Sample(start, now, pid, new, None, client))
        if self._conditions:
            self.check_conditions()

    def count_failure(
        self, client: str, start: float, failure: Failed, connection: Connection | None
    ) -> None:
        """`connection` is where it failed, if there was one."""
        report = self.report
        now = time.monotonic()
        kind = failure.kind
        report.failed[kind] = report.failed.get(kind, 0) + 1
        report.by_client[client].failed += 1
        pid, carried, received = 0, 0, 0
        if connection:
            pid, carried, received = connection.pid, connection.carried, connection.received
        details = self._details[kind, client] = self._details.get((kind, client), 0) + 1
        if details <= MOST_DETAILS:
            what = (now, kind, client, start, pid, carried, received, failure.errno, failure.note)
            report.first_failures.append(FailureDetail(*what))
        if report.samples is not None:
            report.samples.add(Sample(start, now, pid, not carried, kind, client))
        if self._conditions:
            self.check_conditions()

    async def until(self, condition: Condition) -> None:
        """Wait until the condition holds, or the load ended; it is looked at after each request."""
        if not (self.report.ended or condition(self.report)):
            future = asyncio.get_running_loop().create_future()
            self._conditions[future] = condition
            try:
                await future
            finally:
                del self._conditions[future]

    def check_conditions(self) -> None:
        for future, condition in self._conditions.items():
            if self.report.ended or condition(self.report):
                resolve(future)

    def open_tally(self, client: str) -> None:
        self.report.by_client.setdefault(client, ClientTally())
