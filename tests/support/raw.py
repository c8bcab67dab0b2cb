"""One connection, byte by byte: what a load client does too evenly to be sure of."""

from __future__ import annotations

import socket
from dataclasses import dataclass
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
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def get(self, path: str = "/") -> Answer:
        self.send(request(path))
        return self.answer()

    def answer(self) -> Answer:
        """Read one answer; what came behind it is kept for the next."""
        head = [self._line()]
        while line := self._line():
            head.append(line)
        headers = dict(line.lower().split(": ", 1) for line in head[1:])
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._line(), 16):
                body += self._file.read(size)
                self._line()
            self._line()
        else:
            body = self._file.read(int(headers["content-length"]))
        return Answer(int(head[0].split()[1]), headers, body)

    def _line(self) -> str:
        line = self._file.readline().decode("latin-1")
        if not line.endswith("\r\n"):
            raise ConnectionError(f"the connection ended after {line!r}")
        return line[:-2]

    def begin_upload(self) -> None:
        """Have a request under way for sure: the app waits for five bytes."""
        head = b"POST /upload HTTP/1.1\r\nHost: demo\r\nContent-Length: 5\r\n"
        self.send(head + b"Expect: 100-continue\r\n\r\n")
        wanted = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert self.sock.recv(len(wanted), socket.MSG_WAITALL) == wanted

    def at_end(self) -> bool:
        """Whether the server closes the connection, without a reset."""
        return self._file.read(1) == b""


@dataclass
class Answer:
    """A status, and who gave it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def pid(self) -> int:
        return int(self.headers.get("x-served-by", 0))

    @property
    def closes(self) -> bool:
        """Whether the connection ends with it."""
        return "close" in self.headers.get("connection", "").lower()


def request(path: str = "/", more: str = "") -> bytes:
    """The bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: demo\r\n{more}\r\n".encode()


def ask(address: str, path: str = "/") -> Answer:
    """One request on a connection of its own."""
    with Connection(address) as connection:
        return connection.get(path)
