"""All clients together, in this process and its event loop."""

from __future__ import annotations

import asyncio
import math
import resource
import ssl
import time
from collections.abc import Callable, Iterator

from demo_app.loadgen.account import Account, Condition
from demo_app.loadgen.clients import Client, Events, KeepAlive, OneShot, Upload, WebSocket
from demo_app.loadgen.connection import Target
from demo_app.loadgen.report import Mix, Report, Samples, Sizes

LONGEST_RUN = 3600.0  # seconds: no run is longer, whatever was asked


class Load:
    """Clients of several kinds against one target. To be run once.

    target      `Target`, or its text
    timeout     seconds that one request may take, its connect included
    path        what one_shot and keep_alive ask for
    pause       seconds between an answer and the client's next request
    record      keep a `Sample` of each request in the report
    """

    def __init__(
        self,
        target: Target | str,
        mix: Mix,
        *,
        timeout: float = 30.0,
        path: str = "/",
        pause: float = 0.0,
        record: bool = False,
        tls: ssl.SSLContext | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if mix.total + 32 > descriptors:
            raise ValueError(
                f"{mix.total} clients need {mix.total + 32} descriptors, "
                f"the limit is {descriptors}: raise it with ulimit -n"
            )
        self.mix = mix
        self.path = path
        self.report = Report(samples=Samples() if record else None)
        self._account = Account(
            target=Target.parse(target) if isinstance(target, str) else target,
            tls=tls,
            timeout=timeout,
            pause=pause,
            sizes=sizes or Sizes(),
            report=self.report,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def run(
        self,
        until: asyncio.Event | None = None,
        *,
        max_requests: int | None = None,
        max_seconds: float = LONGEST_RUN,
    ) -> Report:
        """Run until the event is set, `stop()`, so many requests, or so many seconds.

        Then each client finishes its request under way.
        """
        loop = asyncio.get_running_loop()
        self._account.most_requests = math.inf if max_requests is None else max_requests
        self.report.started = time.monotonic()
        self._tasks = [loop.create_task(client.run()) for client in self._clients()]
        timer = loop.call_later(min(max_seconds, LONGEST_RUN), self.stop)
        waiter = loop.create_task(self._stop_after(until)) if until else None
        try:
            if self._tasks:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            timer.cancel()
            await self._end([*self._tasks, *([waiter] if waiter else [])])
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error
        return self.report

    def stop(self, within: float | None = None) -> None:
        """Let each client finish its request under way.

        Requests that are not finished within so many seconds are given up: they are abandoned.
        """
        self._account.stop()
        if within is not None:
            asyncio.get_running_loop().call_later(within, self._cut_off)

    async def until(self, condition: Condition) -> None:
        """Wait until the condition holds, or the load ended; it is looked at after each request."""
        await self._account.until(condition)

    def _clients(self) -> Iterator[Client]:
        account = self._account
        slow = f"/slow?seconds={account.sizes.slow_seconds:g}"
        makers: dict[str, Callable[[str], Client]] = {
            "one_shot": lambda kind: OneShot(account, kind, self.path),
            "keep_alive": lambda kind: KeepAlive(account, kind, self.path),
            "slow": lambda kind: KeepAlive(account, kind, slow),
            "upload": lambda kind: Upload(account, kind),
            "sse": lambda kind: Events(account, kind),
            "websocket": lambda kind: WebSocket(account, kind),
        }
        for kind, make in makers.items():
            for _ in range(getattr(self.mix, kind)):
                yield make(kind)

    async def _stop_after(self, until: asyncio.Event) -> None:
        await until.wait()
        self.stop()

    def _cut_off(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        self._account.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.report.ended = time.monotonic()
        self._account.check_conditions()
        await self._close_all()

    async def _close_all(self) -> None:
        """Leave no descriptor open: TLS connections would otherwise wait for the other side."""
        opened = self._account.opened
        for connection in opened:
            connection.transport.abort()
        for _ in range(100):
            if not opened:
                return
            await asyncio.sleep(0)  # one turn of the loop
