"""Who the other side is, by the kernel's word, and whether it may take part."""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

from hotrestart_plugins.errors import WrongPeer

_UCRED = struct.Struct("=iII")  # struct ucred, unix(7): pid, uid, gid
SIZE = _UCRED.size
"""Bytes of the kernel's structure."""


class Credentials(NamedTuple):
    """A process and its user."""

    pid: int
    uid: int


def parse(content: bytes) -> Credentials:
    """From at least `SIZE` bytes of a control message, or of a socket option."""
    pid, uid, _gid = _UCRED.unpack_from(content)
    return Credentials(pid, uid)


def of_peer(sock: socket.socket) -> Credentials:
    """Of who connected, or called listen(2), at the other end of a Unix socket. Raises OSError."""
    return parse(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, SIZE))


def check(pid: int, uid: int) -> None:
    """Raise WrongPeer unless this user, or root, is the other side."""
    if uid not in (0, os.geteuid()):
        raise WrongPeer(f"pid {pid} runs as uid {uid}, not as {os.geteuid()} or root")
