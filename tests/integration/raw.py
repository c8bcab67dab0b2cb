"""One connection, byte by byte: what a load client does too evenly to be sure of."""

from __future__ import annotations

import http.client
import socket
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

DEADLINE = 30.0


class Connection:
    """A connection to a server, and the answers that come over it. Every wait has a deadline."""

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(DEADLINE)
            self.sock.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self.sock = socket.create_connection((host.strip("[]"), int(port)), DEADLINE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def get(self, path: str = "/") -> Answer:
        self.send(request(path))
        return self.answer()

    def answer(self) -> Answer:
        """Read one answer."""
        response = http.client.HTTPResponse(self.sock)
        response.begin()
        return Answer(response, response.read())

    def at_end(self) -> bool:
        """Whether the server closes the connection, without a reset."""
        return self.sock.recv(1) == b""


class Answer:
    """A status, who gave it, and whether the connection ends with it."""

    def __init__(self, response: http.client.HTTPResponse, body: bytes) -> None:
        self.status = response.status
        self.pid = int(response.headers.get("X-Served-By", 0))
        self.closes = "close" in response.headers.get("Connection", "").lower()
        self.body = body


def request(path: str = "/", more: str = "") -> bytes:
    """The bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: demo\r\n{more}\r\n".encode()


def ask(address: str, path: str = "/") -> Answer:
    """One request on a connection of its own."""
    with Connection(address) as connection:
        return connection.get(path)
