"""The bytes of the three messages, in both directions."""

from __future__ import annotations

import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotrestart_plugins.core.messages import (
    MAX_ADDRESS,
    MAX_DATAGRAM,
    Message,
    PassFdRequest,
    PassFdResponse,
    TerminateParentRequest,
    parse,
)
from hotrestart_plugins.errors import MessageError

LITTLE = sys.byteorder == "little"


def length(number: int) -> bytes:
    return bytes([number, 0, 0, 0]) if LITTLE else bytes([0, 0, 0, number])


BYTES: list[tuple[Message, bytes]] = [
    (PassFdRequest("127.0.0.1:8000"), b"\x01" + length(14) + b"127.0.0.1:8000"),
    (PassFdRequest("[::1]:8000"), b"\x01" + length(10) + b"[::1]:8000"),
    (PassFdRequest("/run/app.sock"), b"\x01" + length(13) + b"/run/app.sock"),
    (PassFdRequest("/tmp/ä"), b"\x01" + length(7) + b"/tmp/\xc3\xa4"),
    (PassFdResponse(), b"\x02"),
    (TerminateParentRequest(), b"\x03"),
]


@pytest.mark.parametrize(("message", "data"), BYTES)
def test_a_message_is_these_bytes(message: Message, data: bytes) -> None:
    """Each message is, byte for byte, what Volo writes."""
    assert message.serialize() == data


@pytest.mark.parametrize(("message", "data"), BYTES)
def test_these_bytes_are_a_message(message: Message, data: bytes) -> None:
    """What Volo writes is read as the message that it is."""
    assert parse(data) == message


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "an empty datagram"),
        (b"\x00", "unknown message type 0"),
        (b"\x04", "unknown message type 4"),
        (b"\xff" * 1024, "unknown message type 255"),
        (b"\x02\x00", "a message of type 2 with 1 bytes behind it"),
        (b"\x03\x03", "a message of type 3 with 1 bytes behind it"),
        (b"\x01", "a request cut off after 1 bytes"),
        (b"\x01\x05\x00\x00", "a request cut off after 4 bytes"),
        (b"\x01" + length(0), "a request that announces 0 bytes and carries 0"),
        (b"\x01" + length(5) + b"/abc", "a request that announces 5 bytes and carries 4"),
        (b"\x01" + length(3) + b"/abc", "a request that announces 3 bytes and carries 4"),
        (b"\x01" + b"\xff" * 4 + b"/", "a request that announces 4294967295 bytes and carries 1"),
        (b"\x01" + length(2) + b"/\xff", "a request for an address that is not UTF-8"),
        (b"\x01" + length(3) + b"\xed\xa0\x80", "a request for an address that is not UTF-8"),
    ],
)
def test_bytes_that_are_no_message(data: bytes, why: str) -> None:
    """Whatever Volo would not send is refused, and the error says what is wrong with it."""
    with pytest.raises(MessageError) as error:
        parse(data)
    assert str(error.value) == why


def test_the_longest_address() -> None:
    """An address that fills Volo's buffer passes in both directions; one byte more in neither."""
    longest = PassFdRequest("/" + "x" * (MAX_ADDRESS - 1))
    assert len(longest.serialize()) == MAX_DATAGRAM == 1024
    assert parse(longest.serialize()) == longest
    too_long = longest.address + "x"
    with pytest.raises(MessageError, match="1020 bytes"):
        PassFdRequest(too_long).serialize()
    with pytest.raises(MessageError, match="1020 bytes"):
        parse(struct.pack("=BI", 1, len(too_long)) + too_long.encode())


@pytest.mark.parametrize("address", ["", "/\udcff"])
def test_an_address_that_cannot_be_asked_for(address: str) -> None:
    """An address that is empty or not UTF-8 is refused before it is sent."""
    with pytest.raises(MessageError):
        PassFdRequest(address).serialize()


addresses = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=MAX_ADDRESS
).filter(lambda address: len(address.encode()) <= MAX_ADDRESS)


@given(addresses)
def test_every_request_comes_back(address: str) -> None:
    """A request that is written and read is the same request."""
    assert parse(PassFdRequest(address).serialize()) == PassFdRequest(address)


requests = st.builds(
    lambda number, body: struct.pack("=BI", 1, number) + body,
    st.integers(0, 2**32 - 1) | st.integers(0, 40),
    st.binary(max_size=40),
)


@given(st.binary(max_size=2048) | requests)
def test_arbitrary_bytes(data: bytes) -> None:
    """Any bytes are either exactly one message's, or MessageError; nothing else happens."""
    try:
        message = parse(data)
    except MessageError:
        return
    assert message.serialize() == data
