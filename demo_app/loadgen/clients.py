"""The kinds of client: each knows its request, and what a right answer to it is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import os
import struct
import time
from abc import ABC, abstractmethod
from typing import NoReturn

from demo_app.loadgen.account import Account
from demo_app.loadgen.connection import Connection, Failed, connect
from demo_app.loadgen.http1 import read_answer, read_head
from demo_app.loadgen.websocket import (
    CLOSE,
    PING,
    PONG,
    RESTARTS,
    TEXT,
    Restarted,
    parse_frame,
    serialize_frame,
)

BREATH = 0.01  # seconds between a failure and the client's next request


class Client(ABC):
    """A closed loop of requests: the next one starts when the last one is in the account."""

    keeps = True  # its connection, for as long as the server does

    def __init__(self, account: Account, kind: str) -> None:
        self.account = account
        self.kind = kind
        self.connection: Connection | None = None
        account.open_tally(kind)

    @abstractmethod
    async def exchange(self, connection: Connection) -> int:
        """Send one request and read its answer; the pid that gave it."""

    async def run(self) -> None:
        account = self.account
        try:
            while account.goes_on():
                account.report.sent += 1
                if await self._request():
                    if account.pause:
                        await self.nap(account.pause)
                else:
                    await account.nap(BREATH)
        finally:
            self.hang_up()

    async def nap(self, seconds: float) -> None:
        await self.account.nap(seconds)

    async def _request(self) -> bool:
        """One request, from its start to its place in the account. False: it failed."""
        account = self.account
        start = time.monotonic()
        try:
            connection = self.find_connection() or await self.open_connection()
            connection.deadline = start + account.timeout
            connection.received = 0
            pid = await self.exchange(connection)
        except Failed as failure:
            account.count_failure(self.kind, start, failure, self.connection)
            if failure.kind == "status" and self.keeps and self.connection:
                self.connection.deadline = math.inf  # a whole answer: it can carry another one
                self.connection.carried += 1
            else:
                self.hang_up()
            return False
        except Restarted:
            account.report.sent -= 1
            account.report.ws_restarts += 1
            self.hang_up()
            return True
        except asyncio.CancelledError:
            account.report.abandoned += 1
            raise
        account.count_answer(self.kind, start, pid, None if connection.carried else connection)
        connection.deadline = math.inf
        connection.carried += 1
        connection.pid = pid
        if not self.keeps:
            self.hang_up()
        return True

    def find_connection(self) -> Connection | None:
        """The connection of the last request, if it can carry another one."""
        connection = self.connection
        if connection is None:
            return None
        if not (connection.announced or connection.ended):
            if connection.buffer:
                raise Failed("garbled", f"unasked: {bytes(connection.buffer[:80])!r}")
            return connection
        if connection.announced:
            self.account.report.reconnects += 1
        else:
            self.account.report.closed_idle += 1
        self.hang_up()
        return None

    async def open_connection(self) -> Connection:
        account = self.account
        self.connection = await connect(
            account.target, account.tls, account.timeout, account.opened
        )
        return self.connection

    def hang_up(self) -> None:
        if self.connection:
            self.connection.close()
            self.connection = None

    def request(self, method: str, path: str, *headers: str) -> bytes:
        host = self.account.target.host_header
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
        return "\r\n".join(lines).encode()


class KeepAlive(Client):
    """GET, again and again."""

    def __init__(self, account: Account, kind: str, path: str) -> None:
        super().__init__(account, kind)
        headers = () if self.keeps else ("Connection: close",)
        self.bytes = self.request("GET", path, *headers)

    async def exchange(self, connection: Connection) -> int:
        connection.send(self.bytes)
        pid, _ = await read_answer(connection)
        return pid


class OneShot(KeepAlive):
    """GET with `Connection: close`."""

    keeps = False


class Upload(Client):
    """POST in pieces; the answer must name the size and the checksum of what was sent."""

    def __init__(self, account: Account, kind: str) -> None:
        super().__init__(account, kind)
        sizes = account.sizes
        body = os.urandom(sizes.upload_kib * 1024)
        step = max(1, math.ceil(len(body) / max(1, sizes.upload_pieces)))
        self.head = self.request("POST", "/upload", f"Content-Length: {len(body)}")
        self.pieces = [body[at : at + step] for at in range(0, len(body), step)]
        self.pause = sizes.upload_seconds / max(1, len(self.pieces))
        self.expected = {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}

    async def exchange(self, connection: Connection) -> int:
        connection.send(self.head)
        for piece in self.pieces:
            await self.account.nap(self.pause, connection)  # a stop cuts the naps, not the body
            if connection.received or connection.ended:
                break  # answered before its end, or gone: the answer will tell
            connection.send(piece)
        pid, body = await read_answer(connection)
        with contextlib.suppress(ValueError, AttributeError):
            answer = json.loads(body)
            if {key: answer.get(key) for key in self.expected} == self.expected:
                return pid
        raise Failed("garbled", f"{self.expected} was answered by {body[:200]!r}")


class Events(Client):
    """GET /events: every event, in order, from the process that began the answer."""

    def __init__(self, account: Account, kind: str) -> None:
        super().__init__(account, kind)
        self.count = account.sizes.sse_events
        self.bytes = self.request("GET", f"/events?count={self.count}")

    async def exchange(self, connection: Connection) -> int:
        connection.send(self.bytes)
        pid, body = await read_answer(connection)
        lines = [line for line in body.split(b"\n") if line]
        with contextlib.suppress(ValueError):
            seen = [json.loads(line.removeprefix(b"data:")) for line in lines]
            if seen == [{"pid": pid, "event": event} for event in range(self.count)]:
                return pid
        raise Failed("garbled", f"{len(lines)} events for {self.count}, ending {body[-80:]!r}")


class WebSocket(Client):
    """Messages and their echoes. A close frame other than a restart's is a failure (eof)."""

    messages = 0

    async def open_connection(self) -> Connection:
        connection = await super().open_connection()
        key = base64.b64encode(os.urandom(16)).decode()
        connection.send(
            self.request(
                *("GET", "/ws", "Upgrade: websocket", "Connection: Upgrade"),
                *("Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}"),
            )
        )
        head = await read_head(connection)
        if head.status != 101:
            self.connection = None
            connection.close()  # no WebSocket: of no use for another message
            raise Failed("status", f"HTTP {head.status} to a WebSocket handshake")
        magic = f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()
        if head.websocket_accept != base64.b64encode(hashlib.sha1(magic).digest()).decode():
            raise Failed("garbled", "Sec-WebSocket-Accept is not the answer to our key")
        return connection

    def find_connection(self) -> Connection | None:
        connection = self.connection
        if connection is None:
            return None
        connection.received = len(connection.buffer)
        if (data := self._next_message(connection)) is not None:
            raise Failed("garbled", f"a message unasked: {data[:80]!r}")
        if connection.ended:
            raise connection.how_it_ended()
        return connection

    async def exchange(self, connection: Connection) -> int:
        self.messages += 1
        text = f"message {self.messages}".encode()
        connection.send(serialize_frame(TEXT, text))
        while (echo := self._next_message(connection)) is None:
            await connection.more()
        pid, _, echoed = echo.partition(b" ")
        if echoed != text or not pid.isdigit():
            raise Failed("garbled", f"{text!r} was echoed as {echo[:80]!r}")
        return int(pid)

    def _next_message(self, connection: Connection) -> bytes | None:
        """The next message if it is there; what else arrived before it is dealt with."""
        while frame := parse_frame(connection.buffer):
            opcode, data = frame
            if opcode == TEXT:
                return data
            connection.received = len(connection.buffer)
            if opcode == PING:
                connection.send(serialize_frame(PONG, data))
            elif opcode == CLOSE:
                self._on_close_frame(connection, data)
            elif opcode != PONG:
                raise Failed("garbled", f"a frame with opcode {opcode}")
        return None

    def _on_close_frame(self, connection: Connection, data: bytes) -> NoReturn:
        connection.send(serialize_frame(CLOSE, data[:2]))
        code = int.from_bytes(data[:2], "big")
        if code in RESTARTS:
            raise Restarted
        raise Failed("eof", f"close frame {code or 'without a code'} {data[2:80]!r}")

    async def nap(self, seconds: float) -> None:
        """A nap that a ping or a close frame ends."""
        if not (self.connection and self.connection.buffer):
            await self.account.nap(seconds, self.connection)

    def hang_up(self) -> None:
        if self.connection and not self.account.goes_on():
            self.connection.send(serialize_frame(CLOSE, struct.pack("!H", 1000)))
        super().hang_up()
