"""The only sendmsg and recvmsg of the takeover: a datagram, its descriptor, its sender.

Works on the C-level socket type, so that gevent's patched `socket` module changes nothing here:
a wait blocks this process, for a bounded time, and never switches to another greenlet.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import struct
import time
from typing import NamedTuple

from hotrestart_plugins.core import credentials
from hotrestart_plugins.core.messages import MAX_DATAGRAM

_FD = struct.Struct("=i")
# Room for the credentials and one descriptor. Alignment lets a second descriptor in without
# MSG_CTRUNC, so the number that arrived is counted as well.
_ANCILLARY = _socket.CMSG_SPACE(credentials.SIZE) + _socket.CMSG_SPACE(_FD.size)
_FLAGS = _socket.MSG_CMSG_CLOEXEC

GONE = (ConnectionRefusedError, ConnectionResetError, BrokenPipeError, FileNotFoundError)
"""What sending to a process that has ended raises."""

_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM)  # no room now; there may be some in a moment

SLICE = 0.2
"""Seconds that one wait may last before whoever waits looks whether the other side still lives."""


class Sender(NamedTuple):
    """Who sent a datagram, by the kernel's word (SCM_CREDENTIALS), never by the sender's."""

    pid: int
    """0 if the process cannot be seen from this pid namespace."""
    uid: int
    path: str
    """The path its socket was bound to; empty for a socket without a name."""


class Packet(NamedTuple):
    """One datagram. Whoever receives it owns `fd` and closes it."""

    data: bytes
    fd: int
    """A descriptor of this process, close-on-exec, or -1."""
    sender: Sender
    fault: str
    """Why the datagram cannot be believed (cut off, several descriptors), or empty.

    A faulty packet carries no descriptor: those that came were closed.
    """

    def close(self) -> None:
        """Close the descriptor, if one came."""
        if self.fd >= 0:
            os.close(self.fd)


class Endpoint:
    """One Unix datagram socket, which it owns. The kernel names the sender of all it receives."""

    def __init__(self) -> None:
        self._sock = _socket.socket(
            _socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        )
        # Before the socket has a name: no datagram can be queued without its credentials.
        self._sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        self._sock.settimeout(0)

    def bind(self, path: str) -> None:
        """Give the socket a name; raises OSError, EADDRINUSE if the path exists."""
        self._sock.bind(path)

    def connect(self, path: str) -> None:
        """Send to, and receive from, only what is bound there now, whatever the path later names.

        Raises ConnectionRefusedError if nobody holds that socket, FileNotFoundError if none is.
        """
        self._sock.connect(path)

    def fileno(self) -> int:
        """The descriptor, for whoever waits until it is readable; -1 once closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket; what it had not received is dropped. The path stays."""
        self._sock.close()

    def send(self, data: bytes, *, fd: int = -1, to: str | None = None) -> None:
        """Send one datagram without waiting; `fd`, if not -1, goes along and stays the caller's.

        Raises BlockingIOError if the receiver's queue is full, ConnectionRefusedError or
        FileNotFoundError if there is no receiver.
        """
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FD.pack(fd))] if fd >= 0 else []
        if to is None:
            self._sock.sendmsg([data], rights)
        else:
            self._sock.sendmsg([data], rights, 0, to)

    def send_before(self, data: bytes, deadline: float) -> None:
        """Send one datagram, waiting for room until `deadline` (monotonic seconds).

        Raises TimeoutError when the receiver has made no room by then.
        """
        while True:
            try:
                return self.send(data)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                # The queue holds a handful; only a stopped peer, or a flood, leaves it full.
                if time.monotonic() >= deadline:
                    raise TimeoutError("the receiver's queue is full") from None
                time.sleep(0.01)

    def receive(self) -> Packet | None:
        """The next datagram, or None if there is none now."""
        try:
            data, ancillary, flags, address = self._sock.recvmsg(
                MAX_DATAGRAM + 1, _ANCILLARY, _FLAGS
            )
        except BlockingIOError:
            return None
        return _packet(data, ancillary, flags, address)

    def receive_within(self, seconds: float) -> Packet | None:
        """The next datagram, or None if none came within `seconds`."""
        self._sock.settimeout(seconds)
        try:
            return self.receive()
        except TimeoutError:
            return None
        finally:
            self._sock.settimeout(0)  # or every later call would wait as well


def _packet(
    data: bytes, ancillary: list[tuple[int, int, bytes]], flags: int, address: object
) -> Packet:
    fds: list[int] = []
    pid, uid = 0, -1
    for level, kind, content in ancillary:
        if level != _socket.SOL_SOCKET:
            continue
        if kind == _socket.SCM_RIGHTS:
            whole = len(content) - len(content) % _FD.size
            fds += [number for (number,) in _FD.iter_unpack(content[:whole])]
        elif kind == _socket.SCM_CREDENTIALS and len(content) >= credentials.SIZE:
            pid, uid = credentials.parse(content)
    fault = ""
    if flags & _socket.MSG_TRUNC or len(data) > MAX_DATAGRAM:
        fault = f"longer than {MAX_DATAGRAM} bytes"
    elif flags & _socket.MSG_CTRUNC and not fds:
        fault = "a descriptor that this process has no room for: raise its limit (ulimit -n)"
    elif flags & _socket.MSG_CTRUNC or len(fds) > 1:
        fault = "more than one descriptor"
    if fault:
        close_all(fds)
        fds = []
    path = address if isinstance(address, str) else ""
    return Packet(data, fds[0] if fds else -1, Sender(pid, uid, path), fault)


def close_all(fds: list[int]) -> None:
    """Close each; a number that is already closed is passed over."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
