"""Bind a listener fresh, and find the process that holds an address already."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path

from hotrestart_plugins.core import credentials, events
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.errors import AddressError

DEFAULT_BACKLOG = 2048
"""Connections that may wait in a listener; uvicorn's and gunicorn's own default."""

_BIND_INTERVAL = 0.02  # seconds between two tries: nothing tells when an address becomes free
_PROC_NET_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp, proc(5)


def bind_fresh(
    address: Address,
    *,
    backlog: int = DEFAULT_BACKLOG,
    mode: int | None = None,
    v6only: bool | None = None,
) -> socket.socket:
    """A new listener; the caller owns it. Non-blocking, close-on-exec, listening.

    A Unix socket file that nobody listens on is replaced and keeps its permissions; `mode` are
    those of a new one (None: what the umask leaves). `v6only` None leaves it to the system whether
    ``[::]`` takes IPv4 as well.
    Raises AddressError, which names the process that holds the address, if one can be found.
    """
    # The protocol is named: asyncio sets TCP_NODELAY only where socket.proto says TCP.
    protocol = 0 if address.family == socket.AF_UNIX else socket.IPPROTO_TCP
    try:
        sock = socket.socket(address.family, socket.SOCK_STREAM, protocol)
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror}") from error
    try:
        sock.setblocking(False)
        if address.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.family == socket.AF_INET6 and v6only is not None:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        if address.path is not None:
            found = _clear_the_way(address.path)
            mode = found if found is not None else mode
        sock.bind(address.sockaddr)
        if address.path is not None and mode is not None:
            os.chmod(address.path, mode)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressError(f"{address} is taken by {holder(address)}") from error
        raise AddressError(f"cannot listen on {address}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def bind_before(
    deadline: float,
    directory: Path,
    journal: Journal,
    address: Address,
    *,
    backlog: int,
    mode: int | None,
    v6only: bool | None,
) -> socket.socket:
    """`bind_fresh`, waiting until `deadline` (monotonic seconds) for an address that is in use.

    The caller owns the socket. The AddressError of an address that stays in use names `directory`:
    whoever holds the address does not answer there.
    """
    waiting = False
    while True:
        try:
            return bind_fresh(address, backlog=backlog, mode=mode, v6only=v6only)
        except AddressError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno != errno.EADDRINUSE:
                raise
            if time.monotonic() >= deadline:
                raise AddressError(
                    f"{error}, which is not to be reached in {directory}: "
                    "stop it, or pass the --hot-restart-dir that it was started with"
                ) from cause
            if not waiting:
                journal.emit(events.ADDRESS_IN_USE, error=error)
        waiting = True
        time.sleep(_BIND_INTERVAL)


def _clear_the_way(path: str) -> int | None:
    """Remove a socket file that nobody listens on; the permissions it had, or None for no file.

    Raises AddressError if the file is no socket, OSError EADDRINUSE if somebody listens.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        raise AddressError(f"{path} exists and is no socket: remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return stat.S_IMODE(found.st_mode)
        except BlockingIOError:
            pass  # its queue is full: somebody listens
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def holder(address: Address) -> str:
    """Which process listens there, as far as this user may see: 'pid 123' or 'another process'."""
    pid = _unix_holder(address) if address.family == socket.AF_UNIX else _tcp_holder(address)
    return f"pid {pid}" if pid else "another process"


def _unix_holder(address: Address) -> int:
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
    ):
        probe.setblocking(False)
        probe.connect(address.sockaddr)
        return credentials.of_peer(probe).pid
    return 0


def _tcp_holder(address: Address) -> int:
    """The pid of a process that holds a listener on this port, or 0."""
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                port = int(fields[1].rpartition(":")[2], 16)
                if fields[3] == _PROC_NET_LISTEN and port == address.port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(entry) in inodes:
                        return int(process.name)
    return 0
