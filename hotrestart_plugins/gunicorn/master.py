"""A master that has its listeners: what reaches it through gunicorn's main loop and hooks."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hotrestart_plugins.core import events
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.hot_restart import HotRestart, Role
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.rendezvous import default_directory
from hotrestart_plugins.errors import ConfigurationError, HotRestartError, Overtaken
from hotrestart_plugins.gunicorn import worker_agent
from hotrestart_plugins.gunicorn._compat import arbiter, dirty_arbiter
from hotrestart_plugins.gunicorn._compat.arbiter import HaltServer
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter, Worker
from hotrestart_plugins.gunicorn._compat.workers import known_class
from hotrestart_plugins.gunicorn.adapters.base import say_what_is_missing
from hotrestart_plugins.gunicorn.arbiter_events import ArbiterEvents
from hotrestart_plugins.gunicorn.failures import in_config_words, status_of
from hotrestart_plugins.gunicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.gunicorn.listeners import Listeners
from hotrestart_plugins.gunicorn.singletons import Singletons
from hotrestart_plugins.gunicorn.worker_ipc import WorkerPipe
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.lifecycle.table import State
from hotrestart_plugins.settings import Settings


class MasterController:
    """This master, as one instance. Owns the `HotRestart` and the pipe."""

    def __init__(
        self,
        server: Arbiter,
        directory: Path,
        *,
        hot: HotRestart,
        listeners: Listeners,
        pipe: WorkerPipe,
        deadlines: ArbiterEvents,
        singletons: Singletons,
        driver: LifecycleDriver,
        journal: Journal,
        fence: Fence,
    ) -> None:
        """`directory`: the hot-restart directory."""
        self.server = server
        self._directory = directory
        self._hot = hot
        self._listeners = listeners
        self._pipe = pipe
        self._deadlines = deadlines
        self._singletons = singletons
        self._driver = driver
        self._journal = journal
        self._fence = fence
        self._pid = os.getpid()
        atexit.register(self._crashed)
        arbiter.wrap_handler(server, "chld", self.wake)
        for name in ("term", "int", "quit"):
            arbiter.wrap_handler(server, name, self._stop)
        for name in ("hup", "ttin", "ttou", "usr2"):
            arbiter.wrap_handler(server, name, functools.partial(self._change, name))

    def start(self, seconds: float) -> None:
        """Get the listeners from the running instance; exits if that fails.

        `seconds`: for the workers to become ready then.
        """
        hot, server = self._hot, self.server
        try:
            self._driver.start(seconds)
        except HotRestartError as error:
            if isinstance(error, Overtaken):
                self._journal.emit(events.OVERTAKEN, pid=error.pid)
            else:
                complain(self._journal, hot, in_config_words(error))
            self._close(crashed=True)
            sys.exit(status_of(error))
        self._singletons.check_pidfile(hot.parent_pid if hot.role is Role.CHILD else 0)
        own_name(server)
        if not known_class(arbiter.worker_class(server)):
            self._journal.emit(events.CANNOT_PAUSE, worker_class=server.cfg.worker_class_str)
        self._deadlines.watch(self._pipe.fileno())
        # `worker_agent.hold_stops` holds signals before each fork; only a worker keeps them held.
        arbiter.spawn_within(server, worker_agent.mask_restored)
        if hot.role is Role.CHILD:
            arbiter.spawn_first_at_once(server)

    # -- the config ----------------------------------------------------------------------------

    def reconfigured(self, settings: Callable[[], Settings]) -> None:
        """The config was read again, after SIGHUP; or SIGTTIN or SIGTTOU came."""
        with self._fence:
            own_name(self.server)
        self._listeners.reconfigured(self._hot)
        with self._fence:
            self._use_config(settings)
            say_what_is_missing(
                arbiter.worker_class(self.server),
                self._journal,
                has_probe=bool(self._driver.settings.probe),
            )

    def _use_config(self, settings: Callable[[], Settings]) -> None:
        if self._driver.lifecycle.state is State.STARTING:
            self._singletons.suppress()
            return
        self._singletons.reconfigured()
        try:
            self._driver.settings = settings()
        except ConfigurationError as error:
            self._journal.emit(events.SETTINGS_UNCHANGED, error=error)
        self._check_directory()

    def _check_directory(self) -> None:
        """The next instance looks where its settings, or its first address, say."""
        named = self._driver.settings.directory or default_directory(self._listeners.addresses[0])
        if named != self._directory:
            self._journal.emit(events.DIRECTORY_UNCHANGED, named=named, directory=self._directory)

    # -- the main loop -------------------------------------------------------------------------

    def wake(self, reap: Callable[[], None]) -> None:
        """Something has happened: a child ended, a descriptor is readable, a deadline passed.

        `reap`: gunicorn's own handler of SIGCHLD.
        """
        before = arbiter.workers(self.server)
        with self._ready_to_stop():
            reap()
            self._driver.step(before - arbiter.workers(self.server))

    def _stop(self, original: Callable[[], None]) -> None:
        """SIGTERM, SIGINT or SIGQUIT. The last two stop the workers before they raise."""
        with self._fence:
            self._prepare_stop()
        with self._fence:
            self._driver.stopping()
        original()

    def _change(self, name: str, original: Callable[[], None]) -> None:
        """SIGHUP, SIGTTIN, SIGTTOU or SIGUSR2.

        An instance that was replaced ignores them: a new worker would load the new code.
        """
        self.wake(lambda: None)
        if self._driver.lifecycle.replaced:
            self._journal.emit(events.SIGNAL_IGNORED, signal=f"SIG{name.upper()}")
            return
        self._driver.workers_may_end()
        with self._ready_to_stop():
            if name == "hup" and self._driver.lifecycle.serves and self._hot.child is not None:
                self._singletons.reload_without_pidfile(original)
            else:
                original()

    @contextlib.contextmanager
    def _ready_to_stop(self) -> Iterator[None]:
        """If gunicorn's main loop ends in here, prepare its stop."""
        try:
            yield
        except HaltServer:
            with self._fence:
                self._prepare_stop()
            with self._fence:
                self._driver.failing()
            raise
        except StopIteration:
            with self._fence:
                self._prepare_stop()
            raise

    def _prepare_stop(self) -> None:
        """Leave the paths of Unix sockets to `HotRestart.close`: another instance may use them."""
        arbiter.keep_paths(self.server)
        dirty_arbiter.outlives_workers(self.server)
        arbiter.reap_wholly(self.server)

    # -- in a worker ---------------------------------------------------------------------------

    def forked(self, worker: Worker) -> worker_agent.WorkerAgent:
        """In a new worker: keep open only what is a worker's. Return what it is from now on."""
        atexit.unregister(self._crashed)
        taking_over = self._driver.lifecycle.state is State.STARTING and self._hot.takeover_id
        own_target = HandoverTarget(self._directory, self._hot.takeover_id, Side.NEW)
        agent = worker_agent.WorkerAgent(
            worker,
            self._pipe,
            self._driver.settings,
            self._directory,
            own_target=own_target if taking_over else None,
        )
        agent.forked()
        return agent

    # -- the end -------------------------------------------------------------------------------

    def end(self, reason: BaseException | None) -> None:
        """All workers have ended: close, and say what became of the takeover.

        `reason`: what ended gunicorn's main loop.
        """
        why = arbiter.failure(reason)
        overtaken = None if reason is None else reason.__cause__
        if isinstance(overtaken, Overtaken):
            self._journal.emit(events.OVERTAKEN, pid=overtaken.pid)
        elif self._hot.role in (Role.CHILD, Role.INITIAL):
            if why is not None:
                # gunicorn's own reasons are sentences that explain nothing.
                why = f"{why[:-1]}, see above" if why.endswith(".") else why
                complain(self._journal, self._hot, why)
            elif self._hot.role is Role.CHILD:
                why_not = "it was stopped before it had taken over"
                complain(self._journal, self._hot, why_not)
        with self._fence:
            self._driver.ended()
        with self._fence:
            self._close(crashed=why is not None)

    def _close(self, *, crashed: bool) -> None:
        atexit.unregister(self._crashed)
        self._deadlines.close()
        self._hot.close(crashed=crashed)
        self._pipe.close()

    def _crashed(self) -> None:
        """The process ends, and gunicorn has called no hook."""
        if os.getpid() == self._pid:
            if self._hot.role in (Role.CHILD, Role.INITIAL):
                why = "gunicorn ended before it could serve, see above"
                complain(self._journal, self._hot, why)
            self._close(crashed=True)


def complain(journal: Journal, hot: HotRestart, why: str) -> None:
    """Say in one line that this instance does not serve, and who does."""
    facts: dict[str, object] = {"reason": why}
    if hot.role is Role.CHILD:
        pid = hot.parent_pid or "unknown"
        journal.emit(events.TAKEOVER_FAILED, reason=why, pid=pid, facts=facts)
    else:
        journal.emit(events.START_FAILED, reason=why, facts=facts)


def own_name(server: Arbiter) -> None:
    """Name this master's dirty arbiter: one of the next instance would kill one of that name."""
    if arbiter.has_dirty_arbiter(server):
        arbiter.name_process(server, f"{server.cfg.proc_name}-{os.getpid()}")
