"""gunicorn's asgi worker, and the connections that it serves, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from gunicorn.asgi import lifespan
from gunicorn.asgi.protocol import ASGIProtocol
from gunicorn.workers import gasgi

from hotrestart_plugins.draining.event_streams import App, EventStream
from hotrestart_plugins.gunicorn._compat.workers import GunicornWorker, Worker
from hotrestart_plugins.handover.frames import ConnectionState


class RawAsgiWorker(GunicornWorker, Protocol):
    """What is used of gunicorn's own object."""

    loop: asyncio.AbstractEventLoop
    servers: list[asyncio.AbstractServer]
    nr_conns: int
    asgi: App
    _shutdown: Callable[[], Awaitable[None]]
    _serve: Callable[[], Awaitable[None]]

    def _get_ssl_context(self) -> Any: ...


class AsgiWorker(Worker[RawAsgiWorker]):
    """An asgi worker, with a plain name for everything that is used of it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Its event loop."""
        return self.raw.loop

    @property
    def servers(self) -> list[asyncio.AbstractServer]:
        """Its servers, one for each listener."""
        return self.raw.servers

    @property
    def open_connections(self) -> int:
        """The number of connections that are open."""
        return self.raw.nr_conns

    @property
    def sockets(self) -> list[socket.socket]:
        """The plain sockets of its listeners. They stay gunicorn's."""
        return [listener.sock for listener in self.listeners]

    def replace_sockets(self, sockets: list[socket.socket]) -> None:
        """Give its listeners other sockets, which gunicorn closes; in the same order."""
        for listener, sock in zip(self.listeners, sockets, strict=True):
            listener.sock = sock

    def wrap_app(self, wrap: Callable[[App], App]) -> None:
        """Have it serve what `wrap` makes of its app."""
        self.raw.asgi = wrap(self.raw.asgi)

    def observe_connections(self, observer: ConnectionObserver) -> None:
        """Have it make connections that tell `observer` what happens to them."""
        AsgiConnection.observer = observer
        gasgi.ASGIProtocol = AsgiConnection

    def make_connection(self) -> asyncio.Protocol:
        """A connection, without a transport yet."""
        connection: asyncio.Protocol = gasgi.ASGIProtocol(self.raw)
        return connection

    async def accept_again(self) -> None:
        """Make a server for each listener. Does what gunicorn does when it begins to serve."""
        context = self.raw._get_ssl_context()  # noqa: SLF001
        for sock in self.sockets:
            server = await self.loop.create_server(
                self.make_connection, sock=sock, ssl=context, backlog=self.cfg.backlog
            )
            self.servers.append(server)

    def around_shutdown(
        self, around: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
    ) -> None:
        """Call `around` with gunicorn's own shutdown when the worker's loop has ended."""
        shutdown = self.raw._shutdown  # noqa: SLF001

        async def shut_down() -> None:
            await around(shutdown)

        self.raw._shutdown = shut_down  # noqa: SLF001

    def before_serving(self, ask: Callable[[], Awaitable[None]]) -> None:
        """Await `ask` between the lifespan's startup and the first connection.

        If that raises SystemExit, the lifespan is shut down, and the worker ends.
        """
        if self.cfg.asgi_lifespan == "off":
            serve = self.raw._serve  # noqa: SLF001

            async def ask_and_serve() -> None:
                await ask()
                await serve()

            self.raw._serve = ask_and_serve  # noqa: SLF001
            return

        class Lifespan(lifespan.LifespanManager):  # type: ignore[misc]
            """gunicorn's, which the worker looks up by name when it serves."""

            async def startup(self) -> None:
                """Start, and ask, also for an app that has no lifespan."""
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


class ConnectionObserver(Protocol):
    """What is told about the connections of this worker."""

    def on_open(self, connection: AsgiConnection) -> None:
        """It was accepted or adopted."""

    def on_closed(self, connection: AsgiConnection) -> None:
        """It was closed, or handed over."""

    def on_answered(self, connection: AsgiConnection) -> None:
        """It has answered, and is about to wait for its next request."""

    def on_undecided(self, connection: AsgiConnection) -> None:
        """It has sent nothing for so long that it is not taken for HTTP/2 any more."""


class _StoresOnBase(type):
    """Stores on gunicorn's class what gunicorn stores on the class of a connection.

    gunicorn remembers there, once for all connections, which C parser is installed, and reads part
    of that from its own class.
    """

    def __setattr__(cls, name: str, value: object) -> None:
        if name == "observer":
            super().__setattr__(name, value)
        else:
            setattr(ASGIProtocol, name, value)


