"""A worker process of `--workers N`, and its link with the supervisor.

The link is a pair of SOCK_SEQPACKET sockets for each worker. Down it go ``pause``, with the end of
the drain and the successor behind it, and ``resume``; up it come ``ready``, ``paused``, and
``drained`` with its statistics behind it; what is behind a word is JSON. Its end tells either side
that the other is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.supervisors import multiprocess

from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn.draining_server import DrainingServer
from hotrestart_plugins.uvicorn.takeover import Takeover

READY, PAUSE, PAUSED, RESUME, DRAINED = b"ready", b"pause", b"paused", b"resume", b"drained"
MAX_MESSAGE = 4096  # bytes; no message is longer

logger = logging.getLogger("uvicorn.error")


class WorkerServer(DrainingServer):
    """The server in a worker process. Owns its end of the link."""

    def __init__(
        self,
        config: uvicorn.Config,
        link: socket.socket,
        settings: Settings,
        target: HandoverTarget | None,
    ) -> None:
        super().__init__(config)
        self._handover_target = target
        self.drain_timeout = settings.drain_timeout
        self.probe = Probe.of(settings, f"{config.host}:{config.port}")
        self._link = link
        self._following: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's. What a worker cannot serve for is one line, and the exit status."""
        try:
            await super().serve(sockets)
        except NotReady as error:
            logger.error("Worker [%d] failed to start: %s", os.getpid(), error)  # noqa: TRY400
            sys.exit(error.status)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then tell the supervisor, and listen to it."""
        await super().startup(sockets)
        if self.started:
            self._link.setblocking(False)
            asyncio.get_running_loop().add_reader(self._link.fileno(), self._on_command)
            if self._handover_target is not None:
                self.receive(self._handover_target)
            self._report(READY)

    def _report(self, word: bytes) -> None:
        with contextlib.suppress(OSError):
            self._link.send(word)

    def _on_command(self) -> None:
        """Obey the last word: the others are out of date if this loop was held up meanwhile."""
        message = None
        try:
            while message != b"":
                message = self._link.recv(MAX_MESSAGE)
        except BlockingIOError:
            pass
        except OSError:
            message = b""
        loop = asyncio.get_running_loop()
        if message:
            self._following = loop.create_task(self._follow(message, self._following))
        elif message is not None:
            # The supervisor is gone. An orphan would go on serving old code beside the new one.
            loop.remove_reader(self._link.fileno())
            logger.warning("The supervisor has ended; worker [%d] drains and leaves", os.getpid())
            self.should_exit = True

    async def _follow(self, message: bytes, before: asyncio.Task[None] | None) -> None:
        """Pause or resume, behind what was under way; only a drain is cut short."""
        if before is not None:
            await asyncio.wait({before})
        if self._draining is not None:
            self._draining.cancel()
        word, _, rest = message.partition(b" ")
        try:
            if word == RESUME:
                await self.resume()
                return
            deadline, *target = json.loads(rest)
            await self.pause(_target(*target) if target else None)
        except Exception:
            logger.exception("Cannot %s: worker [%d] drains and leaves", word.decode(), os.getpid())
            self.should_exit = True
            return
        self._report(PAUSED)
        self._draining = asyncio.get_running_loop().create_task(self._drain_until(deadline))

    async def _drain_until(self, deadline: float) -> None:
        await self.drain(max(0.0, deadline - time.monotonic()))
        self._report(DRAINED + b" " + json.dumps(asdict(self.stats)).encode())


def _target(directory: str, takeover_id: int, side: str) -> HandoverTarget:
    return HandoverTarget(Path(directory), takeover_id, Side(side))


class WorkerProcess(multiprocess.Process):
    """uvicorn's handle of a worker process, in the supervisor; in the worker, its entry."""

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        *,
        settings: Settings,
        takeover: Takeover,
        on_started: Callable[[WorkerProcess], None],
    ) -> None:
        """`on_started` is called in the supervisor when the process was started.

        While the instance takes over, its workers take the parent's connections in.
        """
        super().__init__(config, sockets)
        self.link, self._far_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._settings = settings
        self._handover_target = takeover.handover_target
        self._on_started: Callable[[WorkerProcess], None] | None = on_started

    def __getstate__(self) -> dict[str, Any]:
        """What the worker process gets: its own end of the link, not the supervisor's."""
        state = dict(self.__dict__)
        state["link"] = state["_on_started"] = None
        return state

    def start(self) -> None:
        """As uvicorn's; then let go of the worker's end of the link, so that its end is heard."""
        super().start()
        self._far_link.close()
        self.link.setblocking(False)
        if self._on_started is not None:
            self._on_started(self)

    @property
    def server(self) -> uvicorn.Server:
        """In the worker: its server."""
        if self._server is None:
            self._server = WorkerServer(
                self.config, self._far_link, self._settings, self._handover_target
            )
        return self._server

    def send(self, word: bytes) -> None:
        """Send a word down the link; a worker that is gone hears nothing."""
        with contextlib.suppress(OSError):
            self.link.send(word)
