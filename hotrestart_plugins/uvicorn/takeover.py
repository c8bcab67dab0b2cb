"""One launcher's takeover: which listeners, from whom, and what is said of it."""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core import events
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.hot_restart import HotRestart, Role
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.core.rendezvous import default_directory
from hotrestart_plugins.errors import AddressError, ConfigurationError, HotRestartError, Overtaken
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings

logger = logging.getLogger("uvicorn.error")

_LISTEN_FDS_START = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_SOCKET_MODE = 0o666  # of a new Unix socket file, as uvicorn makes it


class Takeover:
    """The launcher's `HotRestart`, and the listeners that its server is to have."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        """Nothing is opened yet; raises ConfigurationError for what cannot go together."""
        if config.should_reload and not settings.disable:
            raise ConfigurationError(
                "--reload and hot restart do not go together: leave one out "
                "(--no-hot-restart is the other's)"
            )
        _check_tls(config)
        Probe.of(settings, "")  # a bad one is refused here, not in each worker
        self.config = config
        self.settings = settings
        self.hot: HotRestart | None = None
        """None where hot restart is off, and before `listen`."""
        self.directory = Path()
        """Where this instance meets others, once it has."""
        self._record: Record | None = None
        self._was_child = False
        self._failed = False

    def listen(self) -> list[socket.socket]:
        """Every listener, inherited, given or bound fresh; the caller owns them.

        Raises HotRestartError and leaves nothing open; the parent is undisturbed.
        """
        wanted, given = self._wanted()
        try:
            names = [*wanted, *(addresses.of_socket(one) for one in given)]
            hot = self._meet(names)
            for one in given:
                if hot is not None:
                    hot.adopt(one)
            made = _listen(hot, wanted, self.config)
            for name in names:
                if hot is not None and name.name in hot.inherited:
                    logger.info("Inherited %s from pid %d", name, self.parent_pid)
            if hot is not None and self._record is not None:
                bound = [name for name in hot.listeners if name not in hot.inherited]
                self._record.note(
                    "listeners inherited", inherited=sorted(hot.inherited), bound=bound
                )
        except BaseException:
            for one in given:
                one.close()
            # What is said of it afterwards depends on whether somebody serves on.
            self._was_child = self.is_child
            self._close()
            raise
        return [*made, *given]

    def _meet(self, names: Sequence[Address]) -> HotRestart | None:
        directory = self.settings.directory
        if self.settings.disable:
            return None
        if directory is None:
            if any(name.family != socket.AF_UNIX and not name.port for name in names):
                logger.warning(
                    "Port 0 names no place to meet: this instance cannot be replaced "
                    "(pass --hot-restart-dir)"
                )
                return None
            directory = default_directory(names[0])
        settings = self.settings
        self.hot = HotRestart(
            takeover_timeout=settings.takeover_timeout,
            turn_timeout=settings.ready_timeout + settings.takeover_timeout,
            logger=logger,
        )
        self.directory = directory
        if self.hot.initialize(directory, len(names)) is Role.CHILD:
            self._record = Record(directory, self.hot.takeover_id, os.getpid(), "child", logger)
            self._record.note("started")
        return self.hot

    def _wanted(self) -> tuple[list[Address], list[socket.socket]]:
        """What is to be inherited or bound, and what was given as a descriptor."""
        config = self.config
        wanted: list[Address] = []
        given: list[socket.socket] = []
        try:
            if self.settings.bind:
                for text in self.settings.bind:
                    if text.startswith("fd://"):
                        given.append(_given(text.removeprefix("fd://"), config.backlog))
                    else:
                        wanted.extend(addresses.parse(text))
            elif config.fd is not None:
                given.append(_given(str(config.fd), config.backlog))
            elif config.uds is not None:
                wanted.append(addresses.unix(config.uds))
            elif systemd := _from_systemd():
                given.extend(_given(str(number), config.backlog) for number in systemd)
            else:
                wanted.extend(addresses.resolve(config.host, config.port))
        except BaseException:
            for one in given:
                one.close()
            raise
        return list(dict.fromkeys(wanted)), given

    @property
    def is_child(self) -> bool:
        """Whether somebody serves from whom this instance has not taken over yet."""
        return self.hot is not None and self.hot.role is Role.CHILD

    @property
    def handover_target(self) -> HandoverTarget | None:
        """What this instance is to its parent, where it takes connections in; else None."""
        if self.hot is None or not self.is_child or self.settings.no_handover:
            return None
        return HandoverTarget(self.directory, self.hot.takeover_id, Side.NEW)

    @property
    def parent_pid(self) -> int:
        """The pid taken over from, 0 if none is known."""
        return self.hot.parent_pid if self.hot is not None else 0

    def ready(self, listeners: Sequence[socket.socket]) -> HotRestart | None:
        """Tell the parent, if any, to go, and the user where this instance listens."""
        if self._record is not None:
            self._record.note("ready")
        if self.hot is not None:
            self.hot.ready()
        if self._record is not None:
            self._record.note(outcome="taken over")
        scheme = "https" if self.config.is_ssl else "http"
        for one in listeners:
            where = addresses.of_socket(one)
            is_unix = where.family == socket.AF_UNIX
            place = f"unix socket {where}" if is_unix else f"{scheme}://{where}"
            logger.info("Uvicorn running on %s (Press CTRL+C to quit)", place)
        return self.hot

    def failed(self, error: BaseException) -> None:
        """The last line of an instance that could not take over, or not start.

        Of one that was overtaken, `say_overtaken` is the last line.
        """
        if isinstance(error, Overtaken):
            self._failed = True
            return
        if isinstance(error, SystemExit):
            why = _reason(error)
        elif isinstance(error, (HotRestartError, OSError)):
            why = str(error)
        else:
            logger.error("The app failed to start", exc_info=error)
            why = f"the app failed to start: {type(error).__name__}: {error}"
        self._say(why)

    def say_overtaken(self, error: Overtaken) -> None:
        """The last line of an instance that was overtaken, which is no failure."""
        journal = Journal(logger)
        journal.record = self._record
        journal.emit(events.OVERTAKEN, pid=error.pid)

    def _say(self, why: str) -> None:
        self._failed = True
        if self._record is not None:
            self._record.note(outcome="failed", reason=why)
        if self._was_child or self.is_child:
            pid = self.parent_pid or "unknown"
            logger.error(
                "Hot restart failed: %s; the running instance (pid %s) serves on", why, pid
            )
        else:
            logger.error("Start failed: %s", why)

    def close(self, *, crashed: bool = False) -> None:
        """Close what `listen` opened, but the sockets it returned; see `HotRestart.close`.

        Where nothing has failed, and nothing was taken over, this instance was stopped: says so.
        """
        if self.is_child and not self._failed:
            self._say("it was stopped before it had taken over")
        self._close(crashed=crashed)

    def _close(self, *, crashed: bool = False) -> None:
        if self.hot is not None:
            self.hot.close(crashed=crashed)


def _check_tls(config: uvicorn.Config) -> None:
    """Python's own errors about these files do not name them."""
    if config.ssl_context_factory is not None:
        return
    for option in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(config, option)
        flag = "--" + option.replace("_", "-")
        try:
            if path:
                Path(path).open("rb").close()
        except OSError as error:
            raise ConfigurationError(f"{flag}: {path} cannot be read: {error.strerror}") from error
    key, chain = config.ssl_keyfile, config.ssl_certfile
    if chain:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(chain, key, config.ssl_keyfile_password or _ask_later)
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"--ssl-certfile {chain} cannot be used{f' with --ssl-keyfile {key}' * bool(key)}: "
                f"{error}"
            ) from error
        except _AsksForPassword:
            return
    elif key:
        raise ConfigurationError("--ssl-keyfile needs a --ssl-certfile")


