"""The adapter of gunicorn's own asgi worker, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from gunicorn.asgi import lifespan
from gunicorn.asgi.protocol import ASGIProtocol
from gunicorn.workers import gasgi

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.event_streams import EventStream, EventStreams
from hotrestart_plugins.draining.stagger import StaggeredClose
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn.adapters.asyncio_base import AsyncioAdapter
from hotrestart_plugins.gunicorn.adapters.close_hook import CloseHook, uses_proxy_protocol
from hotrestart_plugins.handover.asyncio_glue import (
    ConnectionAdopter,
    duplicate_listeners,
    offer_all,
    stop_accepting,
)
from hotrestart_plugins.handover.frames import ConnectionState
from hotrestart_plugins.handover.receiver import ConnectionReceiver
from hotrestart_plugins.handover.sender import ConnectionSender
from hotrestart_plugins.lifecycle.probe import Probe

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent

_SERVICE_RESTART = 1012  # close code, RFC 6455 section 7.4.2, IANA's registry
_LEAST = 2.0  # seconds of the last part: gunicorn looks once a second whether it is to end
_POLL_INTERVAL = 0.05  # seconds between two looks at what is still open


class AsgiAdapter(AsyncioAdapter):
    """Closes the worker's servers and makes them anew on duplicates of their listeners.

    Owns the duplicates, which are made ahead: a worker that has no descriptors left when it is told
    to pause could make none.
    """

    def __init__(self, worker: Any, agent: WorkerAgent) -> None:
        """After the worker has set its signals, before its loop runs."""
        super().__init__(agent)
        self._worker = worker
        self._close_hook = CloseHook(worker)
        self._close_hook.attach()  # connections look for the hook when they are made
        self._connections: set[Any] = set()
        gasgi.ASGIProtocol = self._protocol_class()
        self._open = self._busy = self._handed_over = 0
        self._last: DrainStats | None = None
        self._ended: set[Any] = set()  # WebSockets that were told to come back
        self._streams = EventStreams()
        self._ended_streams = 0
        self._endings: set[asyncio.Task[None]] = set()
        worker.asgi = self._streams.wrap(worker.asgi)
        self._can_hand_over = not worker.cfg.is_ssl and not uses_proxy_protocol(worker.cfg)
        self._sender: ConnectionSender | None = None
        self._receiver: ConnectionReceiver | None = None
        self._adopter: ConnectionAdopter | None = None
        self._duplicates: list[socket.socket] = []
        self._paused = False
        self._leaving: asyncio.Task[None] | None = None
        worker.loop.add_signal_handler(signal.SIGTERM, self._terminate)
        self._shut_down, worker._shutdown = worker._shutdown, self._shutdown  # noqa: SLF001
        probe = Probe.of(agent.settings, "localhost")
        if probe is not None:
            self._probe_first(probe)

    def _probe_first(self, probe: Probe) -> None:
        """Ask between the lifespan's startup and the listeners."""

        async def ask() -> None:
            try:
                await probe.run(lambda: gasgi.ASGIProtocol(self._worker))
            except NotReady as error:
                self._agent.fail(error)

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
        self._duplicate()
        if self._agent.receiver_path is not None and self._can_hand_over:
            loop = self._worker.loop
            self._adopter = ConnectionAdopter(
                loop,
                lambda: gasgi.ASGIProtocol(self._worker),
                self._on_adopted,
            )
            self._receiver = ConnectionReceiver.open(
                self._agent.receiver_path, self._adopter.adopt, loop=loop, logger=self._worker.log
            )

    def _duplicate(self) -> None:
        self._duplicates = duplicate_listeners(one.sock for one in self._worker.sockets)

    def _on_adopted(self, connection: Any, state: ConnectionState) -> None:
        if state is ConnectionState.IDLE:
            connection.begin_keep_alive()
        if self._sender is not None:  # this instance was replaced meanwhile, too
            self._worker.loop.call_soon(self._sender.add, connection)

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self._worker.loop
        return loop

    def _stays(self) -> bool:
        return self._leaving is None and bool(self._worker.alive)

    async def _pause(self) -> None:
        if self._paused:
            return
        if not self._duplicates:
            self._duplicate()
        self._paused = True
        target = self._agent.handover_target if self._can_hand_over else None
        self._close_hook.begin(close=target is None)
        worker = self._worker
        await stop_accepting(worker.servers, [one.sock.fileno() for one in worker.sockets])
        worker.servers.clear()
        for one, duplicate in zip(worker.sockets, self._duplicates, strict=True):
            one.sock = duplicate  # gunicorn closes it
        self._duplicates = []
        self._open, self._busy, self._handed_over = len(self._connections), self._busy_now(), 0
        drain.set()
        if target is not None:
            self._sender = ConnectionSender(
                target,
                AsgiConnectionAdapter(),
                loop=worker.loop,
                on_failure=self._close_hook.announce,
                logger=worker.log,
            )
            if not await offer_all(self._sender, self._connections):
                self._close_hook.announce()

    async def _resume(self) -> None:
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
        if self._sender is not None:
            self._sender.close()
            self._handed_over, self._sender = len(self._sender.handed_over), None
        self._close_hook.end(detach=False)
        drain.clear()
        self._paused = False
        with contextlib.suppress(OSError):  # then it tries again when it is told to pause
            self._duplicate()

    def _busy_now(self) -> int:
        return sum(not one.waits for one in self._connections)

    def _websockets(self) -> int:
        return sum(one._websocket is not None for one in self._connections)  # noqa: SLF001

    def stats(self) -> DrainStats:
        """The account; of a worker that leaves, from before it closed what was left."""
        return self._last or self._account()

    def _account(self) -> DrainStats:
        """By the number of connections and of requests: what was under way, and what came."""
        left, busy, websockets = len(self._connections), self._busy_now(), self._websockets()
        handed_over = (
            len(self._sender.handed_over) if self._sender is not None else self._handed_over
        )
        answers = max(0, self._busy + self._close_hook.requests - busy)
        stats = DrainStats.by_numbers(self._open, left, answers, handed_over)
        if not self._worker.alive:
            stats.aborted_requests = busy - websockets
            stats.aborted_websockets = websockets - len(self._ended & self._connections)
            stats.websockets, stats.streams = len(self._ended), self._ended_streams
            stats.finished = max(0, stats.finished - stats.websockets - stats.streams)
            stats.aborted_idle = left - busy
        return stats

    def _protocol_class(self) -> type[ASGIProtocol]:
        """The protocol of gunicorn, which itself only counts connections, and tells nobody."""
        adapter = self

        class Connection(ASGIProtocol):  # type: ignore[misc]
            """A connection that is known while it is open, and moved while it waits."""

            _h2c_buffer: bytes | None
            """What was read while it may still become HTTP/2; then None."""

            def __init__(self, worker: Any) -> None:
                super().__init__(worker)
                self.untouched = True
                """Whether its parser has been given nothing since the last message."""

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                """As gunicorn's."""
                adapter._connections.add(self)
                super().connection_made(transport)

            def connection_lost(self, exc: Exception | None) -> None:
                """As gunicorn's."""
                adapter._connections.discard(self)
                super().connection_lost(exc)

            def _feed_callback_parser(self, data: bytes) -> bool:
                self.untouched = False
                return bool(super()._feed_callback_parser(data))

            def _resume_reading(self) -> None:
                # Comes between two messages, before what was read ahead is fed again. It comes
                # within a message too, but nobody asks then.
                self.untouched = True
                super()._resume_reading()

            def _arm_keepalive_timer(self) -> None:
                super()._arm_keepalive_timer()
                if adapter._sender is not None:
                    # It does not wait yet: it is about to.
                    adapter._worker.loop.call_soon(adapter._sender.on_answer, self)

            def _h2c_undecided_timeout(self) -> None:
                super()._h2c_undecided_timeout()
                if adapter._sender is not None:  # from now on it may be moved
                    adapter._worker.loop.call_soon(adapter._sender.add, self)

            @property
            def waits(self) -> bool:
                """Whether it has no part of a request; it may be HTTP/2 that begins, too."""
                return bool(self._awaiting_request or self._h2c_buffer == b"")

            def begin_keep_alive(self) -> None:
                """Its last answer was given elsewhere; the next request may have come."""
                buffered = self._h2c_buffer
                if buffered is not None:  # it is not HTTP/2 that begins
                    self._h2c_cancel_timer()
                    self._h2c_buffer = None
                    self._start_http1(buffered)
                if not self._request_ready.is_set():
                    super()._arm_keepalive_timer()

        return Connection

    # -- the end -------------------------------------------------------------------------------

    async def _shutdown(self) -> None:
        """As gunicorn's, to which a worker comes that is used up or has lost its master, too."""
        self._close_receiver()
        for one in self._duplicates:
            one.close()
        if self._adopter is not None:  # gunicorn waits for connections, which these have yet to be
            await self._adopter.settled()
        await self._shut_down()

    def _close_receiver(self) -> None:
        """What came now would be cut off: it is better off with the old instance."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

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
        patience = self._agent.seconds_left
        self._close_receiver()
        await self._pause()
        for listener in worker.sockets:  # let no client wait for this worker
            listener.close()
        # gunicorn keeps a number of connections, and nothing that could be awaited.
        half = began + patience / 2
        while worker.alive and worker.nr_conns and worker.loop.time() < half:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_INTERVAL)
        spent = int(worker.loop.time() - began)
        worker.cfg.set("graceful_timeout", max(0, patience - spent))
        worker.alive = False
        await self._end_long(began + patience, patience)

    async def _end_long(self, deadline: float, patience: float) -> NoReturn:
        """End what lasts, one after another; go on until gunicorn cancels what is left."""
        staggered = StaggeredClose(self._long, self._end)
        while True:
            staggered.step(deadline - self._worker.loop.time(), patience, _LEAST)
            try:
                await asyncio.sleep(_POLL_INTERVAL)
            finally:  # when gunicorn cancels it, too: just before it closes what is left
                self._last = self._account()

    def _long(self) -> list[Any]:
        websockets = [one for one in self._connections if one._websocket is not None]  # noqa: SLF001
        return [*websockets, *self._streams.active]

    def _end(self, one: Any) -> None:
        # In tasks, since a client that does not read holds its own up, and nobody else's.
        if isinstance(one, EventStream):
            ending = self._end_stream(one)
        else:
            self._ended.add(one)
            ending = self._end_websocket(one)
        task = self._worker.loop.create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _end_websocket(self, connection: Any) -> None:
        websocket = connection._websocket  # noqa: SLF001
        if websocket is not None and websocket.accepted and not websocket.closed:
            with contextlib.suppress(OSError, RuntimeError):  # its client has gone
                await websocket._send_close(_SERVICE_RESTART)  # noqa: SLF001

    async def _end_stream(self, stream: EventStream) -> None:
        """Of HTTP/1 close the connection: nobody would answer on it until the app has returned."""
        with contextlib.suppress(OSError, RuntimeError):
            await stream.end()
        if stream.ended:
            self._ended_streams += 1
            connection = getattr(getattr(stream.receive, "__self__", None), "protocol", None)
            if connection is not None:
                connection._close_transport()  # noqa: SLF001  # gunicorn then tells the app


class AsgiConnectionAdapter:
    """How connections are held that wait for a request, and what they are then."""

    def state(self, connection: Any) -> ConnectionState | None:
        """Nothing read, nothing to be written, no call of the app's left, no other protocol."""
        transport = connection.transport
        if (
            transport is None
            or transport.is_closing()
            or transport.get_write_buffer_size()
            or connection._h2c_buffer is not None  # noqa: SLF001
            or connection.reader is not None
            or not connection._awaiting_request  # noqa: SLF001
            or connection._finishing_calls  # noqa: SLF001
            or connection._reading_paused  # noqa: SLF001
            or not connection.untouched
        ):
            return None
        # Where its time runs, it has answered: here, or elsewhere.
        asked = connection.req_count > 1 or connection._keepalive_handle is not None  # noqa: SLF001
        return ConnectionState.IDLE if asked else ConnectionState.FRESH

    def on_response(self, connection: Any, answered: Callable[[], None]) -> None:
        """Each says by itself when it begins to wait."""

    def fileno(self, connection: Any) -> int:
        """Of its socket."""
        return int(connection.transport.get_extra_info("socket").fileno())

    def suspend(self, connection: Any, _state: ConnectionState) -> None:
        """Read nothing, and let no time pass."""
        connection.transport.pause_reading()
        connection._cancel_keepalive_timer()  # noqa: SLF001

    def resume(self, connection: Any, state: ConnectionState) -> None:
        """Wait for its request again."""
        connection.transport.resume_reading()
        if state is ConnectionState.IDLE:
            connection.begin_keep_alive()

    def discard(self, connection: Any) -> None:
        """It is another's: close the copy, and let its task end."""
        connection.transport.abort()
        connection._closed = True  # noqa: SLF001
        connection._request_ready.set()  # noqa: SLF001

    def is_closing(self, connection: Any) -> bool:
        """Whether it has been closed meanwhile."""
        return bool(connection.transport.is_closing())
