"""The connections of a uvicorn server: what each is, what it waits for, and how it is ended.

Which protocol speaks on a connection is known by the class of its protocol object, never by the
attributes that the object has or lacks: a name that uvicorn changes must not make a WebSocket of an
HTTP connection. What needs a name that is missing (see `names`) answers here as for a connection of
which nothing is known: it is busy, and it stays.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import Any

import uvicorn

from hotrestart_plugins.handover.frames import ConnectionState
from hotrestart_plugins.uvicorn._compat.names import has
from hotrestart_plugins.uvicorn._compat.table import Feature

_NO_ERROR = 0  # RFC 9113 section 7
_MOST_STREAM = 2**31 - 1  # a GOAWAY that only says 'no new ones, please', RFC 9113 section 6.8

Header = tuple[bytes, bytes]
Connection = Any
"""A protocol object of uvicorn's. Outside of this file nobody looks into it."""


class Kind(enum.Enum):
    """What speaks on a connection."""

    H11 = "HTTP/1.1, parsed by h11"
    HTTPTOOLS = "HTTP/1.1, parsed by httptools"
    ZTTP = "HTTP/1.1, parsed by zttp"
    HTTP2 = "HTTP/2"
    UNDECIDED = "it has not said yet whether it is HTTP/1.1 or HTTP/2"
    WEBSOCKET = "WebSocket"
    UNKNOWN = "a protocol that is not uvicorn's"


_HTTP_KINDS = {
    ("uvicorn.protocols.http.h11_impl", "H11Protocol"): Kind.H11,
    ("uvicorn.protocols.http.httptools_impl", "HttpToolsProtocol"): Kind.HTTPTOOLS,
    ("uvicorn.protocols.http.zttp_impl", "ZttpProtocol"): Kind.ZTTP,
    ("uvicorn.protocols.http.zttp_h2_impl", "ZttpH2Protocol"): Kind.HTTP2,
    ("uvicorn.protocols.http.auto_zttp_impl", "AutoZttpProtocol"): Kind.UNDECIDED,
}
# Tuples, since a member of an enumeration is compared faster than it is hashed.
_MOVABLE = (Kind.H11, Kind.HTTPTOOLS)
"""zttp shows neither its state nor its buffer, and HTTP/2 has state that cannot be sent."""
_HTTP1 = (Kind.H11, Kind.HTTPTOOLS, Kind.ZTTP)


_known: dict[type, Kind] = {}


def _http_kind(protocol: type) -> Kind:
    """The kind of a class, or of the class of uvicorn's that it inherits from."""
    kind = _known.get(protocol)
    if kind is None:
        names = ((base.__module__, base.__qualname__) for base in protocol.__mro__)
        kind = next((_HTTP_KINDS[name] for name in names if name in _HTTP_KINDS), Kind.UNKNOWN)
        _known[protocol] = kind
    return kind


class Connections:
    """What one server's connections are, by the protocol classes of its configuration."""

    def __init__(self, config: uvicorn.Config) -> None:
        """`config` is loaded."""
        websocket = config.ws_protocol_class if has(Feature.WEBSOCKETS) else None
        self._websocket = websocket if isinstance(websocket, type) else None
        self._counts = has(Feature.STATISTICS)
        self._announces = has(Feature.ANNOUNCE_CLOSE)
        self.can_be_handed_over = (
            has(Feature.CONNECTION_HANDOVER)
            and config.ssl is None
            and _http_kind(config.http_protocol_class) in _MOVABLE
        )
        """Whether any of them can: in plaintext, and with a parser that shows its state."""

    def kind(self, connection: Connection) -> Kind:
        """What speaks on the connection."""
        if self._websocket is not None and isinstance(connection, self._websocket):
            return Kind.WEBSOCKET
        return _http_kind(type(connection))

    def is_websocket(self, connection: Connection) -> bool:
        """Whether a WebSocket speaks on the connection."""
        return self.kind(connection) is Kind.WEBSOCKET

    def is_idle(self, connection: Connection) -> bool:
        """Whether the connection waits for a request. A WebSocket never does."""
        if not self._counts:
            return False
        kind = self.kind(connection)
        if kind is Kind.HTTP2:
            return not connection.cycles
        if kind in _HTTP1:
            return connection.cycle is None or connection.cycle.response_complete
        return kind is Kind.UNDECIDED

    def last_cycle(self, connection: Connection) -> object:
        """What answers the last request of an HTTP/1.1 connection, to tell it from a later one."""
        if self._counts and self.kind(connection) in _HTTP1:
            return connection.cycle
        return None

    def unwritten(self, connection: Connection) -> int:
        """How many bytes of answers its client has yet to read."""
        return connection.transport.get_write_buffer_size() if self._counts else 0

    def senders(self, connection: Connection) -> list[object]:
        """The objects that send the answers in flight on the connection; HTTP/2 can have several.

        None if the names that end an event stream are missing.
        """
        if not has(Feature.EVENT_STREAMS):
            return []
        kind = self.kind(connection)
        if kind is Kind.HTTP2:
            return list(connection.cycles.values())
        return [connection.cycle] if kind in _HTTP1 else []

    def announce_close(self, connection: Connection, header: Header) -> None:
        """Have the answer in flight say that the connection closes, by `header` or by GOAWAY."""
        kind = self.kind(connection)
        if not self._announces:
            return
        if kind is Kind.HTTP2:  # what is on its way to this server is answered all the same
            connection.conn.close(_NO_ERROR, _MOST_STREAM)
            connection.flush()
        elif kind in _HTTP1:
            cycle = connection.cycle
            # A list of an earlier second, which uvicorn has replaced for later requests.
            if (
                cycle is not None
                and not cycle.response_started
                and header not in cycle.default_headers
            ):
                cycle.default_headers.append(header)

    def close_after_response(self, connection: Connection, header: Header) -> None:
        """Have the last answer in flight on this connection alone say, by `header`, that it closes.

        What the client sends after that request is not answered here.
        """
        if not self._announces or self.kind(connection) not in _HTTP1:
            return
        cycle = connection.cycle  # with httptools, the last of those that wait
        if cycle is not None and not cycle.response_started and header not in cycle.default_headers:
            cycle.default_headers = [*cycle.default_headers, header]

    def shut_down(self, connection: Connection) -> None:
        """End it as uvicorn does: at once if idle, else after its answer; a WebSocket with 1012."""
        connection.shutdown()

    def abort(self, connection: Connection) -> None:
        """Close the connection without another byte."""
        if self._counts:
            connection.transport.abort()


