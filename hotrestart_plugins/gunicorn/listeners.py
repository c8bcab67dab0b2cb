"""gunicorn's listeners: what the config tells it to bind, inherited or bound fresh."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator, Sequence

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core import events
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.hot_restart import HotRestart
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.errors import AddressError, ConfigurationError, HotRestartError
from hotrestart_plugins.gunicorn._compat import arbiter
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter, Bind, Config, Listener
from hotrestart_plugins.gunicorn._compat.table import Feature, lacks


class Listeners:
    """The listeners of one instance, from the config to the arbiter."""

    def __init__(self, server: Arbiter, journal: Journal) -> None:
        """Read the config; opens nothing. Raises ConfigurationError.

        Takes systemd's descriptors out of the environment, as gunicorn would.
        """
        self._server = server
        self._journal = journal
        self._cfg = server.cfg
        self._given = [bind for bind in self._cfg.address if isinstance(bind, int)]
        self._given += arbiter.systemd_descriptors(server)
        if self._given:
            self.addresses = [_bound(fd) for fd in self._given]
        else:
            self.addresses = [address_of(bind) for bind in self._cfg.address]
        if not self.addresses:
            raise ConfigurationError("there is no address to listen on: pass --bind")

    def open(self, hot: HotRestart) -> None:
        """Give the arbiter its sockets, all or none; it owns them. Raises what `listen` does.

        If descriptors are given, by ``fd://`` or systemd, gunicorn binds nothing else.
        """
        check_tls(self._cfg)
        if self._given:
            made = [self._adopt(hot, fd) for fd in self._given]
        else:
            made = self._listen(hot, list(zip(self._cfg.address, self.addresses, strict=True)))
        arbiter.set_listeners(self._server, made)

    def _adopt(self, hot: HotRestart, fd: int) -> Listener:
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(fileno=fd))
            hot.adopt(sock)
            undo.pop_all()
        return arbiter.make_listener(self._server, _family(sock), sock.getsockname(), sock)

    def reconfigured(self, hot: HotRestart) -> None:
        """After SIGHUP: bind what is new, drop what is gone, and touch nothing else.

        gunicorn, which goes on from here, would bind everything again, and end because it is
        still in use. If an address cannot be bound, the log says so and nothing changes.
        """
        server = self._server
        before, self._cfg = self._cfg, server.cfg
        if self._cfg.address == before.address:
            return
        try:
            self._check_change()
            wanted = [address_of(bind) for bind in self._cfg.address]
            names = (address.name for address in self.addresses)
            had = dict(zip(names, arbiter.listeners(server), strict=True))
            new = [
                (bind, address)
                for bind, address in zip(self._cfg.address, wanted, strict=True)
                if address.name not in had
            ]
            made = self._listen(hot, new)
        except Exception as error:  # noqa: BLE001  # gunicorn must not go on with the new addresses
            self._journal.emit(
                events.ADDRESSES_UNCHANGED,
                error=error,
                traceback=None if isinstance(error, HotRestartError) else error,
            )
            self._cfg.set("bind", before.settings["bind"].get())
            return
        bound = {address.name: sock for (_, address), sock in zip(new, made, strict=True)}
        for name in had.keys() - {address.name for address in wanted}:
            hot.drop(name)
        self.addresses = wanted
        now = [bound.get(address.name) or had.pop(address.name) for address in wanted]
        arbiter.replace_listeners(server, list(had.values()), now)

    def _check_change(self) -> None:
        if lacks(Feature.CHANGE_ADDRESSES):
            raise ConfigurationError("this gunicorn cannot be given other listeners by HUP")
        if self._given or any(isinstance(bind, int) for bind in self._cfg.address):
            raise ConfigurationError("descriptors that were passed in cannot be changed by HUP")

    def _listen(self, hot: HotRestart, wanted: Sequence[tuple[Bind, Address]]) -> list[Listener]:
        with _umask(self._cfg.umask):
            sockets = hot.listen(
                [address for _, address in wanted],
                backlog=self._cfg.backlog,
                mode=0o777 & ~self._cfg.umask,
            )
        made: list[Listener] = []
        for (bind, address), sock in zip(wanted, sockets, strict=True):
            if address.path is not None and address.name not in hot.inherited:
                os.chown(address.path, self._cfg.uid, self._cfg.gid)
            made.append(arbiter.make_listener(self._server, address.family, bind, sock))
        return made


def address_of(bind: Bind) -> Address:
    """What gunicorn would bind for one entry of `cfg.address`: one socket. Raises AddressError."""
    if isinstance(bind, int):
        return _bound(bind)
    if isinstance(bind, str):
        if bind.startswith("\0"):
            return addresses.unix("@" + bind[1:])
        # unix:@name is a file of that name to gunicorn.
        return addresses.unix(f"./{bind}" if bind.startswith("@") else bind)
    host, port = bind
    family = socket.AF_INET6 if _is_ipv6(host) else socket.AF_INET
    if not host:
        host = "0.0.0.0"  # noqa: S104  # what bind(2) makes of gunicorn's ''
    of_family = [address for address in addresses.resolve(host, port) if address.family == family]
    if not of_family:
        raise AddressError(f"{host!r} has no IPv4 address: gunicorn binds a name to one only")
    return of_family[0]


def _is_ipv6(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, host)
    except OSError:
        return False
    return True


def _bound(fd: int) -> Address:
    try:
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            return addresses.of_socket(duplicate)
    except OSError as error:
        raise AddressError(f"descriptor {fd} is no socket: {error.strerror}") from None


def _family(sock: socket.socket) -> socket.AddressFamily:
    return socket.AddressFamily(sock.family)


def check_tls(cfg: Config) -> None:
    """Raise ConfigurationError if the certificate cannot be used.

    gunicorn checks it only where it binds; the asgi worker then serves plain HTTP on the TLS port.
    """
    for name, path in (("certfile", cfg.certfile), ("keyfile", cfg.keyfile)):
        if path and not os.path.exists(path):
            raise ConfigurationError(f'{name} "{path}" does not exist')
    if cfg.is_ssl:
        try:
            arbiter.load_certificate(cfg)
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
