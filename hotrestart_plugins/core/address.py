"""What users write, and the listener's name on the wire.

On the wire an address reads as Volo prints it: ``127.0.0.1:8000``, ``[::1]:8000``,
``/run/app.sock``. An abstract Unix socket, which Volo has not, reads ``@name``.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hotrestart_plugins.errors import AddressError

MAX_UNIX_PATH = 107
"""Bytes of a Unix socket's path: sun_path has 108, one ends it (unix(7))."""

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[0-9]{1,6}))?")
_SO_COOKIE = 57  # asm-generic/socket.h; the socket module does not name it


@dataclass(frozen=True)
class Address:
    """One listener's address: numeric and resolved, or a path."""

    family: socket.AddressFamily
    host: str
    """An IP address in its shortest form, a scope behind ``%``; for AF_UNIX the absolute path,
    or ``@name``."""
    port: int = 0

    @cached_property
    def name(self) -> str:
        """The address on the wire, and in every log line."""
        if self.family == socket.AF_UNIX:
            return self.host
        if self.family == socket.AF_INET6:
            return f"[{self.host}]:{self.port}"
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> str | None:
        """The file of a Unix listener; None for TCP and abstract sockets."""
        if self.family == socket.AF_UNIX and not self.host.startswith("@"):
            return self.host
        return None

    @property
    def sockaddr(self) -> tuple[object, ...] | str:
        """What bind(2) takes."""
        if self.family == socket.AF_UNIX:
            return "\0" + self.host[1:] if self.host.startswith("@") else self.host
        if self.family == socket.AF_INET6:
            host, _, scope = self.host.partition("%")
            return host, self.port, 0, int(scope or 0)
        return self.host, self.port

    def is_of(self, other: Address) -> bool:
        """Whether a listener bound to `other` is what this address asks for; port 0 takes any."""
        return other == (replace(self, port=other.port) if not self.port else self)


def unix(path: str) -> Address:
    """The address of a Unix socket; ``@name`` is abstract.

    A relative path starts here and now. Where its directory lies is told without links: the next
    instance may come from another release of the app, with a link to the same directory.
    """
    if not path or path == "@":
        raise AddressError(f"{path!r} is no Unix socket path: give unix:/run/app.sock")
    if "\0" in path:
        raise AddressError(f"{path!r} holds a NUL byte: write an abstract socket as unix:@name")
    whole = path
    if not path.startswith(("@", "/")):
        directory, name = os.path.split(path)
        whole = os.path.join(os.path.realpath(directory), name)
    elif not path.startswith("@"):
        whole = os.path.abspath(path)
    size = len(os.fsencode(whole))
    if size > MAX_UNIX_PATH:
        raise AddressError(
            f"{whole} is {size} bytes long, a Unix socket's path may have {MAX_UNIX_PATH}: "
            "choose a shorter one"
        )
    return Address(socket.AF_UNIX, whole)


def resolve(host: str, port: int) -> list[Address]:
    """Every address that `host` stands for, '' for all interfaces; IPv4 first, each once.

    Raises AddressError if the name does not resolve or the port is none.
    """
    if not 0 <= port <= 65535:
        raise AddressError(f"port {port} is not between 0 and 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Numeric, as nearly all are: a thousand of them shall not cost a thousand look-ups.
        return [Address(family, socket.inet_ntop(family, socket.inet_pton(family, host)), port)]
    except (OSError, ValueError):
        pass
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise AddressError(f"{host!r} is no address of this machine: {error}") from None
    known = (socket.AF_INET, socket.AF_INET6)
    addresses = [_internet(family, where) for family, _, _, _, where in found if family in known]
    if not addresses:
        raise AddressError(f"{host!r} has neither an IPv4 nor an IPv6 address")
    return sorted(dict.fromkeys(addresses), key=lambda address: known.index(address.family))


def parse(text: str, *, default_port: int = 8000) -> list[Address]:
    """What a user writes: ``host:port``, ``[v6]:port``, ``:port``, ``unix:PATH``, ``unix:@name``.

    A host name stands for every address it resolves to. Raises AddressError.
    """
    if text.startswith("unix:"):
        return [unix(text[len("unix:") :])]
    match = _HOST_PORT.fullmatch(text)
    # A bare number is a port that lacks its colon; as a host, 8000 would be 0.0.31.64.
    if not text or match is None or text.isdigit():
        raise AddressError(
            f"{text!r} is no address: give host:port, [v6]:port, unix:PATH or fd://N"
        )
    host = match["v6"] if match["v6"] is not None else match["host"]
    return resolve(host, int(match["port"] or default_port))


def of_socket(sock: socket.socket) -> Address:
    """The address that a socket is bound to, by the kernel's word."""
    where = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        return _internet(sock.family, where)
    if isinstance(where, bytes):  # an abstract name comes as bytes, a NUL in front
        return Address(socket.AF_UNIX, "@" + os.fsdecode(where[1:]))
    return Address(socket.AF_UNIX, os.path.abspath(where) if where else "")


def _internet(family: int, where: tuple[Any, ...]) -> Address:
    host = str(where[0]).partition("%")[0]
    if family == socket.AF_INET6 and where[3]:
        host = f"{host}%{where[3]}"
    return Address(socket.AddressFamily(family), host, int(where[1]))


def is_listening(sock: socket.socket) -> bool:
    """Whether it is a stream socket that listens."""
    kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return kind == socket.SOCK_STREAM and bool(accepts)


def same_socket(one: socket.socket, other: socket.socket) -> bool:
    """Whether two descriptors are one and the same socket (SO_COOKIE)."""
    cookies = [sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8) for sock in (one, other)]
    return cookies[0] == cookies[1]
