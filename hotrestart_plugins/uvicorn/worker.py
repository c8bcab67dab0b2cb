"""A worker process of `--workers N`, and its link with the supervisor.

The link is a pair of SOCK_SEQPACKET sockets for each worker. The supervisor sends ``pause``, with
the end of the drain and the instance that gets the connections, ``resume``, and ``stand-down``: do
not accept again. The worker sends ``ready``, ``paused``, and ``drained`` with its statistics. What
follows a word is JSON. The end of the link tells either side that the other one has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn

from hotrestart_plugins.core import events
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn._compat import server as _compat
from hotrestart_plugins.uvicorn._compat.supervisor import Process
from hotrestart_plugins.uvicorn.draining_server import DrainingServer
from hotrestart_plugins.uvicorn.takeover import Takeover

READY, PAUSED, DRAINED = b"ready", b"paused", b"drained"
PAUSE, RESUME, STAND_DOWN = b"pause", b"resume", b"stand-down"
MAX_MESSAGE = 4096  # bytes; no message is longer


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
        """Serve until told to stop. Raises SystemExit, after one line, if the probe fails."""
        try:
            await super().serve(sockets)
        except NotReady as error:
            self.journal.emit(events.WORKER_START_FAILED, pid=os.getpid(), error=error)
            sys.exit(error.status)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app and the listeners; then tell the supervisor, and listen to it."""
        await super().startup(sockets)
        if _compat.has_started(self):
            self._link.setblocking(False)
            asyncio.get_running_loop().add_reader(self._link.fileno(), self._on_command)
            if self._handover_target is not None:
                self.receive(self._handover_target)
            self._report(READY)

    def _report(self, word: bytes) -> None:
        with contextlib.suppress(OSError):
            self._link.send(word)

    def _on_command(self) -> None:
        """Obey what has come. If this loop was held up meanwhile, the older words are outdated."""
        messages: list[bytes] = []
        try:
            while not messages or messages[-1]:
                messages.append(self._link.recv(MAX_MESSAGE))
        except BlockingIOError:
            pass
        except OSError:
            messages.append(b"")
        loop = asyncio.get_running_loop()
        if messages and not messages[-1]:
            # The supervisor is gone. An orphan would go on serving old code beside the new one.
            loop.remove_reader(self._link.fileno())
            self.journal.emit(events.SUPERVISOR_ENDED, pid=os.getpid())
            self.should_exit = True
            return
        last = max((at for at, message in enumerate(messages) if message != STAND_DOWN), default=0)
        for message in messages[last:]:
            self._following = loop.create_task(self._follow(message, self._following))

    async def _follow(self, message: bytes, before: asyncio.Task[None] | None) -> None:
        """Obey one message, after the one before it; only a drain is cut short."""
        if before is not None:
            await asyncio.wait({before})
        word, _, rest = message.partition(b" ")
        if word == STAND_DOWN:
            self.close_listeners()
            return
        if self._draining is not None:
            self._draining.cancel()
        try:
            if word == RESUME:
                await self.resume()
                return
            deadline, *target = json.loads(rest)
            await self.pause(_target(*target) if target else None)
        except Exception as error:  # noqa: BLE001 (said; and this worker leaves)
            self.journal.emit(
                events.COMMAND_FAILED, traceback=error, command=word.decode(), pid=os.getpid()
            )
            self.should_exit = True
            return
        self._report(PAUSED)
        self._draining = asyncio.get_running_loop().create_task(self._drain_until(deadline))

    async def _drain_until(self, deadline: float) -> None:
        if not await self.drain(max(0.0, deadline - time.monotonic())):
            self.abort()
        self._report(DRAINED + b" " + json.dumps(asdict(self.stats)).encode())


def _target(directory: str, takeover_id: int, side: str) -> HandoverTarget:
    return HandoverTarget(Path(directory), takeover_id, Side(side))


class WorkerProcess(Process):
    """uvicorn's handle of a worker process, in the supervisor; in the worker, its entry."""

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        *,
        settings: Settings,
        takeover: Takeover,
        spawning: threading.Lock,
        on_started: Callable[[WorkerProcess], None],
    ) -> None:
        """`on_started` is called in the supervisor after the process was started.

        `spawning` is held while the process is started, and so gets the listeners. While the
        instance takes over, its workers receive the connections of the old one.
        """
        super().__init__(config, sockets)
        self.link, self._far_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._made: WorkerServer | None = None
        self._settings = settings
        self._handover_target = takeover.handover_target
        self._spawning: threading.Lock | None = spawning
        self._on_started: Callable[[WorkerProcess], None] | None = on_started

    def __getstate__(self) -> dict[str, Any]:
        """Return what the worker process gets: its end of the link, not the supervisor's."""
        state = dict(self.__dict__)
        state["link"] = state["_spawning"] = state["_on_started"] = None
        return state

    def start(self) -> None:
        """Start the process; then close the worker's end of the link, so that its end is heard."""
        with self._spawning or contextlib.nullcontext():
            super().start()
        self._far_link.close()
        self.link.setblocking(False)
        if self._on_started is not None:
            self._on_started(self)

    @property
    def server(self) -> uvicorn.Server:
        """The server, in the worker process."""
        if self._made is None:
            self._made = WorkerServer(
                self.config, self._far_link, self._settings, self._handover_target
            )
        return self._made

    def send(self, word: bytes) -> None:
        """Send a word to the worker; one that has ended hears nothing."""
        with contextlib.suppress(OSError):
            self.link.send(word)