def end_after_last_chunk(sender: Any) -> None:
    """Have the connection close after what `sender` sends next, the end of an event stream."""
    sender.keep_alive = False


def tell_app_of_disconnect(sender: Any) -> None:
    """Have the app's ``receive()`` say that the client of `sender` has gone."""
    sender.disconnected = True


class UvicornConnectionAdapter:
    """How a `ConnectionSender` deals with uvicorn's connections."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def state(self, connection: Connection) -> ConnectionState | None:
        """What the connection waits for, if it stands between two messages; None: it must stay."""
        kind = self._connections.kind(connection)
        if not self._connections.can_be_handed_over or kind not in _MOVABLE:
            return None
        transport = connection.transport
        if (
            transport is None
            or transport.is_closing()
            or transport.get_extra_info("ssl_object") is not None
            or transport.get_write_buffer_size()
        ):
            return None
        return _state_h11(connection) if kind is Kind.H11 else _state_httptools(connection)

    def on_response(self, connection: Connection, answered: Callable[[], None]) -> None:
        """Call `answered` after each answer from now on."""
        kind = self._connections.kind(connection)
        if kind not in _MOVABLE:
            return
        original = connection.on_response_complete

        def complete() -> None:
            original()
            answered()

        connection.on_response_complete = complete  # the next cycles are made with it
        cycle = connection.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.on_response = complete
        if kind is Kind.HTTPTOOLS:
            for waiting, _app in connection.pipeline:
                waiting.on_response = complete

    def fileno(self, connection: Connection) -> int:
        """Return the descriptor of its socket."""
        return int(connection.transport.get_extra_info("socket").fileno())

    def suspend(self, connection: Connection, _state: ConnectionState) -> None:
        """Read nothing, and let its keep-alive timeout not pass."""
        connection.transport.pause_reading()
        timer = connection.timeout_keep_alive_task
        if timer is not None:
            timer.cancel()
            connection.timeout_keep_alive_task = None

    def resume(self, connection: Connection, state: ConnectionState) -> None:
        """Wait for its request again."""
        connection.transport.resume_reading()
        if state is ConnectionState.IDLE:
            self.start_keep_alive(connection)

    def start_keep_alive(self, connection: Connection) -> None:
        """Start its keep-alive timeout, as after an answer, unless the next request has come."""
        if connection.timeout_keep_alive_task is None and self.state(connection) is not None:
            connection.timeout_keep_alive_task = asyncio.get_running_loop().call_later(
                connection.timeout_keep_alive, connection.timeout_keep_alive_handler
            )

    def discard(self, connection: Connection) -> None:
        """Close this process's copy of a connection that was handed over; it stays open."""
        connection.transport.abort()

    def is_closing(self, connection: Connection) -> bool:
        """Whether it was closed meanwhile: when the app ended, or by a deadline."""
        return bool(connection.transport.is_closing())


def _state_h11(connection: Connection) -> ConnectionState | None:
    parser = connection.conn
    if (parser.our_state.__name__, parser.their_state.__name__) != ("IDLE", "IDLE"):
        return None
    if parser.trailing_data != (b"", False):
        return None
    cycle = connection.cycle
    if cycle is None:
        return _without_request(connection)
    return ConnectionState.IDLE if cycle.response_complete and cycle.keep_alive else None


def _state_httptools(connection: Connection) -> ConnectionState | None:
    cycle = connection.cycle
    if cycle is None:
        # The scope is made with the first byte of a message.
        return _without_request(connection) if connection.scope is None else None
    whole = cycle.response_complete and not cycle.more_body and not connection.pipeline
    # A later message has begun if the scope is no longer that of the last request.
    same = cycle.scope is connection.scope
    return ConnectionState.IDLE if whole and cycle.keep_alive and same else None


def _without_request(connection: Connection) -> ConnectionState:
    """The state of a connection without a request here: if its time runs, it was adopted."""
    fresh = connection.timeout_keep_alive_task is None
    return ConnectionState.FRESH if fresh else ConnectionState.IDLE
