"""One datagram: its bytes, its descriptor, its sender."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotrestart_plugins.core.datagram import Endpoint, Packet
from hotrestart_plugins.core.messages import MAX_DATAGRAM
from tests.support.processes import fill_queue

pytestmark = pytest.mark.usefixtures("no_leak")


class Pair:
    """An endpoint bound to a path, and a plain socket that sends to it."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "there")
        self.endpoint = Endpoint()
        self.endpoint.bind(self.path)
        self.raw = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.raw.setblocking(False)

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))]
        self.raw.sendmsg([data], rights if fds else [], 0, self.path)

    def receive(self) -> Packet:
        packet = self.endpoint.receive()
        assert packet is not None
        return packet

    def close(self) -> None:
        self.raw.close()
        self.endpoint.close()


@pytest.fixture
def pair(no_leak: None, meet: Path) -> Iterator[Pair]:
    made = Pair(meet)
    yield made
    made.close()


def test_a_descriptor_arrives_close_on_exec(pair: Pair) -> None:
    """A received descriptor is the file that was sent, and no program started later gets it."""
    reader, writer = os.pipe()
    pair.send(b"\x02", [reader])
    packet = pair.receive()
    assert (packet.data, packet.fault) == (b"\x02", "")
    assert os.fstat(packet.fd).st_ino == os.fstat(reader).st_ino
    assert fcntl.fcntl(packet.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    packet.close()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("number", [2, 3, 10, 253])
def test_several_descriptors_are_a_fault(pair: Pair, number: int) -> None:
    """More than one descriptor in a message is a fault, and none of them stays open."""
    reader, writer = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    pair.send(b"\x02", [reader] * number)
    packet = pair.receive()
    assert packet.fd == -1
    assert "more than one descriptor" in packet.fault
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(reader)
    os.close(writer)


def test_the_longest_datagram(pair: Pair) -> None:
    """A datagram of the size of Volo's buffer is whole."""
    pair.send(b"x" * MAX_DATAGRAM)
    packet = pair.receive()
    assert (packet.data, packet.fault) == (b"x" * MAX_DATAGRAM, "")


@pytest.mark.parametrize("size", [MAX_DATAGRAM + 1, MAX_DATAGRAM + 2, 65536])
def test_a_datagram_that_is_too_long(pair: Pair, size: int) -> None:
    """A longer one is a fault, and the descriptor that came with it is closed."""
    before = len(os.listdir("/proc/self/fd"))
    pair.send(b"x" * size, [0])
    packet = pair.receive()
    assert (packet.fd, packet.fault) == (-1, "longer than 1024 bytes")
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_empty_datagram(pair: Pair) -> None:
    """An empty datagram is a datagram, not the end of anything."""
    pair.send(b"")
    assert pair.receive().data == b""


def test_the_kernel_names_the_sender(pair: Pair, meet: Path) -> None:
    """A datagram comes with its sender's pid, uid and path, which the sender need not give."""
    pair.send(b"\x03")
    sender = pair.receive().sender
    assert (sender.pid, sender.uid, sender.path) == (os.getpid(), os.geteuid(), "")
    pair.raw.bind(str(meet / "here"))
    pair.send(b"\x03")
    assert pair.receive().sender.path == str(meet / "here")


def test_an_abstract_sender_has_no_path(pair: Pair) -> None:
    """A sender with an abstract name is nobody's path."""
    pair.raw.bind("")
    pair.send(b"\x03")
    assert pair.receive().sender.path == ""


def test_nothing_there(pair: Pair) -> None:
    """No datagram: None, at once or after the time that was given."""
    assert pair.endpoint.receive() is None
    assert pair.endpoint.receive_within(0.01) is None
    assert pair.endpoint.receive() is None


def test_a_full_queue(pair: Pair, meet: Path) -> None:
    """Sending to a queue that stays full ends at the deadline, whatever was waited for before."""
    sender = Endpoint()
    sender.bind(str(meet / "sender"))
    sender.connect(pair.path)
    assert sender.receive_within(0.01) is None
    assert fill_queue(pair.path)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        sender.send_before(b"\x03", begun + 0.3)
    assert time.monotonic() >= begun + 0.3
    assert pair.endpoint.receive() is not None
    sender.send_before(b"\x03", time.monotonic())
    sender.close()


def test_nobody_there(meet: Path) -> None:
    """Connecting to a path without a socket, or with a dead one, fails at once."""
    endpoint = Endpoint()
    with pytest.raises(FileNotFoundError):
        endpoint.connect(str(meet / "nobody"))
    dead = Endpoint()
    dead.bind(str(meet / "dead"))
    dead.close()
    with pytest.raises(ConnectionRefusedError):
        endpoint.connect(str(meet / "dead"))
    endpoint.close()
    assert endpoint.fileno() == -1


def test_connected_means_to_that_socket(pair: Pair, meet: Path) -> None:
    """A connected endpoint stays with the socket it connected to, whatever its path is renamed to.

    Nobody else can send to it.
    """
    sender = Endpoint()
    sender.bind(str(meet / "sender"))
    sender.connect(pair.path)
    other = Endpoint()
    other.bind(str(meet / "other"))
    os.rename(meet / "other", pair.path)
    sender.send(b"\x03")
    assert pair.receive().data == b"\x03"
    assert other.receive() is None
    with pytest.raises(PermissionError):
        other.send(b"\x02", to=str(meet / "sender"))
    sender.close()
    other.close()


def test_no_room_for_a_descriptor(pair: Pair) -> None:
    """A process that may open no more files says that, instead of blaming the sender."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    extra = [os.dup(0) for _ in range(16)]
    used = max(*extra, used)
    fill = []
    try:
        pair.send(b"\x02", [0])
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
        try:
            while True:
                fill.append(os.dup(0))
        except OSError:
            pass
        packet = pair.endpoint.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in [*extra, *fill]:
            os.close(fd)
    assert packet is not None
    assert packet.fd == -1
    assert "ulimit -n" in packet.fault
