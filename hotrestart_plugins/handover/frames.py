"""Messages that carry established connections from one process to another.

The channel is a SOCK_SEQPACKET connection. Each process that receives has a listener of its own in
the hot-restart directory, which a Volo process never looks for: ``to-new.ID.PID`` in the new
instance of a takeover, ``to-old.ID.PID`` in the old one. A batch is one message: the version of
this format, the number of the batch, a byte for the state of each connection, and the descriptors
in its ancillary data. The answer is the version and the number, or nothing::

    sender                                   receiver
    stops reading
    batch, up to 253 descriptors    -->      checks the message
                                    <--      its number: 'these are mine now'
    closes its copies                        reads

Until the number has arrived, the sender keeps its copies and may read them again: if the channel
ends first, what was not acknowledged never belonged to the receiver. The receiver reads nothing
before it has sent its acknowledgement. So a connection is never served by both, and never by none.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hotrestart_plugins.core import credentials
from hotrestart_plugins.core.datagram import close_all
from hotrestart_plugins.core.platform import poll
from hotrestart_plugins.errors import MessageError

MAX_DESCRIPTORS = 253
"""Descriptors that fit in one message: SCM_MAX_FD, unix(7)."""

VERSION = 1
"""The version of this format, the first byte of every message. Others are refused."""

_HEADER = struct.Struct("=BI")  # version, number of the batch
_FD_SIZE = 4
_BACKLOG = 64
_TCP = {socket.IPPROTO_TCP, 262}  # and IPPROTO_MPTCP, linux/in.h


class ConnectionState(bytes, enum.Enum):
    """What a connection waits for."""

    FRESH = b"u"
    """It was accepted, and nothing was read from it."""
    IDLE = b"i"
    """Its last request was answered."""


_STATES = {state.value[0]: state for state in ConnectionState}


class Side(enum.Enum):
    """One of the two instances of a takeover."""

    OLD = "old"
    NEW = "new"


class HandoverTarget(NamedTuple):
    """The instance that receives connections."""

    directory: Path
    """The hot-restart directory."""
    takeover_id: int
    """The child's, see `RendezvousDirectory.child_takeover_id`."""
    side: Side
    """Which instance of that takeover it is."""


class ReceivedConnection(NamedTuple):
    """One connection that was received. The receiver owns the socket."""

    sock: socket.socket
    state: ConnectionState


class ReceivedBatch(NamedTuple):
    """The content of one message."""

    number: int
    connections: list[ReceivedConnection]
    refused: list[str]
    """What each descriptor was that is no connection; those descriptors are closed."""


def path_of(target: HandoverTarget, process_pid: int) -> Path:
    """Return the path at which a process of the target listens for connections.

    Its name is at most as long as that of the parent socket, so it fits wherever that does.
    """
    return target.directory / f"{_prefix(target)}{process_pid}"


def _prefix(target: HandoverTarget) -> str:
    return f"to-{target.side.value}.{target.takeover_id:x}."


def receivers(target: HandoverTarget) -> list[Path]:
    """Return the paths at which the target's processes listen; none, if this one may not look."""
    try:
        return sorted(target.directory.glob(f"{_prefix(target)}*"))
    except PermissionError:  # up to Python 3.12; later versions find nothing
        return []


def listen(path: Path) -> socket.socket:
    """Return a listener for channels at `path`. The caller owns both. Raises OSError.

    Removes the paths that killed processes of earlier takeovers have left in the directory.
    """
    path.unlink(missing_ok=True)
    for other in path.parent.glob("to-*.*.*"):
        if _takeover_of(other) == _takeover_of(path):
            continue  # its process lives, but may be between bind(2) and listen(2)
        with contextlib.suppress(OSError), _socket() as probe:
            try:
                probe.connect(str(other))
            except ConnectionRefusedError:
                other.unlink(missing_ok=True)
    sock = _socket()
    try:
        sock.bind(str(path))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _takeover_of(path: Path) -> str:
    return path.name.split(".")[1]


