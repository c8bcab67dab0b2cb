"""One instance's takeover: which listeners it wants, from whom, and what is said about it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core import events
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.hot_restart import HotRestart, Role
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.core.rendezvous import default_directory
from hotrestart_plugins.errors import ConfigurationError, HotRestartError, NotReady, Overtaken
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn.passed_descriptors import from_descriptor, from_systemd
from hotrestart_plugins.uvicorn.tls import check_tls

_SOCKET_MODE = 0o666  # of a new Unix socket file, as uvicorn makes it


class Takeover:
    """The `HotRestart` of one instance, and the listeners that its server gets."""

    def __init__(self, config: uvicorn.Config, settings: Settings, journal: Journal) -> None:
        """Open nothing yet. Raises ConfigurationError for options that exclude each other."""
        if config.should_reload and not settings.disable:
            raise ConfigurationError(
                "--reload and hot restart do not go together: leave one out "
                "(--no-hot-restart is the other's)"
            )
        check_tls(config)
        Probe.of(settings, "")  # a bad one is refused here, not in each worker
        self.config = config
        self.settings = settings
        self.hot: HotRestart | None = None
        """None if hot restart is off, and before `meet`."""
        self.directory = Path()
        """The directory in which this instance meets others, after `meet`."""
        self.listeners: list[socket.socket] = []
        """What `listen` returned: the caller's to close."""
        self._journal = journal
        self._wanted: list[Address] = []
        self._passed: list[socket.socket] = []
        self._reason = ""
        """Why this instance could not start, once it has been said."""
        self._overtaken: Overtaken | None = None

    def meet(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Find the running instance, if there is one, and wait for this instance's turn.

        `sockets`: listeners that exist already, so that nobody has to be met. Raises
        HotRestartError.
        """
        if sockets is not None:
            self.listeners = list(sockets)
            return
        self._wanted, self._passed = self._addresses()
        try:
            self._meet(self._names)
        except BaseException:
            self._close_passed()
            raise

    @property
    def _names(self) -> list[Address]:
        return [*self._wanted, *(addresses.of_socket(sock) for sock in self._passed)]

    def listen(self) -> None:
        """Inherit, adopt or bind every listener: all of them, or an error and none.

        Raises HotRestartError; the running instance is undisturbed.
        """
        if self.listeners:
            return
        hot, names = self.hot, self._names
        try:
            for sock in self._passed:
                if hot is not None:
                    hot.adopt(sock)
            self.listeners = [*_listen(hot, self._wanted, self.config), *self._passed]
        except BaseException:
            self._close_passed()
            raise
        if hot is None:
            return
        for name in names:
            if name.name in hot.inherited:
                self._journal.emit(events.LISTENER_INHERITED, address=name, pid=self.parent_pid)
        bound = [name for name in hot.listeners if name not in hot.inherited]
        self._journal.emit(
            events.LISTENERS_INHERITED, facts={"inherited": sorted(hot.inherited), "bound": bound}
        )

    def _close_passed(self) -> None:
        for sock in self._passed:
            sock.close()

    def _meet(self, names: Sequence[Address]) -> None:
        directory = self.settings.directory
        if self.settings.disable:
            return
        if directory is None:
            if any(name.family != socket.AF_UNIX and not name.port for name in names):
                self._journal.emit(events.NO_DIRECTORY, option="pass --hot-restart-dir")
                return
            directory = default_directory(names[0])
        settings = self.settings
        self.hot = HotRestart(
            takeover_timeout=settings.takeover_timeout,
            turn_timeout=settings.ready_timeout + settings.takeover_timeout,
            logger=self._journal.logger,
        )
        self.directory = directory
        if self.hot.initialize(directory, len(names)) is Role.CHILD:
            self._journal.record = Record(
                directory, self.hot.takeover_id, os.getpid(), "new", self._journal.logger
            )
            self._journal.emit(events.STARTED)

    def _addresses(self) -> tuple[list[Address], list[socket.socket]]:
        """Return what is to be inherited or bound, and what was passed as a descriptor."""
        config = self.config
        wanted: list[Address] = []
        passed: list[socket.socket] = []
        try:
            if self.settings.bind:
                for text in self.settings.bind:
                    if text.startswith("fd://"):
                        passed.append(from_descriptor(text.removeprefix("fd://"), config.backlog))
                    else:
                        wanted.extend(addresses.parse(text))
            elif config.fd is not None:
                passed.append(from_descriptor(str(config.fd), config.backlog))
            elif config.uds is not None:
                wanted.append(addresses.unix(config.uds))
            elif systemd := from_systemd():
                passed.extend(from_descriptor(str(number), config.backlog) for number in systemd)
            else:
                wanted.extend(addresses.resolve(config.host, config.port))
        except BaseException:
            for sock in passed:
                sock.close()
            raise
        return list(dict.fromkeys(wanted)), passed

    @property
    def is_child(self) -> bool:
        """Whether an instance serves from which this one has not taken over yet."""
        return self.hot is not None and self.hot.role is Role.CHILD

    @property
    def handover_target(self) -> HandoverTarget | None:
        """Where the old instance finds this one's receivers; None if it shall hand nothing over."""
        if self.hot is None or not self.is_child or self.settings.no_handover:
            return None
        return HandoverTarget(self.directory, self.hot.takeover_id, Side.NEW)

    @property
    def parent_pid(self) -> int:
        """The pid of the old instance; 0 if there is none, or if it has not answered yet."""
        return self.hot.parent_pid if self.hot is not None else 0

    def ready(self) -> None:
        """Claim the name, tell the old instance to go, and say where this one listens.

        Raises HotRestartError or OSError if that fails.
        """
        self._journal.emit(events.READY)
        if self.hot is not None:
            self.hot.ready()
        self._journal.emit(events.TAKEN_OVER)
        scheme = "https" if self.config.is_ssl else "http"
        for sock in self.listeners:
            bound = addresses.of_socket(sock)
            is_unix = bound.family == socket.AF_UNIX
            place = f"unix socket {bound}" if is_unix else f"{scheme}://{bound}"
            self._journal.emit(events.RUNNING, place=place)

    def failed(self, error: BaseException) -> None:
        """Say, in one line, why this instance could not take over, or not start.

        An instance that was overtaken has not failed: see `say_overtaken`.
        """
        if isinstance(error, Overtaken):
            self._overtaken, self._reason = error, str(error)
            return
        if isinstance(error, SystemExit):
            reason = _reason(error)
        elif isinstance(error, (HotRestartError, OSError)):
            reason = str(error)
        else:
            self._journal.emit(events.APP_FAILED, traceback=error)
            reason = f"the app failed to start: {type(error).__name__}: {error}"
        self._say(reason)

    def say_overtaken(self) -> None:
        """Write the last line of an instance that was overtaken; nothing for any other."""
        if self._overtaken is not None:
            self._journal.emit(events.OVERTAKEN, pid=self._overtaken.pid)

    def _say(self, reason: str) -> None:
        self._reason = reason
        facts: dict[str, object] = {"reason": reason}
        if self.is_child:
            pid = self.parent_pid or "unknown"
            self._journal.emit(events.TAKEOVER_FAILED, facts=facts, reason=reason, pid=pid)
        else:
            self._journal.emit(events.START_FAILED, facts=facts, reason=reason)

    def close(self, *, crashed: bool = False) -> None:
        """Close what this object opened, but not the listeners; see `HotRestart.close`.

        If nothing has failed, and nothing was taken over, this instance was stopped: say so.
        """
        if self.is_child and not self._reason:
            self._say("it was stopped before it had taken over")
        if self.hot is not None:
            self.hot.close(crashed=crashed)


def _reason(end: SystemExit) -> str:
    """Say why the app exited: uvicorn has logged its failure, or it has called sys.exit itself."""
    if end.code == NotReady.status:  # the same as uvicorn's
        return "the app failed to start, see above"
    if isinstance(end.code, str):
        return f"the app failed to start: {end.code}"
    return f"the app failed to start: it called sys.exit({'' if end.code is None else end.code})"


def _listen(
    hot: HotRestart | None, wanted: list[Address], config: uvicorn.Config
) -> list[socket.socket]:
    # Like asyncio, so that [::] and 0.0.0.0 can stand beside each other.
    holder = hot or HotRestart()  # one that has met nobody binds everything fresh
    try:
        return holder.listen(wanted, backlog=config.backlog, mode=_SOCKET_MODE, v6only=True)
    finally:
        if hot is None:
            holder.disown()
