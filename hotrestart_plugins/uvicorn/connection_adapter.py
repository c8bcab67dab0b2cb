"""uvicorn's connections between two messages: which those are, and how they are held there.

What a connection must be is read off uvicorn's protocols, h11's and httptools'; zttp shows neither
its state nor its buffer, TLS and HTTP/2 have state that cannot be sent, and a WebSocket is never
between two messages. These are not moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn

from hotrestart_plugins.handover.frames import ConnectionState

_PARSERS = {"uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl"}


def state_of(connection: Any) -> ConnectionState | None:
    """What a connection waits for, if it stands between two messages; None: it must stay."""
    if not hasattr(connection, "cycle"):  # a WebSocket
        return None
    transport = connection.transport
    if (
        transport is None
        or transport.is_closing()
        or transport.get_extra_info("ssl_object") is not None
        or transport.get_write_buffer_size()
    ):
        return None
    if hasattr(connection, "conn"):
        return _state_h11(connection)
    if hasattr(connection, "pipeline") and hasattr(connection, "parser"):
        return _state_httptools(connection)
    return None


def _state_h11(connection: Any) -> ConnectionState | None:
    if not hasattr(connection.conn, "trailing_data") or hasattr(connection, "cycles"):
        return None
    states = (connection.conn.our_state.__name__, connection.conn.their_state.__name__)
    if states != ("IDLE", "IDLE") or connection.conn.trailing_data != (b"", False):
        return None
    cycle = connection.cycle
    if cycle is None:
        return _unasked(connection)
    return ConnectionState.IDLE if cycle.response_complete and cycle.keep_alive else None


def _state_httptools(connection: Any) -> ConnectionState | None:
    cycle = connection.cycle
    if cycle is None:
        # The scope is made with the first byte of a message.
        return _unasked(connection) if connection.scope is None else None
    whole = cycle.response_complete and not cycle.more_body and not connection.pipeline
    # A later message has begun if the scope is no longer that of the last request.
    return (
        ConnectionState.IDLE
        if whole and cycle.keep_alive and cycle.scope is connection.scope
        else None
    )


def _unasked(connection: Any) -> ConnectionState:
    """Of one that was asked nothing here: where its time runs, it has answered elsewhere."""
    return (
        ConnectionState.FRESH
        if connection.timeout_keep_alive_task is None
        else ConnectionState.IDLE
    )


def can_hand_over(config: uvicorn.Config) -> bool:
    """Whether this server's connections can be moved at all: plaintext, and by these parsers."""
    modules = {one.__module__ for one in config.http_protocol_class.__mro__}
    return config.ssl is None and bool(modules & _PARSERS)


class UvicornConnectionAdapter:
    """How a `ConnectionSender` deals with uvicorn's connections."""

    def state(self, connection: Any) -> ConnectionState | None:
        """See `state_of`."""
        return state_of(connection)

    def on_response(self, connection: Any, answered: Callable[[], None]) -> None:
        """Call `answered` behind each answer from now on."""
        original = getattr(connection, "on_response_complete", None)
        if original is None:
            return

        def complete() -> None:
            original()
            answered()

        connection.on_response_complete = complete  # the next cycles are made with it
        cycle = getattr(connection, "cycle", None)
        if cycle is not None and not cycle.response_complete:
            cycle.on_response = complete
        for waiting, _app in getattr(connection, "pipeline", ()):
            waiting.on_response = complete

    def fileno(self, connection: Any) -> int:
        """Of its socket."""
        return int(connection.transport.get_extra_info("socket").fileno())

    def suspend(self, connection: Any, _state: ConnectionState) -> None:
        """Read nothing, and let no time pass."""
        connection.transport.pause_reading()
        timer = connection.timeout_keep_alive_task
        if timer is not None:
            timer.cancel()
            connection.timeout_keep_alive_task = None

    def resume(self, connection: Any, state: ConnectionState) -> None:
        """Wait for its request again."""
        connection.transport.resume_reading()
        if state is ConnectionState.IDLE:
            self.start_keep_alive(connection)

    def start_keep_alive(self, connection: Any) -> None:
        """Its time runs as after an answer, unless the next request has already come."""
        if connection.timeout_keep_alive_task is None and state_of(connection) is not None:
            connection.timeout_keep_alive_task = asyncio.get_running_loop().call_later(
                connection.timeout_keep_alive, connection.timeout_keep_alive_handler
            )

    def discard(self, connection: Any) -> None:
        """It is another's: close the copy, which closes no connection."""
        connection.transport.abort()

    def is_closing(self, connection: Any) -> bool:
        """Whether it has been closed meanwhile: by the app's end, or by a deadline."""
        return bool(connection.transport.is_closing())
