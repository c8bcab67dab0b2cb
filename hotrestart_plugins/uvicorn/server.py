"""`run` and `Server`: one process that takes over, serves, and is replaced."""

from __future__ import annotations

import asyncio
import inspect
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from hotrestart_plugins.core import events
from hotrestart_plugins.errors import ConfigurationError, HotRestartError, NotReady
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.lifecycle.table import Event
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn._compat import server as _compat
from hotrestart_plugins.uvicorn._compat.names import has, say_what_is_missing
from hotrestart_plugins.uvicorn._compat.table import Feature
from hotrestart_plugins.uvicorn.draining_server import DrainingServer, new_journal
from hotrestart_plugins.uvicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.uvicorn.startup_watchdog import StartupWatchdog
from hotrestart_plugins.uvicorn.takeover import Takeover


class _Stopped(Exception):
    """This instance was told to stop while it started, and another one serves."""


class Server(DrainingServer):
    """A `uvicorn.Server` that takes over from the running instance, and can be replaced itself.

    With a uvicorn that lacks what hot restart needs (see `run`), this class cannot be used.
    `run()` for a process of its own; `await serve()` inside a program that has a loop already.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings | None = None) -> None:
        """`settings`: read from the environment if None. Raises ConfigurationError."""
        super().__init__(config)
        say_what_is_missing(self.journal)
        self.settings = Settings.gather() if settings is None else settings
        self.drain_timeout = self.settings.drain_timeout
        self.probe = Probe.of(self.settings, f"{config.host}:{config.port}")
        self._takeover = Takeover(config, self.settings, self.journal)
        self._driver = LifecycleDriver(self._takeover, self, self.journal)
        self._watchdog: StartupWatchdog | None = None
        self._listeners_taken: list[socket.socket] | None = None
        self._step = "the startup of its lifespan"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; raises SystemExit with the status that says why it failed.

        `sockets`: listeners to serve on, without a takeover.
        """
        self._watchdog = StartupWatchdog(self._on_hang)
        try:
            self._listeners_taken = self._driver.begin(sockets)
            super().run(self._listeners_taken)
        except Exception as error:
            if _compat.has_started(self) and error is not self._driver.failure:
                raise
            self._takeover.say_overtaken()  # any other reason is in the log already
            sys.exit(error.status if isinstance(error, HotRestartError) else NotReady.status)
        finally:
            self._watchdog.disarm()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop, on the running loop.

        Raises HotRestartError if this instance could not take over.
        """
        if self._listeners_taken is None:
            # Waiting for the turn must not block what else runs on this loop.
            self._listeners_taken = await asyncio.to_thread(self._driver.begin, sockets)
        listeners = self._listeners_taken
        if self._watchdog is not None:
            self._watchdog.arm(self.settings.ready_timeout)
        try:
            _compat.load(self.config)  # before uvicorn handles signals: an import ignores them
            await super().serve(listeners)
        except (Exception, SystemExit) as error:
            if _compat.has_started(self):
                raise
            self._driver.fail(error)
            if isinstance(error, SystemExit):  # whatever the status, and the app's may be 0
                raise SystemExit(NotReady.status) from error
            raise
        finally:
            for sock in listeners:
                sock.close()
            self._driver.end()
            self._close_takeover()
        if self._driver.failure is not None:
            raise self._driver.failure

    def _close_takeover(self) -> None:
        self._driver.stop()
        self._takeover.close()

    def listeners_closing(self) -> None:
        """On a plain stop: close the copies that a new instance would have been given."""
        self._close_takeover()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the drain, if this instance was replaced, and shut down."""
        self._driver.report(Event.STOP_ORDERED)
        await self._driver.drained()
        await super().shutdown(sockets)
        # Here, since uvicorn raises the signal that stopped it again, and nothing runs after that.
        self._close_takeover()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app and the listeners; then tell the old instance, if there is one, to go.

        An instance that was told to stop meanwhile does not take over.
        """
        _compat.wrap_startup(self, self._start_unless_stopped)
        try:
            await super().startup(sockets)
        except _Stopped:
            self._driver.report(Event.STOP_ORDERED)
            self._close_takeover()
            return
        if not _compat.has_started(self):
            return
        if self._watchdog is not None:
            self._watchdog.disarm()
        if self.should_exit and self._takeover.is_child:
            # The clients are the old instance's, and know nothing of a second Ctrl-C.
            self.drain_on_stop = True
            _compat.unforce(self)
            self._driver.report(Event.STOP_ORDERED)
            return
        try:
            target = self._takeover.handover_target
            if target is not None:
                self.receive(target)
        except (HotRestartError, OSError) as error:
            self._driver.fail(error)
        else:
            self._driver.report(Event.READY)

    def take_over(self) -> None:
        """Claim the parent socket's name, and tell the old instance to go."""
        self._takeover.ready()

    async def all_paused(self) -> bool:
        """Return True at once: after `pause` nobody accepts."""
        return True

    async def _start_unless_stopped(self, start: Callable[[], Awaitable[None]]) -> None:
        """Start the lifespan; raises _Stopped if this instance shall not accept after it."""
        await start()
        self._step = "the probe"
        if self.should_exit and self._takeover.is_child and not _compat.app_failed(self):
            if not _compat.is_forced(self):
                await _compat.stop_app(self)
            raise _Stopped

    def shut_down(self) -> None:
        """Have uvicorn shut down and exit, with status 0 if nothing has failed."""
        # The old instance answers what waits in the listeners that both have.
        self.shares_listeners = self._takeover.is_child
        self.should_exit = True

    def _on_hang(self, where: str | None) -> int:
        place = f"hangs at {where}" if where else f"waits in {self._step}"
        error = NotReady(
            f"the app was not ready within {self.settings.ready_timeout:g} s, it {place}: "
            "fix it, or pass a longer --ready-timeout"
        )
        self._driver.fail(error, Event.READY_TIMED_OUT)
        self._takeover.close()
        return error.status


