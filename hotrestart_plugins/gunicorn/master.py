"""gunicorn's master: how it takes over, and what becomes of it if it cannot.

Everything that happens to the master comes through its signal queue to `MasterController.wake`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gunicorn.errors import HaltServer

from hotrestart_plugins.core import events
from hotrestart_plugins.core.hot_restart import HotRestart, Role
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.core.rendezvous import default_directory
from hotrestart_plugins.errors import ConfigurationError, HotRestartError, NotReady, Overtaken
from hotrestart_plugins.gunicorn import dirty_arbiter, worker_agent
from hotrestart_plugins.gunicorn.adapters.base import worker_kind
from hotrestart_plugins.gunicorn.arbiter_events import ArbiterEvents
from hotrestart_plugins.gunicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.gunicorn.listeners import Listeners
from hotrestart_plugins.gunicorn.singletons import Singletons
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent, WorkerPipe
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.settings import OPTIONS, Settings

EX_TEMPFAIL = 75  # sysexits.h: it could not take over, try again
EX_CONFIG = 78  # sysexits.h: it cannot work as it is configured

_LAST_GRACE = 2  # seconds for workers that hang in their start to end by themselves


class MasterController:
    """This master, as one of a line of instances."""

    def __init__(self, server: Any, settings: Settings) -> None:
        self.server = server
        self.settings = settings
        self.log = server.log
        self.worker: worker_agent.WorkerAgent | None = None
        """In a worker process: its side of things."""
        self._pid = os.getpid()
        self._began = time.monotonic()
        self._singletons = Singletons(server)
        self._singletons.suppress()
        self._hot: HotRestart | None = None
        self._directory = Path()
        self._record: Record | None = None
        self._listeners: Listeners | None = None
        self._pipe: WorkerPipe | None = None
        self._events: ArbiterEvents | None = None
        self._driver: LifecycleDriver | None = None
        self._ready: set[int] = set()
        self._changed = False  # HUP or TTOU came before it was ready, and ended workers
        atexit.register(self._left_behind)
        if server.cfg.preload_app:
            signal.signal(signal.SIGALRM, self._preload_hangs)
            signal.setitimer(signal.ITIMER_REAL, settings.ready_timeout)

    def reconfigured(self, settings: Callable[[], Settings]) -> None:
        """After HUP, with a new config; after TTIN and TTOU, with the one there was."""
        self._own_name()
        if self._listeners is not None and self._hot is not None:
            self._listeners.changed(self._hot)
        if self._driver is None:
            self._singletons.suppress()
            return
        self._singletons.reconfigured()
        try:
            self.settings = self._driver.settings = settings()
        except ConfigurationError as error:
            self.log.error("%s; what was set before stays", error)  # noqa: TRY400  # the same
        self._say_where_it_stays()

    def _say_where_it_stays(self) -> None:
        """Who is started next looks where its settings, or its first address, say."""
        if self._listeners is None:
            return
        named = self.settings.directory or default_directory(self._listeners.addresses[0])
        if named != self._directory:
            self.log.warning(
                "The next instance would look for this one in %s, but this one stays in %s: "
                "set hotrestart_dir to that, or nobody can take over from it",
                named,
                self._directory,
            )

    # -- taking over ---------------------------------------------------------------------------

    def start(self, server: Any) -> None:
        """Meet the running instance and take its listeners; exits if that cannot be."""
        signal.setitimer(signal.ITIMER_REAL, 0)  # the app is loaded, if it was to be preloaded
        spent = time.monotonic() - self._began if server.cfg.preload_app else 0.0
        settings = self.settings
        hot = HotRestart(
            takeover_timeout=settings.takeover_timeout,
            turn_timeout=settings.ready_timeout + settings.takeover_timeout,
            logger=self.log,
        )
        self._hot = hot
        # gunicorn would unlink the live path of a Unix socket if it ended now; and it refuses
        # USR2, which would hand on what may not be ours yet.
        server.reexec_pid = -1
        try:
            self._listeners = listeners = Listeners(server)
            self._directory = self.settings.directory or default_directory(listeners.addresses[0])
            if hot.initialize(self._directory, len(listeners.addresses)) is Role.CHILD:
                self._record = Record(
                    self._directory, hot.takeover_id, self._pid, "child", self.log
                )
                self._record.note("started")
            server.LISTENERS = listeners.open(hot)
        except HotRestartError as error:
            self._fail(error)
        if self._record is not None:
            bound = [name for name in hot.listeners if name not in hot.inherited]
            self._record.note("listeners inherited", inherited=sorted(hot.inherited), bound=bound)
        for name in sorted(hot.inherited):
            self.log.info("Inherited %s from pid %s", name, hot.parent_pid)
        self._singletons.check_pidfile(hot.parent_pid if hot.role is Role.CHILD else 0)
        self._own_name()
        if not worker_kind(server.worker_class):
            self.log.warning(
                "Workers of the class %s cannot stop accepting without stopping: at a takeover "
                "they are stopped at once, and cannot serve again if the new instance dies",
                server.cfg.worker_class_str,
            )
        self._pipe = WorkerPipe()
        self._events = ArbiterEvents(server)
        self._events.watch(self._pipe.fileno())
        self._events.set_deadline(max(0.0, self.settings.ready_timeout - spent), "ready")
        self._take_the_handlers()
        self._let_stops_in_behind_forks()
        if hot.role is Role.CHILD:
            self._spawn_at_once()

    def _let_stops_in_behind_forks(self) -> None:
        """`forking` has held them; a worker lets them in when it has its own handlers."""
        server = self.server
        spawn = server.spawn_worker

        def spawn_worker() -> int:
            with worker_agent.mask_restored():
                return int(spawn())

        server.spawn_worker = spawn_worker

    def _spawn_at_once(self) -> None:
        """Start the first ones without the pause of up to 0.1 s that gunicorn makes behind each."""
        server = self.server

        def spawn_workers() -> None:
            del server.spawn_workers  # the first ones only: those that die may do so for ever
            for _ in range(server.num_workers - len(server.WORKERS)):
                server.spawn_worker()

        server.spawn_workers = spawn_workers

    def _own_name(self) -> None:
        """A dirty arbiter would be killed by the next instance's of the same name."""
        cfg = self.server.cfg
        if self._hot is not None and cfg.dirty_workers > 0 and cfg.dirty_apps:
            name = f"{cfg.proc_name}-{self._pid}"
            self.server.proc_name = name
            cfg.set("proc_name", name)

    def _fail(self, error: HotRestartError) -> NoReturn:
        if isinstance(error, Overtaken):
            self._say_overtaken(error)
        else:
            self._complain(in_gunicorns_words(str(error)))
        self._close(crashed=True)
        sys.exit(_status_of(error))

    def _complain(self, why: str) -> None:
        hot = self._hot
        if self._record is not None:
            self._record.note(outcome="failed", reason=why)
        if hot is not None and hot.role is Role.CHILD:
            self.log.error(
                "Hot restart failed: %s; the running instance (pid %s) serves on",
                why,
                hot.parent_pid or "unknown",
            )
        else:
            self.log.error("Start failed: %s", why)

    def _say_overtaken(self, error: Overtaken) -> None:
        journal = Journal(self.log)
        journal.record = self._record
        journal.emit(events.OVERTAKEN, pid=error.pid)

    def _preload_hangs(self, _number: int, _frame: FrameType | None) -> None:
        self.log.error(
            "Start failed: the app was not loaded within %g s (hotrestart_ready_timeout)",
            self.settings.ready_timeout,
        )
        os._exit(NotReady.status)

    # -- the arbiter's queue -------------------------------------------------------------------

    def _take_the_handlers(self) -> None:
        """Have gunicorn's own signal handlers ask here first.

        gunicorn looks them up by name, as ``handle_chld`` or ``handle_cld``, on the instance.
        """
        server = self.server
        reap = server.handle_chld
        server.handle_chld = server.handle_cld = lambda: self.wake(reap)
        for name in ("term", "int", "quit"):
            self._wrap(name, self._stopping)
        for name in ("hup", "ttin", "ttou", "usr2"):
            self._wrap(name, lambda original, name=name: self._changing(original, name))

    def _wrap(self, name: str, around: Callable[..., None]) -> None:
        original = getattr(self.server, f"handle_{name}")
        setattr(self.server, f"handle_{name}", lambda: around(original))

    @contextlib.contextmanager
    def _keeping_paths(self) -> Iterator[None]:
        """Who stops in here leaves it to us which Unix paths go: gunicorn asks only itself."""
        try:
            yield
        except (StopIteration, HaltServer):
            self._no_way_back()
            raise

    def _no_way_back(self) -> None:
        if self.server.reexec_pid == 0:
            self.server.reexec_pid = -1
        dirty_arbiter.outlives_workers(self.server)
        reap = type(self.server).reap_workers

        def reap_all() -> None:
            """A second worker that fails to boot would end gunicorn in the midst of its stop."""
            while True:
                with contextlib.suppress(HaltServer):
                    reap(self.server)
                    return

        self.server.reap_workers = reap_all

    def _stopping(self, original: Callable[[], None]) -> None:
        self._no_way_back()  # INT and QUIT stop the workers before they raise
        if self._driver is not None:
            self._driver.stopping()
        original()

    def _changing(self, original: Callable[[], None], name: str) -> None:
        """HUP, TTIN, TTOU, USR2: not for an instance whose code on disk is another's by now."""
        self.wake(lambda: None)
        if self._driver is not None and not self._driver.allows_change:
            self.log.warning("SIG%s ignored: another instance has taken over", name.upper())
            return
        self._changed = True
        taken = self._driver is not None and self._driver.being_replaced
        with self._keeping_paths():
            if name == "hup" and taken:
                self._singletons.reload_without_pidfile(original)
            else:
                original()

    def wake(self, reap: Callable[[], None]) -> None:
        """Something has happened: a child ended, a descriptor is readable, a deadline passed."""
        assert self._pipe is not None  # noqa: S101  # set before the handlers are
        before = set(self.server.WORKERS)
        with self._keeping_paths():
            reap()
            reports = self._pipe.reports()
            self._ready |= {one.pid for one in reports if one.what is WorkerEvent.READY}
            gone = before - self.server.WORKERS.keys()
            if self._driver is None:
                self._give_up_for(gone - self._ready)
            self._ready &= self.server.WORKERS.keys()
            if self._driver is None:
                self._boot()
            if self._driver is not None:
                self._driver.step(reports, self._ready)

    def _give_up_for(self, failed: set[int]) -> None:
        """Where somebody else serves, nothing is won by starting failing workers for ever."""
        if failed and self._hot is not None and self._hot.role is Role.CHILD and not self._changed:
            raise HaltServer(
                f"a worker (pid {min(failed)}) ended before it was ready, see above",
                self.server.WORKER_BOOT_ERROR,
            )

    def _boot(self) -> None:
        assert self._events is not None  # noqa: S101
        server = self.server
        if len(self._ready) >= server.num_workers and self._ready >= server.WORKERS.keys():
            self._events.clear_deadline("ready")
            self._hand_over()
        elif self._events.expired("ready"):
            server.cfg.set("graceful_timeout", _LAST_GRACE)
            missing = server.num_workers - len(self._ready)
            error = NotReady(
                f"{missing} of {server.num_workers} workers were not ready within "
                f"{self.settings.ready_timeout:g} s (hotrestart_ready_timeout)"
            )
            raise HaltServer(str(error), error.status)

    def _hand_over(self) -> None:
        """Every worker serves: from now on this is the instance."""
        hot, server, singletons = self._hot, self.server, self._singletons
        assert hot is not None and self._pipe is not None  # noqa: S101, PT018
        assert self._events is not None  # noqa: S101
        replaces = hot.role is Role.CHILD
        if self._record is not None:
            self._record.note("ready")
        try:
            singletons.write_pidfile()
            hot.ready()
        except (HotRestartError, OSError) as error:
            singletons.restore_pidfile()
            raise HaltServer(in_gunicorns_words(str(error)), _status_of(error)) from error
        if self._record is not None:
            self._record.note(outcome="taken over")
        singletons.restore()
        server.reexec_pid = 0
        self._driver = LifecycleDriver(
            server=server,
            hot=hot,
            pipe=self._pipe,
            events=self._events,
            singletons=singletons,
            directory=self._directory,
            settings=self.settings,
        )
        self._driver.begin(replaces=replaces)

    # -- in a worker ---------------------------------------------------------------------------

    def forked(self, worker: Any) -> None:
        """Only what a worker may have stays open."""
        atexit.unregister(self._left_behind)
        if self._pipe is not None and self._hot is not None:
            taking_over = self._driver is None and self._hot.takeover_id
            self.worker = worker_agent.WorkerAgent(
                worker,
                self._pipe,
                self.settings,
                self._directory,
                own_target=HandoverTarget(self._directory, self._hot.takeover_id, Side.NEW)
                if taking_over
                else None,
            )
            self.worker.forked()

    # -- the end -------------------------------------------------------------------------------

    def end(self, reason: BaseException | None) -> None:
        """Close, and say what became of the takeover."""
        failed = isinstance(reason, HaltServer) and reason.exit_status != 0
        overtaken = reason.__cause__ if reason is not None else None
        if isinstance(overtaken, Overtaken):
            self._say_overtaken(overtaken)
        elif self._hot is not None and self._hot.role in (Role.CHILD, Role.INITIAL):
            if failed:
                why = str(getattr(reason, "reason", reason))
                # gunicorn's own reasons are sentences that explain nothing.
                self._complain(f"{why[:-1]}, see above" if why.endswith(".") else why)
            elif self._hot.role is Role.CHILD:
                self._complain("it was stopped before it had taken over")
        if self._driver is not None and self._pipe is not None:
            self._driver.ended(self._pipe.reports())
        self._close(crashed=failed)

    def _close(self, *, crashed: bool) -> None:
        atexit.unregister(self._left_behind)
        if self._events is not None:
            self._events.close()
        if self._hot is not None:
            self._hot.close(crashed=crashed)
        if self._pipe is not None:
            self._pipe.close()

    def _left_behind(self) -> None:
        """An end that gunicorn has no hook for: an app that cannot be preloaded, a crash."""
        if os.getpid() == self._pid:
            if self._hot is None or self._hot.role in (Role.CHILD, Role.INITIAL):
                self._complain("gunicorn ended before it could serve, see above")
            self._close(crashed=True)


def _status_of(error: Exception) -> int:
    return error.status if isinstance(error, (ConfigurationError, Overtaken)) else EX_TEMPFAIL


def in_gunicorns_words(text: str) -> str:
    """The message with the names that the options have in a gunicorn config file."""
    for option in OPTIONS:
        if option.flag:
            text = text.replace(option.flag, option.config)
    return text