def connect(path: Path) -> socket.socket:
    """Return a channel to the process that listens at `path`; the caller owns it.

    Does not wait. Raises OSError, and WrongPeer.
    """
    sock = _socket()
    try:
        sock.connect(str(path))
        check(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    return sock


def check(channel: socket.socket) -> None:
    """Raise WrongPeer unless the kernel names this user or root as the other side."""
    credentials.check(*credentials.of_peer(channel))


def send(channel: socket.socket, number: int, batch: Sequence[tuple[int, ConnectionState]]) -> None:
    """Send a batch of descriptors, which stay the caller's. Raises BlockingIOError, OSError."""
    states = b"".join(state.value for _, state in batch)
    fds = struct.pack(f"={len(batch)}i", *(fd for fd, _ in batch))
    channel.sendmsg(
        [_HEADER.pack(VERSION, number) + states], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
    )


def receive(channel: socket.socket) -> ReceivedBatch | None:
    """Return the next batch, whose sockets are the caller's; None at the end of the channel.

    Raises BlockingIOError, OSError, and MessageError for a message that cannot be accepted as a
    whole. Its descriptors are closed then, and it must not be acknowledged.
    """
    data, ancillary, flags, _ = channel.recvmsg(
        _HEADER.size + MAX_DESCRIPTORS,
        socket.CMSG_SPACE(MAX_DESCRIPTORS * _FD_SIZE),
        socket.MSG_CMSG_CLOEXEC,
    )
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(struct.unpack(f"={len(content) // _FD_SIZE}i", content))
    if not data and not fds:
        return None
    try:
        number, states = _parse(data, flags, len(fds))
    except MessageError:
        close_all(fds)
        raise
    return ReceivedBatch(number, *_connections(fds, states))


def _parse(data: bytes, flags: int, descriptors: int) -> tuple[int, list[ConnectionState]]:
    _check_version(data)
    states = data[_HEADER.size :]
    # Cut off: this process has no room for more descriptors.
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or descriptors != len(states):
        raise MessageError(f"{descriptors} of {len(states)} connections came (descriptor limit?)")
    if len(data) < _HEADER.size or not _STATES.keys() >= set(states):
        raise MessageError(f"{data[:20]!r} is no batch of connections")
    _, number = _HEADER.unpack_from(data)
    return int(number), [_STATES[state] for state in states]


def _check_version(data: bytes) -> None:
    if data and data[0] != VERSION:
        raise MessageError(
            f"the other instance speaks version {data[0]} of the handover, this one {VERSION}"
        )


def _connections(
    fds: list[int], states: list[ConnectionState]
) -> tuple[list[ReceivedConnection], list[str]]:
    """Return the connections among the descriptors, and what the others were; those are closed.

    This is the only place that decides what may be handed over, for every server. A connection
    whose client has reset it meanwhile is in neither list: nobody needs to look into that.
    """
    connections: list[ReceivedConnection] = []
    refused: list[str] = []
    for fd, state in zip(fds, states, strict=True):
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            close_all([fd])
            refused.append("no socket")
            continue
        if not _is_stream(sock):
            refused.append(f"{_name(sock.family)} {_name(sock.type)}")
        elif _is_connected(sock):
            connections.append(ReceivedConnection(sock, state))
            continue
        elif not _was_reset(sock):
            refused.append(f"{_name(sock.family)} {_name(sock.type)}, not connected")
        sock.close()
    return connections, refused


def _is_stream(sock: socket.socket) -> bool:
    if sock.type != socket.SOCK_STREAM:
        return False
    if sock.family == socket.AF_UNIX:
        return True
    return sock.family in (socket.AF_INET, socket.AF_INET6) and sock.proto in _TCP


def _is_connected(sock: socket.socket) -> bool:
    """Return False also for a listening socket, which has no peer either."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _was_reset(sock: socket.socket) -> bool:
    """Return whether a socket without a peer had one: only then both directions are shut down."""
    waiting = poll()
    waiting.register(sock, select.POLLRDHUP)
    return any(found & select.POLLRDHUP for _, found in waiting.poll(0))


def _name(value: int) -> str:
    return value.name if isinstance(value, enum.Enum) else str(value)


def acknowledge(channel: socket.socket, number: int) -> None:
    """Say that the batch was received. Raises OSError if the other side cannot hear it."""
    channel.send(_HEADER.pack(VERSION, number))


def acknowledged(channel: socket.socket) -> int | None:
    """Return the number of a batch that was received; None at the end of the channel.

    Raises BlockingIOError, OSError, and MessageError for anything else.
    """
    data = channel.recv(_HEADER.size + 1)
    if not data:
        return None
    _check_version(data)
    if len(data) != _HEADER.size:
        raise MessageError(f"{data!r} is no acknowledgement")
    _, number = _HEADER.unpack(data)
    return int(number)


def cut(channel: socket.socket) -> list[int]:
    """End a channel; return the acknowledged numbers that were not read yet. Closes it.

    From here on the other side's acknowledgement fails, so what is not among them stays here.
    """
    numbers: list[int] = []
    with channel, contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)
        while True:
            try:
                number = acknowledged(channel)
            except (ConnectionResetError, MessageError):
                # The first is raised once, before what is in the queue, if the other side has
                # closed the channel with batches unread.
                continue
            if number is None:
                break
            numbers.append(number)
    return numbers