def run(app: Any, *, hot_restart: Settings | None = None, **options: Any) -> None:
    """Run an app as `uvicorn.run` does, with hot restarts; takes every argument that it takes.

    `hot_restart`: the settings; read from the environment if None.
    Raises SystemExit with the status that says why the server could not start.
    """
    app_dir = options.pop("app_dir", None)
    if app_dir is not None:
        sys.path.insert(0, app_dir)
    config = uvicorn.Config(app, **options)
    try:
        settings = Settings.gather() if hot_restart is None else hot_restart
        if config.should_reload and settings.disable:
            if settings.bind:
                raise ConfigurationError("--reload takes no --bind: use --host and --port")
            return uvicorn.run(app, **options)
        needed = Feature.SUPERVISOR if config.workers > 1 else Feature.HOT_RESTART
        if not (has(Feature.HOT_RESTART) and has(needed)):
            say_what_is_missing(new_journal())
            if settings.bind:
                raise ConfigurationError(
                    "--bind needs hot restart, which does not work with this uvicorn: "
                    "use --host and --port"
                )
            return uvicorn.run(app, **options)
        if config.workers > 1:
            if not isinstance(app, str):
                raise ConfigurationError(
                    "several workers import the app themselves: pass it as 'module:app'"
                )
            # Here, since nothing of it can be imported if uvicorn has no such supervisor.
            from hotrestart_plugins.uvicorn.supervisor import Supervisor  # noqa: PLC0415

            return Supervisor(config, settings).run()
        return Server(config, settings).run()
    except HotRestartError as error:
        new_journal().emit(events.CONFIGURATION_REFUSED, error=error)
        sys.exit(error.status)
    except KeyboardInterrupt:
        return None


def _signature() -> inspect.Signature:
    ours = inspect.Parameter(
        "hot_restart", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Settings | None"
    )
    theirs = inspect.signature(uvicorn.run)
    return theirs.replace(parameters=[*theirs.parameters.values(), ours])


run.__signature__ = _signature()  # type: ignore[attr-defined]
