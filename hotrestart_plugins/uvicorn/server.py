"""`run` and `Server`: take over, serve, be replaced."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from hotrestart_plugins.errors import ConfigurationError, HotRestartError, NotReady, Overtaken
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn.draining_server import DrainingServer
from hotrestart_plugins.uvicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.uvicorn.startup_watchdog import StartupWatchdog
from hotrestart_plugins.uvicorn.supervisor import Supervisor
from hotrestart_plugins.uvicorn.takeover import Takeover

logger = logging.getLogger("uvicorn.error")


class _Stopped(Exception):
    """Told to stop while it started, and somebody else serves."""


class Server(DrainingServer):
    """A `uvicorn.Server` that takes its listeners over from a running instance, and hands them on.

    `run()` for a process of its own; `await serve()` inside a program that has a loop already.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings | None = None) -> None:
        """`settings`: those of the environment if None. Raises ConfigurationError."""
        super().__init__(config)
        self.settings = Settings.gather() if settings is None else settings
        self.drain_timeout = self.settings.drain_timeout
        self.probe = Probe.of(self.settings, f"{config.host}:{config.port}")
        self._takeover = Takeover(config, self.settings)
        self._watchdog: StartupWatchdog | None = None
        self._driver: LifecycleDriver | None = None
        self._listeners_taken: list[socket.socket] | None = None
        self._failure: Exception | None = None
        self._step = "the startup of its lifespan"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; raises SystemExit with the status that says why it failed.

        `sockets`: listeners to serve on, without a takeover.
        """
        self._watchdog = StartupWatchdog(self._hangs)
        try:
            if sockets is None:
                self._listeners_taken = self._listen()
            super().run(sockets)
        except Exception as error:
            if self.started and error is not self._failure:
                raise
            # What there is to say of it was said where it happened.
            sys.exit(error.status if isinstance(error, HotRestartError) else NotReady.status)
        finally:
            self._watchdog.disarm()

    def _listen(self) -> list[socket.socket]:
        try:
            return self._takeover.listen()
        except Exception as error:
            self._takeover.failed(error)
            if isinstance(error, Overtaken):
                self._takeover.say_overtaken(error)
            raise

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As `run`, on the running loop; raises HotRestartError where it could not take over."""
        if sockets is None:
            sockets = self._listeners_taken
        if sockets is None:
            # It may wait for its turn, and what else runs on this loop must not wait with it.
            sockets = await asyncio.to_thread(self._listen)
        if self._watchdog is not None:
            self._watchdog.arm(self.settings.ready_timeout)
        try:
            if not self.config.loaded:  # before uvicorn takes the signals: imports heed none then
                self.config.load()
            await super().serve(sockets)
        except (Exception, SystemExit) as error:
            if self.started:
                raise
            self._takeover.failed(error)
            if isinstance(error, SystemExit):  # of whatever status: the app's may be 0
                raise SystemExit(NotReady.status) from error
            raise
        finally:
            for one in sockets:
                one.close()
            self._end(crashed=True)
        if isinstance(self._failure, Overtaken):
            self._takeover.say_overtaken(self._failure)
        if self._failure is not None:
            raise self._failure

    def _end(self, *, crashed: bool) -> None:
        if self._driver is not None:
            self._driver.stop()
            self._driver = None
        self._takeover.close(crashed=crashed)

    def listeners_closing(self) -> None:
        """A plain stop: close the copies that a successor would have got."""
        self._end(crashed=False)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().shutdown(sockets)
        # Here, since uvicorn ends with the signal that stopped it, and nothing comes after that.
        self._end(crashed=False)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then this instance is ready, and the parent, if any, is told to go.

        One that was stopped meanwhile takes nothing over.
        """
        self.lifespan.startup = functools.partial(self._start_unless_stopped, self.lifespan.startup)
        try:
            await super().startup(sockets)
        except _Stopped:
            self._end(crashed=False)
            return
        if not self.started:
            return
        if self._watchdog is not None:
            self._watchdog.disarm()
        if self.should_exit and self._takeover.is_child:
            # The clients are the parent's, and know nothing of a second Ctrl-C.
            self.shares_listeners = self.drain_on_stop = True
            self.force_exit = False
            return
        try:
            target = self._takeover.handover_target
            if target is not None:
                self.receive(target)
            hot = self._takeover.ready(sockets or [])
        except (HotRestartError, OSError) as error:
            # The listeners are the parent's still: what was accepted meanwhile is answered.
            self._takeover.failed(error)
            self._failure = error
            self.shares_listeners = self.should_exit = True
            return
        if hot is not None:
            self._driver = LifecycleDriver(hot, self._takeover.directory, self.settings, self)

    async def all_paused(self) -> bool:
        """At once: behind `pause` nobody accepts."""
        return True

    async def _start_unless_stopped(self, start: Callable[[], Awaitable[None]]) -> None:
        """The lifespan's startup; raises _Stopped where nothing is to be accepted behind it."""
        await start()
        self._step = "the probe"
        if self.should_exit and self._takeover.is_child and not self.lifespan.should_exit:
            if not self.force_exit:
                await self.lifespan.shutdown()
            raise _Stopped

    def shut_down(self) -> None:
        """End, with status 0."""
        self.should_exit = True

    def _hangs(self, where: str | None) -> int:
        place = f"hangs at {where}" if where else f"waits in {self._step}"
        error = NotReady(
            f"the app was not ready within {self.settings.ready_timeout:g} s, it {place}: "
            "mend it, or pass a longer --ready-timeout"
        )
        self._takeover.failed(error)
        self._takeover.close()
        return error.status


def run(app: Any, *, hot_restart: Settings | None = None, **options: Any) -> None:
    """`uvicorn.run`, with hot restarts: every argument of it, and `hot_restart`.

    `hot_restart`: the settings; those of the environment if None.
    Raises SystemExit where the server could not start, with the status that says why.
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
        if config.workers > 1:
            if not isinstance(app, str):
                raise ConfigurationError(
                    "several workers import the app themselves: pass it as 'module:app'"
                )
            return Supervisor(config, settings).run()
        return Server(config, settings).run()
    except HotRestartError as error:
        logger.error("%s", error)  # noqa: TRY400 (one line says it all)
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