class _AsksForPassword(Exception):
    """The user is asked for it, once, where the server sets TLS up."""


def _ask_later() -> NoReturn:
    raise _AsksForPassword


def _reason(end: SystemExit) -> str:
    """Why the app did not start: uvicorn has said it, or the app has called sys.exit itself."""
    if end.code == STARTUP_FAILURE:
        return "the app failed to start, see above"
    if isinstance(end.code, str):
        return f"the app failed to start: {end.code}"
    return f"the app failed to start: it called sys.exit({'' if end.code is None else end.code})"


def _listen(
    hot: HotRestart | None, wanted: list[Address], config: uvicorn.Config
) -> list[socket.socket]:
    # Like asyncio, so that [::] and 0.0.0.0 can stand beside each other.
    holder = hot or HotRestart()  # without a meeting it binds everything fresh
    try:
        return holder.listen(wanted, backlog=config.backlog, mode=_SOCKET_MODE, v6only=True)
    finally:
        if hot is None:
            holder.disown()


def _given(number: str, backlog: int) -> socket.socket:
    """The listener of a descriptor that was passed to this process, which now owns it."""
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


def _from_systemd() -> range | None:
    """The descriptors that systemd passed to this very process, sd_listen_fds(3)."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # the app's own children are not meant
    return range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)) if count.isdigit() else None
