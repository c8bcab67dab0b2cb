"""Established connections, from one process to another: the channel, and its rules.

A channel of its own, which a Volo peer never sees: a SOCK_SEQPACKET listener of each process of the
new instance in the meeting directory, ``moved.ID.PID``. A batch is one message: its
number and a byte for each connection, the descriptors beside it. The answer is its number, or
nothing::

    old                                     new
    stops reading
    batch, up to 253 descriptors   -->      checks the message
                                   <--      its number: 'mine from here on'
    closes its copies                       reads

Until the number has come the old process holds its copies and may read again: if the channel ends
first, what was not acknowledged never was the new one's. The new one reads nothing before its
acknowledgement has gone out. So a connection is never served by both, and never by none.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hotrestart_plugins.core import credentials
from hotrestart_plugins.core.datagram import close_all
from hotrestart_plugins.errors import MessageError

MAX_DESCRIPTORS = 253
"""Descriptors that fit in one message: SCM_MAX_FD, unix(7)."""

_PREFIX = "moved."
"""Short: where the parent socket's path fits in 107 bytes, those of the listeners have to, too."""

_NUMBER = struct.Struct("=I")
_FD_SIZE = 4
_BACKLOG = 64


class ConnectionState(bytes, enum.Enum):
    """What a connection waits for."""

    FRESH = b"u"
    """It was accepted, and nothing was read from it."""
    IDLE = b"i"
    """Its last request was answered."""


_STATES = {state.value[0]: state for state in ConnectionState}


class HandoverTarget(NamedTuple):
    """Where connections may go."""

    directory: Path
    """The meeting directory."""
    takeover_id: int
    """The child's, see `RendezvousDirectory.child_takeover_id`."""


class ReceivedConnection(NamedTuple):
    """One connection that came. Whoever receives it owns the socket."""

    sock: socket.socket
    state: ConnectionState


def path_of(target: HandoverTarget, process_pid: int) -> Path:
    """Where a process of the new instance listens for connections."""
    return target.directory / f"{_PREFIX}{target.takeover_id:x}.{process_pid}"


def receivers(target: HandoverTarget) -> list[Path]:
    """Where the processes of the new instance listen; none, if this one may not look."""
    try:
        return sorted(target.directory.glob(f"{_PREFIX}{target.takeover_id:x}.*"))
    except PermissionError:  # up to Python 3.12; later ones find nothing
        return []


def listen(path: Path) -> socket.socket:
    """A listener for channels; the caller owns it, and the file. Raises OSError.

    What killed processes of other instances have left in the directory goes.
    """
    path.unlink(missing_ok=True)
    for left in path.parent.glob(f"{_PREFIX}*.*"):
        if left.stem == path.stem:
            continue  # of this instance: bound, it may be, and not listening yet
        with contextlib.suppress(OSError), _socket() as probe:
            try:
                probe.connect(str(left))
            except ConnectionRefusedError:
                left.unlink(missing_ok=True)
    sock = _socket()
    try:
        sock.bind(str(path))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: Path) -> socket.socket:
    """A channel to who listens there; the caller owns it. Raises OSError, WrongPeer."""
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
    channel.sendmsg([_NUMBER.pack(number) + states], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def receive(channel: socket.socket) -> tuple[int, list[ReceivedConnection]] | None:
    """A batch, its sockets the caller's; None at the end of the channel.

    Raises BlockingIOError, OSError, and MessageError for what cannot be taken as a whole: the
    descriptors are closed then, and must not be acknowledged.
    """
    data, ancillary, flags, _ = channel.recvmsg(
        _NUMBER.size + MAX_DESCRIPTORS,
        socket.CMSG_SPACE(MAX_DESCRIPTORS * _FD_SIZE),
        socket.MSG_CMSG_CLOEXEC,
    )
    if not data:
        return None
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(struct.unpack(f"={len(content) // _FD_SIZE}i", content))
    states = data[_NUMBER.size :]
    # Cut off: this process has no room for more descriptors.
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) != len(states):
        close_all(fds)
        raise MessageError(f"{len(fds)} of {len(states)} connections came (descriptor limit?)")
    if len(data) < _NUMBER.size or not _STATES.keys() >= set(states):
        close_all(fds)
        raise MessageError(f"{data[:20]!r} is no batch of connections (another version?)")
    (number,) = _NUMBER.unpack_from(data)
    return number, _connections(fds, states)


def _connections(fds: list[int], states: bytes) -> list[ReceivedConnection]:
    """What each descriptor is, and that it does not block, is seen to by the event loop."""
    found: list[ReceivedConnection] = []
    for fd, state in zip(fds, states, strict=True):
        try:
            found.append(ReceivedConnection(socket.socket(fileno=fd), _STATES[state]))
        except OSError:  # no socket
            close_all([fd])
    return found


def acknowledge(channel: socket.socket, number: int) -> None:
    """Say that the batch was taken. Raises OSError if the other side cannot hear it."""
    channel.send(_NUMBER.pack(number))


def acknowledged(channel: socket.socket) -> int | None:
    """The number of a batch that was taken; None at the end. Raises BlockingIOError, OSError."""
    data = channel.recv(_NUMBER.size)
    if len(data) < _NUMBER.size:
        return None
    (number,) = _NUMBER.unpack(data)
    return int(number)


def cut(channel: socket.socket) -> list[int]:
    """End a channel; the numbers that were acknowledged and not yet heard. Closes it.

    From here on the other side's acknowledgement fails, so what is not among them stays here.
    """
    numbers: list[int] = []
    with channel, contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)
        while True:
            try:
                number = acknowledged(channel)
            except ConnectionResetError:
                continue  # told once, before what is in the queue: it closed with batches unread
            if number is None:
                break
            numbers.append(number)
    return numbers
