"""The gate of gunicorn's own asgi worker, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING, Any

from gunicorn.asgi import lifespan
from gunicorn.asgi.protocol import ASGIProtocol
from gunicorn.workers import gasgi

from hotrestart_plugins.app import drain
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn.blocking import Closing
from hotrestart_plugins.gunicorn.channel import Report
from hotrestart_plugins.probe import Probe
from hotrestart_plugins.tally import Tally

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.workers import WorkerSide

_LOOK = 0.05  # seconds between two looks at what is still open


class AsgiGate:
    """Closes the worker's servers and makes them anew on duplicates of their listeners."""

    def __init__(self, worker: Any, side: WorkerSide) -> None:
        """After the worker has set its signals, before its loop runs."""
        self._worker = worker
        self._side = side
        self._closing = Closing(worker)
        self._closing.attach()  # connections look for the hook when they are made
        self._connections: set[Any] = set()
        gasgi.ASGIProtocol = _known_to(self._connections)
        self._open = self._busy = 0
        self._last: Tally | None = None
        self._paused = False
        self._wanted = False
        self._changing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        worker.loop.add_signal_handler(signal.SIGTERM, self._terminate)
        probe = Probe.of(side.settings, "localhost")
        if probe is not None:
            self._probe_first(probe)

    def _probe_first(self, probe: Probe) -> None:
        """Ask between the lifespan's startup and the listeners."""

        async def ask() -> None:
            try:
                await probe.run(lambda: gasgi.ASGIProtocol(self._worker))
            except NotReady as error:
                self._side.fail(error)

        if self._worker.cfg.asgi_lifespan == "off":
            serve = self._worker._serve  # noqa: SLF001

            async def ask_and_serve() -> None:
                await ask()
                await serve()

            self._worker._serve = ask_and_serve  # noqa: SLF001
            return

        class Lifespan(lifespan.LifespanManager):  # type: ignore[misc]
            """As gunicorn's, which looks the name up when it serves."""

            async def startup(self) -> None:
                """And the probe, also for an app that has no lifespan."""
                try:
                    await super().startup()
                except lifespan.LifespanStartupFailed:
                    raise
                except Exception:
                    await ask()
                    raise
                try:
                    await ask()
                except SystemExit:
                    await self.shutdown()
                    raise

        lifespan.LifespanManager = Lifespan

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
                self._side.done(Report.PAUSED)
            else:
                await self._take_up()
                self._side.done(Report.RESUMED)

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
        self._open, self._busy = len(self._connections), self._busy_now()
        drain.set()

    async def _take_up(self) -> None:
        worker = self._worker
        context = worker._get_ssl_context()  # noqa: SLF001
        for one in worker.sockets:
            # As in ASGIWorker._serve.
            worker.servers.append(
                await worker.loop.create_server(
                    lambda: gasgi.ASGIProtocol(worker),
                    sock=one.sock,
                    ssl=context,
                    backlog=worker.cfg.backlog,
                )
            )
        self._closing.end(detach=False)
        drain.clear()
        self._paused = False

    def _busy_now(self) -> int:
        return sum(not one._awaiting_request for one in self._connections)  # noqa: SLF001

    def _websockets(self) -> int:
        return sum(one._websocket is not None for one in self._connections)  # noqa: SLF001

    def tally(self) -> Tally:
        """The account; of a worker that leaves, from before it closed what was left."""
        return self._last or self._account()

    def _account(self) -> Tally:
        """By the number of connections and of requests: what was under way, and what came."""
        left, busy, websockets = len(self._connections), self._busy_now(), self._websockets()
        answers = max(0, self._busy + self._closing.requests - busy)
        ended = max(0, self._open - left)
        finished = min(answers, ended)
        return Tally(
            requests=answers,
            finished=finished,
            idle=ended - finished,
            cut_requests=busy - websockets,
            cut_websockets=websockets,
            cut_idle=left - busy,
        )

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
        patience = self._side.seconds_left
        await self._let_go()
        # gunicorn keeps a number of connections, and nothing that could be awaited.
        half = began + patience / 2
        while worker.alive and worker.nr_conns and worker.loop.time() < half:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)
        spent = int(worker.loop.time() - began)
        worker.cfg.set("graceful_timeout", max(0, patience - spent))
        worker.alive = False
        while True:  # until gunicorn, at its deadline, cancels whatever is left
            self._last = self._account()
            await asyncio.sleep(_LOOK)


def _known_to(connections: set[Any]) -> type[ASGIProtocol]:
    """The protocol of gunicorn, which itself only counts connections."""

    class Connection(ASGIProtocol):  # type: ignore[misc]
        """A connection, in the set while it is open."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            """As gunicorn's."""
            connections.add(self)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            """As gunicorn's."""
            connections.discard(self)
            super().connection_lost(exc)

    return Connection
