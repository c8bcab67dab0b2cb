"""The adapter of uvicorn's worker for gunicorn: the uvicorn-worker package's, or uvicorn's."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Generator
from typing import Any

import uvicorn

from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn.adapters.asyncio_base import AsyncioAdapter
from hotrestart_plugins.gunicorn.adapters.base import replace_where_defined
from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.uvicorn.draining_server import DrainingServer


class UvicornWorkerAdapter(AsyncioAdapter):
    """Has the worker use a `DrainingServer`, and tells that one when to pause."""

    def __init__(self, worker: Any, agent: WorkerAgent) -> None:
        super().__init__(agent)
        self._worker = worker
        self._server: DrainingServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        if worker.config.timeout_graceful_shutdown is None:
            worker.config.timeout_graceful_shutdown = worker.cfg.graceful_timeout
        replace_where_defined(type(worker), "Server", uvicorn.Server, self._server_class())

    def _server_class(self) -> type[DrainingServer]:
        adapter = self

        class WorkerServer(DrainingServer):
            """The server of this worker."""

            def __init__(self, config: uvicorn.Config) -> None:
                super().__init__(config)
                self.drain_timeout = adapter._agent.settings.drain_timeout
                self.probe = Probe.of(adapter._agent.settings, "localhost")
                adapter._server = self
                adapter._loop = asyncio.get_running_loop()

            async def serve(self, sockets: list[Any] | None = None) -> None:
                """As uvicorn's. uvloop closes a descriptor twice that is not a plain socket's."""
                await super().serve([getattr(one, "sock", one) for one in sockets or ()])

            async def startup(self, sockets: list[Any] | None = None) -> None:
                """As a `DrainingServer`'s; then take in what the old instance hands over."""
                try:
                    await super().startup(sockets)
                except NotReady as error:
                    adapter._agent.fail(error)
                if self.started and adapter._agent.receiver_path is not None:
                    self.receive_connections(adapter._agent.receiver_path)

            async def on_tick(self, counter: int) -> bool:
                """As uvicorn's; and a worker whose master was killed goes, too."""
                if os.getppid() != adapter._worker.ppid:
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

    def stats(self) -> DrainStats:
        """The server's."""
        return self._server.stats if self._server is not None else DrainStats()

    def _event_loop(self) -> asyncio.AbstractEventLoop | None:
        return self._loop

    def _stays(self) -> bool:
        return self._server is not None and not self._server.should_exit

    async def _pause(self) -> None:
        if self._server is not None:
            await self._server.pause(self._agent.handover_target)

    async def _resume(self) -> None:
        if self._server is not None:
            await self._server.resume()
