"""Listeners that whoever started this process has opened: systemd, or ``--fd`` and ``fd://``."""

from __future__ import annotations

import os
import socket

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.errors import AddressError

_LISTEN_FDS_START = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


def from_descriptor(number: str, backlog: int) -> socket.socket:
    """Return the listener of a descriptor that was passed to this process; the caller owns it.

    Raises AddressError for what is no stream socket.
    """
    try:
        sock = socket.socket(fileno=int(number))  # its own family: AF_UNIX would cost TCP_NODELAY
    except (OSError, ValueError):
        raise AddressError(f"fd://{number} is no open socket: pass a listening one") from None
    try:
        if sock.type != socket.SOCK_STREAM:
            raise AddressError(f"fd://{number} is no stream socket")
        sock.setblocking(False)
        sock.set_inheritable(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not addresses.is_listening(sock):
            sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def from_systemd() -> range | None:
    """Return the descriptors that systemd passed to this very process, see sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # the app's own children are not meant
    return range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)) if count.isdigit() else None
