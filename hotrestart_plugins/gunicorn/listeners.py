"""gunicorn's listeners: what it is told to bind, inherited or bound fresh, in its own classes."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

from gunicorn import sock as gunicorn_sock
from gunicorn import systemd, util

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.hot_restart import HotRestart
from hotrestart_plugins.errors import AddressError, ConfigurationError, HotRestartError


class Listeners:
    """The listeners of one instance, from the config to `Arbiter.LISTENERS`."""

    def __init__(self, server: Any) -> None:
        """Read the config; opens nothing. Raises ConfigurationError.

        Takes systemd's descriptors out of the environment, as gunicorn would.
        """
        self._server = server
        self._cfg, self._log = server.cfg, server.log
        given = [bind for bind in self._cfg.address if isinstance(bind, int)]
        count = systemd.listen_fds()
        if count:
            # gunicorn then leaves the paths of Unix sockets to systemd.
            server.systemd = True
            self._systemd = range(systemd.SD_LISTEN_FDS_START, systemd.SD_LISTEN_FDS_START + count)
        else:
            self._systemd = range(0)
        self._given = bool(given or count)
        if self._given:
            self.addresses = [_bound(fd) for fd in (*given, *self._systemd)]
        else:
            self.addresses = [address_of(bind) for bind in self._cfg.address]
        if not self.addresses:
            raise ConfigurationError("there is no address to listen on: pass --bind")

    def open(self, hot: HotRestart) -> list[Any]:
        """Sockets of gunicorn's classes, all or none, the caller's own. Raises what `listen` does.

        Where descriptors are given, by ``fd://`` or systemd, gunicorn binds nothing else.
        """
        check_tls(self._cfg)
        if self._given:
            return self._adopt(hot)
        return self._listen(hot, list(zip(self._cfg.address, self.addresses, strict=True)))

    def _adopt(self, hot: HotRestart) -> list[Any]:
        made: list[Any] = gunicorn_sock.create_sockets(self._cfg, self._log, self._systemd)
        for one in made:
            hot.adopt(one.sock)
        return made

    def changed(self, hot: HotRestart) -> None:
        """After HUP: bind what is new, drop what is gone, and touch nothing else.

        gunicorn, which follows, would bind all of it anew, and end because it is still in use.
        What cannot be bound is said, and nothing changes then.
        """
        server = self._server
        before, self._cfg = self._cfg, server.cfg
        if self._cfg.address == before.address:
            return
        try:
            if self._given or any(isinstance(bind, int) for bind in self._cfg.address):
                raise ConfigurationError("descriptors that were passed in cannot be changed by HUP")
            wanted = [address_of(bind) for bind in self._cfg.address]
            had = dict(zip((one.name for one in self.addresses), server.LISTENERS, strict=True))
            new = [
                (bind, one)
                for bind, one in zip(self._cfg.address, wanted, strict=True)
                if one.name not in had
            ]
            made = self._listen(hot, new)
        except HotRestartError as error:
            self._log.error("%s; the addresses stay as they were", error)
            self._cfg.set("bind", before.settings["bind"].get())
            return
        bound = {one.name: sock for (_, one), sock in zip(new, made, strict=True)}
        for name in had.keys() - {one.name for one in wanted}:
            hot.drop(name)
        self.addresses = wanted
        # gunicorn closes the listeners that there were, and asks for those that are to be.
        now = [bound.get(one.name) or had.pop(one.name) for one in wanted]
        server.LISTENERS = list(had.values())
        original = gunicorn_sock.create_sockets

        def create_sockets(*_: Any) -> list[Any]:
            gunicorn_sock.create_sockets = original
            return now

        gunicorn_sock.create_sockets = create_sockets

    def _listen(self, hot: HotRestart, wanted: Sequence[tuple[Any, Address]]) -> list[Any]:
        with _umask(self._cfg.umask):
            found = hot.listen(
                [one for _, one in wanted],
                backlog=self._cfg.backlog,
                mode=0o777 & ~self._cfg.umask,
            )
        made: list[Any] = []
        for (bind, address), sock in zip(wanted, found, strict=True):
            if address.path is not None and address.name not in hot.inherited:
                util.chown(address.path, self._cfg.uid, self._cfg.gid)
            kind = _class_of(address.family)
            # It duplicates the descriptor that it is given, and closes that one.
            made.append(kind(bind, self._cfg, self._log, fd=sock.detach()))
        return made


def address_of(bind: tuple[str, int] | str) -> Address:
    """What gunicorn would bind for one entry of `cfg.address`: one socket. Raises AddressError."""
    if isinstance(bind, str):
        if bind.startswith("\0"):
            return addresses.unix("@" + bind[1:])
        # unix:@name is a file of that name to gunicorn.
        return addresses.unix(f"./{bind}" if bind.startswith("@") else bind)
    host, port = bind
    family = socket.AF_INET6 if util.is_ipv6(host) else socket.AF_INET
    if not host:
        host = "0.0.0.0"  # noqa: S104  # what bind(2) makes of gunicorn's ''
    of_family = [one for one in addresses.resolve(host, port) if one.family == family]
    if not of_family:
        raise AddressError(f"{host!r} has no IPv4 address: gunicorn binds a name to one only")
    return of_family[0]


def _bound(fd: int) -> Address:
    try:
        with socket.socket(fileno=os.dup(fd)) as probe:
            return addresses.of_socket(probe)
    except OSError as error:
        raise AddressError(f"descriptor {fd} is no socket: {error.strerror}") from None


def _class_of(family: socket.AddressFamily) -> Any:
    return {
        socket.AF_INET: gunicorn_sock.TCPSocket,
        socket.AF_INET6: gunicorn_sock.TCP6Socket,
        socket.AF_UNIX: gunicorn_sock.UnixSocket,
    }[family]


def check_tls(cfg: Any) -> None:
    """Raise ConfigurationError if the certificate cannot be used.

    gunicorn checks it only where it binds; the asgi worker then serves plain HTTP on the TLS port.
    """
    for name in ("certfile", "keyfile"):
        path = getattr(cfg, name)
        if path and not os.path.exists(path):
            raise ConfigurationError(f'{name} "{path}" does not exist')
    if cfg.is_ssl:
        try:
            gunicorn_sock.ssl_context(cfg)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigurationError(
                f"certfile {cfg.certfile} with keyfile {cfg.keyfile} cannot be used: {error}"
            ) from error


@contextlib.contextmanager
def _umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)
