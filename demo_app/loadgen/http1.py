"""Answers in HTTP/1.1, as far as servers send them: by length, in chunks, or up to the end."""

from __future__ import annotations

import functools
from typing import NamedTuple

from demo_app.loadgen.connection import Connection, Failed

LARGEST_HEAD = 64 * 1024
LARGEST_BODY = 16 * 1024 * 1024


class Head(NamedTuple):
    """What matters of the head of an answer."""

    status: int
    pid: int  # X-Served-By; 0 if it says nothing
    length: int | None
    chunked: bool
    close: bool
    websocket_accept: str


@functools.lru_cache(maxsize=1024)  # the heads of one second are mostly the same bytes
def parse_head(head: bytes) -> Head:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (len(status) == 3 and status.isdecimal()):
        raise Failed("garbled", f"status line {first[:80]!r}")
    headers = {}
    for line in filter(None, lines):
        name, colon, value = line.partition(":")
        if not colon:
            raise Failed("garbled", f"header line {line[:80]!r}")
        headers[name.lower()] = value.strip()
    length, pid = headers.get("content-length"), headers.get("x-served-by", "")
    if length is not None and not length.isdecimal():
        raise Failed("garbled", f"content-length {length[:80]!r}")
    options = [one.strip().lower() for one in headers.get("connection", "").split(",")]
    return Head(
        status=int(status),
        pid=int(pid) if pid.isdecimal() else 0,
        length=int(length) if length is not None else None,
        chunked=headers.get("transfer-encoding", "").lower() == "chunked",
        close="close" in options or (version == "HTTP/1.0" and "keep-alive" not in options),
        websocket_accept=headers.get("sec-websocket-accept", ""),
    )


async def read_head(connection: Connection) -> Head:
    """The head of the answer; those of interim answers (1xx) are passed over."""
    buffer = connection.buffer
    while True:
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if not b"HTTP/1.".startswith(buffer[:7]) or len(buffer) > LARGEST_HEAD:
                raise Failed("garbled", f"it begins {bytes(buffer[:80])!r}")
            await connection.more()
        head = parse_head(bytes(buffer[:end]))
        del buffer[: end + 4]
        if head.status >= 200 or head.status == 101:
            return head


async def read_body(connection: Connection, head: Head) -> bytes:
    buffer = connection.buffer
    if head.status in (101, 204, 304):
        return b""
    if head.chunked:
        return await _read_chunks(connection)
    if head.length is not None:
        return await _take(connection, head.length)
    connection.announced = True  # this body ends with its connection
    while not connection.ended and len(buffer) <= LARGEST_BODY:
        await connection.more()
    if connection.error or connection.late:
        raise connection.how_it_ended()
    return await _take(connection, len(buffer))


async def _read_chunks(connection: Connection) -> bytes:
    body = bytearray()
    while True:
        size = await _take_line(connection)
        try:
            count = int(size.partition(b";")[0], 16)
        except ValueError:
            raise Failed("garbled", f"chunk size {size[:80]!r}") from None
        if count == 0:
            while await _take_line(connection):
                pass  # trailers
            return bytes(body)
        body += await _take(connection, count)
        if await _take_line(connection) or len(body) > LARGEST_BODY:
            raise Failed("garbled", "a chunk is longer than it said, or the body than we take")


async def _take(connection: Connection, count: int) -> bytes:
    buffer = connection.buffer
    if count > LARGEST_BODY:
        raise Failed("garbled", f"a body of {count} bytes is more than we take")
    while len(buffer) < count:
        await connection.more()
    data = bytes(buffer[:count])
    del buffer[:count]
    return data


async def _take_line(connection: Connection) -> bytes:
    buffer = connection.buffer
    while (end := buffer.find(b"\r\n")) < 0:
        if len(buffer) > LARGEST_HEAD:
            raise Failed("garbled", "a line without an end")
        await connection.more()
    line = bytes(buffer[:end])
    del buffer[: end + 2]
    return line


async def read_answer(connection: Connection) -> tuple[int, bytes]:
    """The pid that answered, and the body. `Failed` if it is not a 2xx."""
    head = await read_head(connection)
    connection.announced = head.close
    body = await read_body(connection, head)
    if not 200 <= head.status < 300:
        raise Failed("status", f"HTTP {head.status}")
    return head.pid, body
