"""The inside of a uvicorn server: what is open, what it sends, how it starts and stops."""

from __future__ import annotations

import asyncio
import copy
import functools
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from hotrestart_plugins.draining.event_streams import App, Message, Receive, Send
from hotrestart_plugins.uvicorn._compat.connections import Connection, Header
from hotrestart_plugins.uvicorn._compat.names import has, lacks
from hotrestart_plugins.uvicorn._compat.table import Feature

CLOSE: Header = (b"connection", b"close")
RUNNER_MODULE = "uvicorn._compat"
"""Where uvicorn runs the event loop on Pythons before 3.12."""


def open_connections(server: uvicorn.Server) -> set[Connection]:
    """Return the connections that are open, as the server itself keeps them."""
    found: set[Connection] = server.server_state.connections
    return found


def open_tasks(server: uvicorn.Server) -> set[asyncio.Task[None]]:
    """Return the tasks of requests that have not ended, as the server itself keeps them."""
    return server.server_state.tasks


def answered(server: uvicorn.Server) -> int:
    """How many requests the server has answered; 0 if it does not tell."""
    return server.server_state.total_requests if has(Feature.STATISTICS) else 0


def forget_answered(server: uvicorn.Server, number: int) -> None:
    """Have `number` requests not count for ``--limit-max-requests``."""
    if has(Feature.STATISTICS):
        server.server_state.total_requests -= number


def asyncio_servers(server: uvicorn.Server) -> list[Any]:
    """Return the asyncio servers that accept for it, as the server itself keeps them."""
    return server.servers


def listeners_of(server: uvicorn.Server) -> list[Any]:
    """Return the listening sockets of its asyncio servers, which own them."""
    return [sock for each in server.servers for sock in each.sockets]


def make_protocol(server: uvicorn.Server) -> asyncio.Protocol:
    """Return the server's side of a new connection."""
    return server.config.http_protocol_class(  # type: ignore[call-arg]
        config=server.config, server_state=server.server_state, app_state=server.lifespan.state
    )


def tls_context(config: uvicorn.Config) -> ssl.SSLContext | None:
    """Return what the server of a loaded configuration speaks TLS with; None: it does not."""
    return config.ssl


def load(config: uvicorn.Config) -> None:
    """Import the app and what serves it, once."""
    if not config.loaded:
        config.load()


def has_started(server: uvicorn.Server) -> bool:
    """Whether its app and its listeners have started."""
    return server.started


def is_forced(server: uvicorn.Server) -> bool:
    """Whether a second Ctrl-C has come: wait for nothing any more."""
    return server.force_exit


def unforce(server: uvicorn.Server) -> None:
    """Forget the second Ctrl-C."""
    server.force_exit = False


def forget_signals(server: uvicorn.Server) -> None:
    """Have the server not end with the signal that has stopped it, but by itself."""
    server._captured_signals.clear()  # noqa: SLF001 (this is the file for it)


# -- the app ---------------------------------------------------------------------------------------


def wrap_startup(
    server: uvicorn.Server, wrapper: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
) -> None:
    """Have `wrapper` called in place of the startup of the app's lifespan, with that startup.

    The server listens after it has returned.
    """
    server.lifespan.startup = functools.partial(wrapper, server.lifespan.startup)


def app_failed(server: uvicorn.Server) -> bool:
    """Whether the startup of the app's lifespan has failed."""
    return bool(server.lifespan.should_exit)


async def stop_app(server: uvicorn.Server) -> None:
    """Run the shutdown of the app's lifespan."""
    await server.lifespan.shutdown()


def wrap_app(config: uvicorn.Config, wrapper: Callable[[App], App]) -> None:
    """Have connections that begin from now on call the wrapped app, if uvicorn lets it be."""
    if not lacks("loaded_app"):
        config.loaded_app = wrapper(config.loaded_app)


# -- the header that says that a connection closes -------------------------------------------------


class CloseAnnouncement:
    """Has every answer say that its connection closes, for as long as it is on."""

    def __init__(self, server: uvicorn.Server) -> None:
        """Prepare the loaded configuration of `server`, before it makes its first connection."""
        self.is_on = False
        self._server = server
        if has(Feature.ANNOUNCE_CLOSE):
            _keep_from_websockets(server.config)
        else:
            wrap_app(server.config, self._announcing)

    def begin(self) -> None:
        """From here on; the answers in flight included, unless they have begun."""
        self.is_on = True
        if not has(Feature.ANNOUNCE_CLOSE):
            return
        config, state = self._server.config, self._server.server_state
        # Once a second uvicorn makes its default headers anew from these.
        config.encoded_headers = [*config.encoded_headers, CLOSE]
        # Responses in flight hold this very list.
        state.default_headers.append(CLOSE)

    def end(self) -> None:
        """No more; the answers in flight keep their headers, and close."""
        if self.is_on and has(Feature.ANNOUNCE_CLOSE):
            config, state = self._server.config, self._server.server_state
            # It comes last, after a header of the user's own that may be the same.
            config.encoded_headers = config.encoded_headers[:-1]
            state.default_headers = state.default_headers[:-1]
        self.is_on = False

    def _announcing(self, app: App) -> App:
        """The app, in whose answers the header is put here: uvicorn has no place for it."""

        async def call(scope: dict[str, Any], receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["http_version"] not in ("1.0", "1.1"):
                return await app(scope, receive, send)

            async def send_closing(message: Message) -> None:
                if self.is_on and message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
                await send(message)

            return await app(scope, receive, send_closing)

        return call


def _keep_from_websockets(config: uvicorn.Config) -> None:
    """The 101 that begins a WebSocket must not say that the connection closes."""
    if config.ws_protocol_class is not None:
        config.ws_protocol_class = functools.partial(  # type: ignore[assignment]
            _websocket, config.ws_protocol_class
        )


def _websocket(
    protocol_class: Callable[..., asyncio.Protocol], *args: Any, **kwargs: Any
) -> asyncio.Protocol:
    state = kwargs["server_state"]
    if CLOSE in state.default_headers:
        state = copy.copy(state)
        state.default_headers = [header for header in state.default_headers if header != CLOSE]
        kwargs["server_state"] = state
    return protocol_class(*args, **kwargs)
