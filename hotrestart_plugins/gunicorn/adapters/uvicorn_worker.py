"""The adapter of uvicorn's worker for gunicorn: the uvicorn-worker package's, or uvicorn's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from typing import Any

import uvicorn

from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn._compat.uvicorn_worker import (
    RawUvicornWorker,
    UvicornWorker,
    plain_socket,
)
from hotrestart_plugins.gunicorn.adapters.asyncio_base import AsyncioAdapter
from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.uvicorn.draining_server import DrainingServer


class UvicornWorkerAdapter(AsyncioAdapter):
    """Has the worker use a `DrainingServer`, and tells that one when to pause."""

    def __init__(self, worker: RawUvicornWorker, agent: WorkerAgent) -> None:
        super().__init__(agent)
        self._worker = UvicornWorker(worker)
        self._server: DrainingServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        config = self._worker.uvicorn_config
        if config.timeout_graceful_shutdown is None:
            config.timeout_graceful_shutdown = worker.cfg.graceful_timeout
        self._worker.use_server_class(self._server_class())

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
                """Serve on plain sockets: of others uvloop closes the descriptor twice."""
                await super().serve([plain_socket(sock) for sock in sockets or ()])

            async def startup(self, sockets: list[Any] | None = None) -> None:
                """Start, and receive the connections that the old instance hands over."""
                try:
                    await super().startup(sockets)
                except NotReady as error:
                    adapter._agent.fail(error)
                if self.started and adapter._agent.own_target is not None:
                    self.receive(adapter._agent.own_target)

            async def on_tick(self, counter: int) -> bool:
                """End a worker whose master was killed, too."""
                if adapter._agent.has_lost_master:
                    self.should_exit = True
                return await super().on_tick(counter)

            @contextlib.contextmanager
            def capture_signals(self) -> Generator[None, None, None]:
                """Let the worker end by itself, not by a signal: gunicorn's worker_exit runs."""
                with super().capture_signals():
                    yield
                    if self.started:
                        self.forget_signals()

        return WorkerServer

    def ready(self) -> None:
        """Do nothing: uvicorn's worker passes gunicorn's backlog on."""

    def stats(self) -> DrainStats:
        """What the server has counted."""
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
