"""One raw connection: opened, read and found ended, with every way it can fail told apart."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """Where to connect: `host:port`, `[::1]:port` or `unix:PATH`."""

    text: str
    family: socket.AddressFamily
    address: Any  # as socket.connect takes it
    host: str

    @classmethod
    def parse(cls, text: str) -> Target:
        if text.startswith("unix:"):
            return cls(text, socket.AF_UNIX, text.removeprefix("unix:"), "localhost")
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (host and colon and port.isdecimal()):
            raise ValueError(f"{text!r} is no target: pass HOST:PORT, [HOST]:PORT or unix:PATH")
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        return cls(text, found[0][0], found[0][4], host)

    @property
    def host_header(self) -> str:
        return "localhost" if self.family == socket.AF_UNIX else self.text


class Failed(Exception):
    """A request failed; caught by its client, which counts it."""

    def __init__(self, kind: str, note: str = "", number: int | None = None) -> None:
        super().__init__(kind, note, number)
        self.kind = kind
        self.note = note
        self.errno = number


class Connection(asyncio.Protocol):
    """One connection: what it received, and how it ended.

    It owns the transport, and through it the descriptor, until `close()`. It is in `opened` from
    its first moment until its descriptor is closed.
    """

    transport: asyncio.Transport

    def __init__(self, begun: float, timeout: float, opened: set[Connection]) -> None:
        self.begun = begun  # when connect() was started
        self.timeout = timeout
        self.deadline = begun + timeout  # of the request under way; infinity when there is none
        self.buffer = bytearray()
        self.received = 0  # bytes since the request under way was sent
        self.carried = 0  # answers
        self.pid = 0  # who gave the last answer
        self.announced = False  # the server announced that it closes after the last answer
        self.ended = False
        self.error: OSError | None = None
        self.late = False
        self.waiter: asyncio.Future[None] | None = None
        self._opened = opened
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    async def more(self) -> None:
        """Wait until more was received; a `Failed` that says how it ended if nothing can be."""
        if self.late:
            raise Failed("timed_out")
        if self.ended:
            raise self.how_it_ended()
        self.waiter = self._loop.create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    def how_it_ended(self) -> Failed:
        if self.late:
            return Failed("timed_out")
        number = self.error.errno if self.error else None
        if isinstance(self.error, ssl.SSLError):
            return Failed("garbled", f"in TLS: {self.error}")
        if self.received:
            return Failed("cut_short", number=number)
        return Failed("reset" if self.error else "eof", number=number)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        self.transport.close()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._opened.add(self)
        self._timer = self._loop.call_at(self.deadline, self._on_timer)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.received += len(data)
        self._wake()

    def eof_received(self) -> None:
        self.ended = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended = True
        self._opened.discard(self)
        if isinstance(error, OSError):
            self.error = error
        if self._timer:
            self._timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    def _on_timer(self) -> None:
        """One timer for all requests of a connection: it looks up which deadline holds now.

        When idle it looks again after `timeout`: no request that starts meanwhile ends before.
        """
        now = self._loop.time()
        if now >= self.deadline:
            self.late = True
            self.transport.abort()
            self._wake()
        else:
            self._timer = self._loop.call_at(min(self.deadline, now + self.timeout), self._on_timer)


LOCAL = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)


def why_not_connected(error: OSError) -> Failed:
    if isinstance(error, TimeoutError) or error.errno in (errno.EAGAIN, errno.ETIMEDOUT):
        return Failed("timed_out", "no connection", error.errno)
    if error.errno in LOCAL:
        return Failed("local", error.strerror or "", error.errno)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Failed("eof", "in the TLS handshake")
    if isinstance(error, ssl.SSLError):
        return Failed("garbled", f"in the TLS handshake: {error}")
    if isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError):
        # asyncio reports an end of file in the TLS handshake as a reset without a number
        return Failed("reset" if error.errno else "eof", "in the connect", error.errno)
    return Failed("refused", "", error.errno)


async def connect(
    target: Target, tls: ssl.SSLContext | None, timeout: float, opened: set[Connection]
) -> Connection:
    """A new connection, which the caller closes. Whatever prevents it is a `Failed`."""
    loop = asyncio.get_running_loop()
    connection = Connection(time.monotonic(), timeout, opened)
    deadline = connection.deadline
    try:
        sock = socket.socket(target.family, socket.SOCK_STREAM)
    except OSError as error:
        raise why_not_connected(error) from None
    try:
        await _connect_socket(sock, target.address, deadline)
        await loop.create_connection(
            lambda: connection,
            sock=sock,
            ssl=tls,
            server_hostname=target.host if tls else None,
            ssl_handshake_timeout=max(0.001, deadline - time.monotonic()) if tls else None,
        )
    except OSError as error:
        sock.close()
        if tls and time.monotonic() >= deadline:  # asyncio calls it aborted
            raise Failed("timed_out", "in the TLS handshake") from None
        raise why_not_connected(error) from None
    except BaseException:
        sock.close()
        raise
    return connection


async def _connect_socket(sock: socket.socket, address: Any, deadline: float) -> None:
    """connect(2) that waits as a plain client does, also for a full backlog of a Unix listener.

    For that one a non-blocking connect() says EAGAIN and nothing tells when to try again (asyncio
    takes it for a connection under way), so it is left to a blocking one, in a thread.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    number = sock.connect_ex(address)
    if number == errno.EAGAIN and sock.family == socket.AF_UNIX:
        left = max(0.001, deadline - time.monotonic())
        limit = struct.pack("ll", int(left), int(left % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.setblocking(True)
        await loop.run_in_executor(None, sock.connect, address)
        sock.setblocking(False)
    elif number == errno.EINPROGRESS:
        connected = loop.create_future()
        timer = loop.call_at(deadline, resolve, connected)
        loop.add_writer(sock, resolve, connected)
        try:
            await connected
        finally:
            timer.cancel()
            loop.remove_writer(sock)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number == 0 and time.monotonic() >= deadline:
            number = errno.ETIMEDOUT
        if number:
            raise OSError(number, os.strerror(number))
    elif number:
        raise OSError(number, os.strerror(number))


def resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
