"""One HTTP/2 connection, frame by frame: plaintext with prior knowledge, or TLS."""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

if TYPE_CHECKING:
    from typing_extensions import Self

DEADLINE = 30.0
HEADER = 9  # bytes of a frame before its content, RFC 9113 section 4.1
GOAWAY = 7
NO_MORE = 2**31 - 1
"""The last stream of a GOAWAY that refuses none which is on its way, RFC 9113 section 6.8."""


@dataclass
class Stream:
    """What came on one stream."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    reset: bool = False

    @property
    def status(self) -> int:
        return int(self.headers[b":status"])

    @property
    def pid(self) -> int:
        return int(self.headers[b"x-served-by"])


class Http2:
    """A client's connection. Every wait has a deadline."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        self._host = address
        host, _, port = address.rpartition(":")
        self._sock = socket.create_connection((host, int(port)), DEADLINE)
        if tls is not None:
            self._sock = tls.wrap_socket(self._sock, server_hostname=host)
            assert self._sock.selected_alpn_protocol() == "h2"
        self._conn = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._received = b""
        self.streams: dict[int, Stream] = {}
        self.farewells: list[int] = []
        """The last stream that each GOAWAY names."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sock.close()

    def begin(self, path: str = "/", *, sse: bool = False, body: bytes = b"") -> int:
        """Send a request; the number of its stream. The first one sends the preface as well.

        With a `body` the request goes on, until `send` ends it.
        """
        accept = b"text/event-stream" if sse else b"*/*"
        if not self.streams:
            self._conn.initiate_connection()
        number = self._conn.get_next_available_stream_id()
        self.streams[number] = Stream()
        self._conn.send_headers(
            number,
            [
                (b":method", b"POST" if body else b"GET"),
                (b":scheme", b"http"),
                (b":authority", self._host.encode()),
                (b":path", path.encode()),
                (b"accept", accept),
            ],
            end_stream=not body,
        )
        if body:
            self._conn.send_data(number, body)
        self._flush()
        return number

    def send(self, number: int, body: bytes) -> None:
        """The last part of a request's body."""
        self._conn.send_data(number, body, end_stream=True)
        self._flush()

    def answer(self, number: int) -> Stream:
        """Wait for the end of a stream."""
        stream = self.streams[number]
        while not stream.ended:
            assert self._read(), f"the connection ended before stream {number}: {stream}"
            assert not stream.reset, f"stream {number} was reset: {stream}"
        return stream

    def get(self, path: str = "/") -> Stream:
        return self.answer(self.begin(path))

    def goodbye(self) -> int:
        """Wait for a GOAWAY; the last stream that it names."""
        while not self.farewells:
            assert self._read(), "the connection ended without a GOAWAY"
        return self.farewells[0]

    def at_end(self) -> bool:
        """Read to the end of the connection; whether every stream that was begun was answered."""
        while self._read():
            pass
        return all(stream.ended for stream in self.streams.values())

    def _flush(self) -> None:
        self._sock.sendall(self._conn.data_to_send())

    def _read(self) -> bool:
        data = self._sock.recv(65536)
        if not data:
            return False
        self._received += data
        while frame := self._frame():
            # h2 takes the connection for closed by a GOAWAY, whichever stream that names.
            if frame[3] == GOAWAY:
                self.farewells.append(struct.unpack_from(">I", frame, HEADER)[0])
                continue
            for event in self._conn.receive_data(frame):
                self._take(event)
        self._flush()
        return True

    def _frame(self) -> bytes:
        """The next whole frame that was received, or nothing."""
        length = HEADER + int.from_bytes(self._received[:3], "big")
        if len(self._received) < max(HEADER, length):
            return b""
        frame, self._received = self._received[:length], self._received[length:]
        return frame

    def _take(self, event: Event) -> None:
        if isinstance(event, ResponseReceived):
            self.streams[event.stream_id].headers = dict(event.headers)
        elif isinstance(event, DataReceived):
            self.streams[event.stream_id].body += event.data
            self._conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            self.streams[event.stream_id].ended = True
        elif isinstance(event, StreamReset):
            self.streams[event.stream_id].reset = True