class AsgiConnection(ASGIProtocol, metaclass=_StoresOnBase):  # type: ignore[misc]
    """One connection of the worker, which tells the observer of its class what happens to it.

    gunicorn itself only counts its connections.
    """

    observer: ConnectionObserver
    untouched = True
    """Whether its parser has been given nothing since the last message."""
    _h2c_buffer: bytes | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to serve it."""
        self.observer.on_open(self)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up after it."""
        self.observer.on_closed(self)
        super().connection_lost(exc)

    def _feed_callback_parser(self, data: bytes) -> bool:
        self.untouched = False
        return bool(super()._feed_callback_parser(data))

    def _resume_reading(self) -> None:
        # Called between two messages, before what was read ahead is fed again. gunicorn calls it
        # within a message too, but then the connection is not asked for its state.
        self.untouched = True
        super()._resume_reading()

    def _arm_keepalive_timer(self) -> None:
        super()._arm_keepalive_timer()
        self.observer.on_answered(self)

    def _h2c_undecided_timeout(self) -> None:
        super()._h2c_undecided_timeout()
        self.observer.on_undecided(self)

    # -- what it does --------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether it has no part of a request. It may yet turn out to be HTTP/2."""
        # The buffer holds what was read while it may still become HTTP/2; later it is None.
        return bool(self._awaiting_request or self._h2c_buffer == b"")

    @property
    def is_websocket(self) -> bool:
        """Whether it has become a WebSocket."""
        return self._websocket is not None

    @property
    def state(self) -> ConnectionState | None:
        """What it waits for; None if anything is left to read, to write or to do on it."""
        transport = self.transport
        if (
            transport is None
            or transport.is_closing()
            or transport.get_write_buffer_size()
            or self._h2c_buffer is not None
            or self.reader is not None
            or not self._awaiting_request
            or self._finishing_calls
            or self._reading_paused
            or not self.untouched
        ):
            return None
        # Where its keep-alive time runs, it has answered, here or in another process.
        answered = self.req_count > 1 or self._keepalive_handle is not None
        return ConnectionState.IDLE if answered else ConnectionState.FRESH

    # -- what can be done to it ----------------------------------------------------------------

    @property
    def is_closing(self) -> bool:
        """Whether it was closed, or is about to be."""
        return bool(self.transport.is_closing())

    def fileno(self) -> int:
        """The descriptor of its socket, which stays the transport's."""
        return int(self.transport.get_extra_info("socket").fileno())

    def begin_keep_alive(self) -> None:
        """Let its keep-alive time run: its last answer was given in another process."""
        buffered = self._h2c_buffer
        if buffered is not None:  # a client that was answered over HTTP/1 does not begin HTTP/2
            self._h2c_cancel_timer()
            self._h2c_buffer = None
            self._start_http1(buffered)
        if not self._request_ready.is_set():  # else its next request has come already
            super()._arm_keepalive_timer()

    def suspend(self) -> None:
        """Read nothing, and let no time pass."""
        self.transport.pause_reading()
        self._cancel_keepalive_timer()

    def resume(self, state: ConnectionState) -> None:
        """Undo `suspend`."""
        self.transport.resume_reading()
        if state is ConnectionState.IDLE:
            self.begin_keep_alive()

    def discard(self) -> None:
        """Close this process's copy, and let the connection's task end."""
        self.transport.abort()
        self._closed = True
        self._request_ready.set()

    async def end_websocket(self, code: int) -> None:
        """Send a close frame with this code; nothing if it is closed or not accepted yet."""
        websocket = self._websocket
        if websocket is not None and websocket.accepted and not websocket.closed:
            with contextlib.suppress(OSError, RuntimeError):  # its client has gone
                await websocket._send_close(code)  # noqa: SLF001


def close_connection_of(stream: EventStream) -> None:
    """Close the connection of an event stream over HTTP/1, after its last part was sent.

    Nobody would answer on it until the app has returned, and gunicorn tells the app when it is
    closed. An HTTP/2 connection has other streams, and stays.
    """
    receiver = getattr(stream.receive, "__self__", None)
    connection = getattr(receiver, "protocol", None)
    if isinstance(connection, AsgiConnection):
        connection._close_transport()  # noqa: SLF001
