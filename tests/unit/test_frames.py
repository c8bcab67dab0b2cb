"""The channel that connections move through."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.rendezvous import PARENT_SOCKET
from hotrestart_plugins.errors import MessageError
from hotrestart_plugins.handover import frames
from hotrestart_plugins.handover.frames import (
    MAX_DESCRIPTORS,
    VERSION,
    ConnectionState,
    HandoverTarget,
    Side,
)
from hotrestart_plugins.handover.receiver import ConnectionReceiver
from tests.support.processes import DEADLINE

LOG = logging.getLogger(__name__)
pytestmark = pytest.mark.usefixtures("no_leak")
Channel = tuple[socket.socket, socket.socket]
STRANGER = 65534
HEAD = struct.pack("=BI", VERSION, 1)


@pytest.fixture
def channel(no_leak: None) -> Iterator[Channel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.setblocking(False)
        yield ours, theirs


@pytest.mark.descriptors
def test_a_batch_arrives_in_its_order(channel: Channel) -> None:
    ours, theirs = channel
    pairs = [socket.socketpair() for _ in range(MAX_DESCRIPTORS)]
    states = [
        ConnectionState.IDLE if index % 3 else ConnectionState.FRESH
        for index in range(MAX_DESCRIPTORS)
    ]
    sent = [(pair[0].fileno(), state) for pair, state in zip(pairs, states, strict=True)]
    frames.send(ours, 7, sent)
    found = frames.receive(theirs)
    assert found is not None
    number, arrivals, refused = found
    assert not refused
    assert (number, [one.state for one in arrivals]) == (7, states)
    for index, (pair, arrival) in enumerate(zip(pairs, arrivals, strict=True)):
        assert not os.get_inheritable(arrival.sock.fileno())
        pair[0].close()
        with arrival.sock, pair[1]:
            arrival.sock.send(b"%d" % index)
            assert pair[1].recv(8) == b"%d" % index


def test_an_acknowledgement_is_the_number(channel: Channel) -> None:
    ours, theirs = channel
    frames.acknowledge(theirs, 7)
    assert frames.acknowledged(ours) == 7
    theirs.close()
    assert frames.acknowledged(ours) is None


def test_what_was_acknowledged_before_the_end_counts(channel: Channel) -> None:
    ours, theirs = channel
    frames.acknowledge(theirs, 1)
    frames.acknowledge(theirs, 2)
    assert frames.cut(ours) == [1, 2]
    with pytest.raises(BrokenPipeError):
        frames.acknowledge(theirs, 3)


def test_so_it_does_where_the_other_side_closed_with_batches_unread(channel: Channel) -> None:
    """The kernel tells of that first, as an error."""
    ours, theirs = channel
    with socket.socket() as sock:
        frames.send(ours, 1, [(sock.fileno(), ConnectionState.IDLE)])
        frames.acknowledge(theirs, 1)
        theirs.close()
    assert frames.cut(ours) == [1]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(HEAD + b"x", id="a state that there is not"),
        pytest.param(HEAD + b"ii", id="fewer descriptors than it says"),
        pytest.param(HEAD, id="more descriptors than it says"),
        pytest.param(b"", id="nothing but descriptors"),
        pytest.param(b"\2" + HEAD[1:] + b"i", id="another version"),
    ],
)
def test_a_message_that_is_not_understood_is_refused_whole(channel: Channel, data: bytes) -> None:
    """Its descriptors are closed, and the sender keeps its own."""
    ours, theirs = channel
    with open(os.devnull) as file:
        socket.send_fds(ours, [data], [file.fileno()])
    with pytest.raises(MessageError):
        frames.receive(theirs)


def test_a_message_without_a_whole_number_is_refused(channel: Channel) -> None:
    ours, theirs = channel
    ours.send(HEAD[:2])
    with pytest.raises(MessageError):
        frames.receive(theirs)


def test_a_descriptor_that_is_no_socket_is_closed(channel: Channel) -> None:
    ours, theirs = channel
    with open(os.devnull) as file:
        frames.send(ours, 1, [(file.fileno(), ConnectionState.IDLE)])
    assert frames.receive(theirs) == (1, [], ["no socket"])


def test_its_path_fits_where_that_of_the_parent_socket_does() -> None:
    """With the largest pid, 2^22, and a time of the year 2100."""
    for side in Side:
        path = frames.path_of(HandoverTarget(Path("/"), 4102444800_000000, side), 1 << 22)
        assert len(path.name) <= len(PARENT_SOCKET)


def test_what_the_killed_have_left_goes(meet: Path) -> None:
    """A path of another takeover at which nobody listens; those of either side of this one stay,
    and one at which somebody listens."""
    live, dead, ours, theirs = (
        meet / name for name in ("to-new.1.2", "to-old.1.3", "to-new.9.8", "to-old.9.7")
    )
    with frames.listen(live) as listening:
        frames.listen(dead).close()
        ours.touch()
        theirs.touch()
        frames.listen(meet / "to-new.9.9").close()
        assert (live.exists(), dead.exists()) == (True, False)
        assert ours.exists()
        assert theirs.exists()
        channel, _ = listening.accept()  # it was asked whether it lives
        with channel:
            assert frames.acknowledged(channel) is None


def test_no_room_for_a_channel(meet: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is taken up when there is: the listener, which stays readable, is left alone meanwhile."""
    asyncio.run(_no_room(HandoverTarget(meet, 1, Side.NEW), caplog))


async def _no_room(target: HandoverTarget, caplog: pytest.LogCaptureFixture) -> None:
    came: list[frames.ReceivedConnection] = []
    loop = asyncio.get_running_loop()
    receiver = ConnectionReceiver(target, came.append, loop=loop, journal=Journal(LOG))
    path = frames.path_of(target, os.getpid())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.closing(receiver), frames.connect(path) as ours, socket.socket() as sock:
        frames.send(ours, 1, [(sock.fileno(), ConnectionState.IDLE)])
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            for _ in range(20):
                await asyncio.sleep(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert [one.getMessage() for one in caplog.records] == [
            "Could not receive connections: [Errno 24] Too many open files"
        ]
        acknowledged = asyncio.Event()
        loop.add_reader(ours.fileno(), acknowledged.set)
        await asyncio.wait_for(acknowledged.wait(), DEADLINE)
        loop.remove_reader(ours.fileno())
        assert frames.acknowledged(ours) == 1
    for one in came:
        one.sock.close()


@pytest.mark.root
def test_who_may_not_look_finds_nobody(meet: Path) -> None:
    """A process that has become another user, in a directory below one that is closed to it, as
    the default ones are."""
    target = HandoverTarget(meet / "address", 9, Side.NEW)
    target.directory.mkdir(0o700)
    with frames.listen(frames.path_of(target, 8)):
        assert len(frames.receivers(target)) == 1
        os.seteuid(STRANGER)
        try:
            assert frames.receivers(target) == []
        finally:
            os.seteuid(0)
