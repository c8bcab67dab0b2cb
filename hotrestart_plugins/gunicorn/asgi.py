"""The gate of gunicorn's own asgi worker, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

from gunicorn.asgi.protocol import ASGIProtocol

from hotrestart_plugins.app import drain
from hotrestart_plugins.gunicorn.blocking import Closing
from hotrestart_plugins.gunicorn.channel import Report

_LOOK = 0.05  # seconds between two looks at what is still open


class AsgiGate:
    """Closes the worker's servers and makes them anew on duplicates of their listeners."""

    def __init__(self, worker: Any, done: Callable[[Report], None]) -> None:
        """After the worker has set its signals, before its loop runs."""
        self._worker = worker
        self._done = done
        self._closing = Closing(worker)
        self._closing.attach()  # connections look for the hook when they are made
        self._paused = False
        self._wanted = False
        self._changing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        worker.loop.add_signal_handler(signal.SIGTERM, self._terminate)

    def ready(self) -> None:
        """`create_server` has cut the backlog that all instances share to its own default."""
        for one in self._worker.sockets:
            one.sock.listen(self._worker.cfg.backlog)

    def pause(self) -> None:
        """From a signal handler: what follows is the loop's."""
        self._want(paused=True)

    def resume(self) -> None:
        """The same."""
        self._want(paused=False)

    def _want(self, *, paused: bool) -> None:
        self._wanted = paused
        self._worker.loop.call_soon_threadsafe(self._change)

    def _change(self) -> None:
        if self._changing is None or self._changing.done():
            self._changing = self._worker.loop.create_task(self._follow())

    async def _follow(self) -> None:
        while self._wanted != self._paused:
            if self._wanted:
                await self._let_go()
                self._done(Report.PAUSED)
            else:
                await self._take_up()
                self._done(Report.RESUMED)

    async def _let_go(self) -> None:
        if self._paused:
            return
        self._paused = True
        self._closing.begin()
        worker = self._worker
        kept = [socket.socket(fileno=one.sock.dup().detach()) for one in worker.sockets]
        if isinstance(worker.loop, asyncio.SelectorEventLoop):
            # Server.close() loses a connection whose accept is done and whose transport is not
            # yet made (cpython#109564): stop accepting first, and let what is under way finish.
            for one in worker.sockets:
                worker.loop.remove_reader(one.sock.fileno())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for server in worker.servers:
            server.close()
        worker.servers.clear()
        for one, duplicate in zip(worker.sockets, kept, strict=True):
            one.sock = duplicate
        drain.set()

    async def _take_up(self) -> None:
        worker = self._worker
        context = worker._get_ssl_context()  # noqa: SLF001
        for one in worker.sockets:
            # As in ASGIWorker._serve.
            worker.servers.append(
                await worker.loop.create_server(
                    lambda: ASGIProtocol(worker),
                    sock=one.sock,
                    ssl=context,
                    backlog=worker.cfg.backlog,
                )
            )
        self._closing.end(detach=False)
        drain.clear()
        self._paused = False

    # -- SIGTERM -------------------------------------------------------------------------------

    def _terminate(self) -> None:
        if self._leaving is None:
            self._leaving = self._worker.loop.create_task(self._leave())

    async def _leave(self) -> None:
        """Stop accepting first, and tell connections that they close before they are closed.

        gunicorn's own handler only clears `alive`, and a response whose headers promised
        keep-alive is then followed by a close. HTTP/2 and WebSockets go on until it is cleared,
        so that comes after half of the time at the latest.
        """
        worker = self._worker
        began = worker.loop.time()
        patience = worker.cfg.graceful_timeout
        await self._let_go()
        # gunicorn keeps a number of connections, and nothing that could be awaited.
        half = began + patience / 2
        while worker.alive and worker.nr_conns and worker.loop.time() < half:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)
        spent = int(worker.loop.time() - began)
        worker.cfg.set("graceful_timeout", max(0, patience - spent))
        worker.alive = False
