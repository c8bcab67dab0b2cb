"""The three messages, and nothing else: messages to bytes, bytes to messages.

This file knows no socket. Whatever the bytes mean is here; whoever moves them knows nothing of it.

The layout is that of Volo 0.12.3 (``hot_restart.rs``), byte for byte: one type byte; behind a
request a u32 length in native byte order and the address in UTF-8. The descriptor of a response
travels beside the bytes, as SCM_RIGHTS, and is the transport's affair.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hotrestart_plugins.errors import MessageError

MAX_DATAGRAM = 1024
"""Bytes. Volo receives into a buffer of this size; anything longer would reach it cut off."""

_REQUEST_HEAD = struct.Struct("=BI")
MAX_ADDRESS = MAX_DATAGRAM - _REQUEST_HEAD.size
"""Bytes that the UTF-8 of an address may take in a request."""


@dataclass(frozen=True)
class PassFdRequest:
    """Child to parent: hand me a copy of the listener bound to `address`."""

    TYPE = 1
    address: str

    def serialize(self) -> bytes:
        """The datagram; raises `MessageError` if the address is empty, too long, or not UTF-8."""
        try:
            body = self.address.encode()
        except UnicodeEncodeError:
            raise MessageError(f"the address {self.address!r} is not UTF-8") from None
        if not 0 < len(body) <= MAX_ADDRESS:
            raise MessageError(
                f"an address of {len(body)} bytes cannot be asked for: 1 to {MAX_ADDRESS} fit"
            )
        return _REQUEST_HEAD.pack(self.TYPE, len(body)) + body


@dataclass(frozen=True)
class PassFdResponse:
    """Parent to child: the descriptor that comes with it, or, without one, 'I have none'."""

    TYPE = 2

    def serialize(self) -> bytes:
        """The datagram."""
        return b"\x02"


@dataclass(frozen=True)
class TerminateParentRequest:
    """Child to parent: I serve; stop accepting, drain, and go."""

    TYPE = 3

    def serialize(self) -> bytes:
        """The datagram."""
        return b"\x03"


Message = PassFdRequest | PassFdResponse | TerminateParentRequest

_BARE: dict[bytes, Message] = {
    b"\x02": PassFdResponse(),
    b"\x03": TerminateParentRequest(),
}


def parse(data: bytes) -> Message:
    """The message in one datagram; raises `MessageError`, and nothing else, for anything else.

    Strict where Volo is trusting: the length must be that of what follows it, the address must be
    UTF-8 and not empty, and nothing may follow a message. All that a Volo process sends passes.
    """
    bare = _BARE.get(data)
    if bare is not None:
        return bare
    if not data:
        raise MessageError("an empty datagram")
    if data[0] != PassFdRequest.TYPE:
        if data[:1] in _BARE:
            raise MessageError(f"a message of type {data[0]} with {len(data) - 1} bytes behind it")
        raise MessageError(f"unknown message type {data[0]}")
    if len(data) < _REQUEST_HEAD.size:
        raise MessageError(f"a request cut off after {len(data)} bytes")
    _, length = _REQUEST_HEAD.unpack_from(data)
    body = data[_REQUEST_HEAD.size :]
    if length != len(body) or not body:
        raise MessageError(f"a request that announces {length} bytes and carries {len(body)}")
    if length > MAX_ADDRESS:
        raise MessageError(f"a request for an address of {length} bytes: {MAX_ADDRESS} fit")
    try:
        return PassFdRequest(body.decode())
    except UnicodeDecodeError:
        raise MessageError("a request for an address that is not UTF-8") from None
