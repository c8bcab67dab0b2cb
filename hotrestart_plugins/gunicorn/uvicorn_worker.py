"""The gate of uvicorn's worker for gunicorn, from the uvicorn-worker package or uvicorn itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Generator
from typing import Any

import uvicorn

from hotrestart_plugins.draining import DrainingServer
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn.channel import Report
from hotrestart_plugins.gunicorn.workers import WorkerSide, replace_where_defined
from hotrestart_plugins.probe import Probe
from hotrestart_plugins.tally import Tally


class UvicornGate:
    """Has the worker use a `DrainingServer`, and tells that one when to pause."""

    def __init__(self, worker: Any, side: WorkerSide) -> None:
        self._worker = worker
        self._side = side
        self._server: DrainingServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wanted = False
        self._changing: asyncio.Task[None] | None = None
        if worker.config.timeout_graceful_shutdown is None:
            worker.config.timeout_graceful_shutdown = worker.cfg.graceful_timeout
        replace_where_defined(type(worker), "Server", uvicorn.Server, self._server_class())

    def _server_class(self) -> type[DrainingServer]:
        gate = self

        class WorkerServer(DrainingServer):
            """The server of this worker."""

            def __init__(self, config: uvicorn.Config) -> None:
                super().__init__(config)
                self.drain_timeout = gate._side.settings.drain_timeout
                self.probe = Probe.of(gate._side.settings, "localhost")
                gate._server = self
                gate._loop = asyncio.get_running_loop()

            async def serve(self, sockets: list[Any] | None = None) -> None:
                """As uvicorn's. uvloop closes a descriptor twice that is not a plain socket's."""
                await super().serve([getattr(one, "sock", one) for one in sockets or ()])

            async def startup(self, sockets: list[Any] | None = None) -> None:
                """As a `DrainingServer`'s; then take in what the old instance hands over."""
                try:
                    await super().startup(sockets)
                except NotReady as error:
                    gate._side.fail(error)
                if self.started and gate._side.inlet is not None:
                    self.take_in(gate._side.inlet)

            async def on_tick(self, counter: int) -> bool:
                """As uvicorn's; and a worker whose master was killed goes, too."""
                if os.getppid() != gate._worker.ppid:
                    self.should_exit = True
                return await super().on_tick(counter)

            @contextlib.contextmanager
            def capture_signals(self) -> Generator[None, None, None]:
                """As uvicorn's, but the worker ends by itself: gunicorn's worker_exit runs."""
                with super().capture_signals():
                    yield
                    if self.started:
                        self._captured_signals.clear()

        return WorkerServer

    def ready(self) -> None:
        """Nothing to do: uvicorn's worker passes gunicorn's backlog on."""

    def pause(self) -> None:
        """From a signal handler: what follows is the loop's."""
        self._want(paused=True)

    def resume(self) -> None:
        """The same."""
        self._want(paused=False)

    def tally(self) -> Tally:
        """The server's."""
        return self._server.tally if self._server is not None else Tally()

    def _want(self, *, paused: bool) -> None:
        self._wanted = paused
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._change)

    def _change(self) -> None:
        if self._changing is None or self._changing.done():
            self._changing = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        server = self._server
        while server is not None and server.started and self._wanted != server.paused:
            if self._wanted:
                await server.pause(self._side.successor)
                self._side.done(Report.PAUSED)
            else:
                await server.resume()
                self._side.done(Report.RESUMED)
