"""WebSocket frames (RFC 6455), as much as an echo needs."""

from __future__ import annotations

import os
import struct

from demo_app.loadgen.connection import Failed

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
RESTARTS = (1001, 1012)  # going away, service restart

LARGEST_MESSAGE = 1024 * 1024


class Restarted(Exception):
    """The server closed the WebSocket with one of RESTARTS."""


def serialize_frame(opcode: int, data: bytes) -> bytes:
    """A masked frame, as clients send it, of less than 64 KiB."""
    size = len(data)
    head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    if size > 125:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    key = os.urandom(4)
    mask = (key * (size // 4 + 1))[:size]
    masked = int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")
    return head + key + masked.to_bytes(size, "big")


def parse_frame(buffer: bytearray) -> tuple[int, bytes] | None:
    """Take a frame off the buffer: opcode and data. None as long as it is not whole."""
    if len(buffer) < 2:
        return None
    first, size, start = buffer[0], buffer[1], 2
    if first & 0x70 or size & 0x80 or not first & 0x80:
        raise Failed("garbled", f"no plain WebSocket frame: {bytes(buffer[:16])!r}")
    if size >= 126:
        start = 4 if size == 126 else 10
        if len(buffer) < start:
            return None
        size = int.from_bytes(buffer[2:start], "big")
    if size > LARGEST_MESSAGE:
        raise Failed("garbled", f"a frame of {size} bytes is more than we take")
    if len(buffer) < start + size:
        return None
    data = bytes(buffer[start : start + size])
    del buffer[: start + size]
    return first & 15, data
