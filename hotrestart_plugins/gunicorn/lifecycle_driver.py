"""Drives one master through the lifecycle: feeds it with what happens, and does what it says.

The table in `hotrestart_plugins.lifecycle.table` decides. After a takeover the workers pause: they
accept nothing, finish what they have, and could accept again. They are stopped only when the
rollback window is over, with what is left of the drain timeout.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from hotrestart_plugins.core import events
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.hot_restart import ChildExitAction, HotRestart, Role
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.core.takeover_server import Child
from hotrestart_plugins.errors import HotRestartError, NotReady, Overtaken
from hotrestart_plugins.gunicorn._compat import arbiter
from hotrestart_plugins.gunicorn._compat.arbiter import HaltServer
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter
from hotrestart_plugins.gunicorn.arbiter_events import ArbiterEvents
from hotrestart_plugins.gunicorn.failures import EX_SOFTWARE, in_config_words, status_of
from hotrestart_plugins.gunicorn.listeners import Listeners
from hotrestart_plugins.gunicorn.singletons import Singletons
from hotrestart_plugins.gunicorn.worker_pool import WorkerPool
from hotrestart_plugins.lifecycle.table import Action, Event, Lifecycle, State
from hotrestart_plugins.settings import Settings

_POLL_INTERVAL = 0.25  # seconds between two looks at the new instance: a pidfd sends no SIGIO
_RETRY_DELAY = 1.0  # seconds after a fault until everything is looked at again
_CONTROL_DELAY = 1.0  # seconds for the old instance to stop its control server
_NO_WINDOW = 1.0  # seconds for workers to stop accepting before they are stopped
_LAST_GRACE = 2  # seconds for workers that hang while they start to end by themselves
_EXIT_GRACE = 3  # seconds that a worker may take beyond the drain: to notice, and to clean up
_MOST_BATCHES = 16  # of datagrams in one step, so that a flood cannot starve the arbiter


class LifecycleDriver:
    """One master, from its start to its end. Owns nothing that it is given."""

    def __init__(
        self,
        server: Arbiter,
        settings: Settings,
        directory: Path,
        *,
        hot: HotRestart,
        listeners: Listeners,
        pool: WorkerPool,
        deadlines: ArbiterEvents,
        singletons: Singletons,
        journal: Journal,
        fence: Fence,
    ) -> None:
        """`directory`: the hot-restart directory."""
        self.settings = settings
        self.lifecycle = Lifecycle()
        self._server = server
        self._directory = directory
        self._hot = hot
        self._listeners = listeners
        self._pool = pool
        self._deadlines = deadlines
        self._singletons = singletons
        self._journal = journal
        self._fence = fence
        self._drain_ends = 0.0
        self._workers_may_end = False
        self._actions: Mapping[Action, Callable[[], None]] = {
            Action.BOOT: self._boot,
            Action.COMMIT: self._commit,
            Action.ACCEPT: self._accept,
            Action.STOP_ACCEPTING: self._stop_accepting,
            Action.DRAIN: self._drain,
            Action.ACCEPT_AGAIN: self._accept_again,
            Action.STAND_DOWN: self._stand_down,
            Action.FINISH_DRAINING: self._finish_draining,
            Action.ABORT: pool.count_killed,  # gunicorn has killed them
            # gunicorn stops the workers and exits by itself when its main loop has ended.
            Action.EXIT: deadlines.close,
            Action.EXIT_FAILED: deadlines.close,
        }

    # -- events --------------------------------------------------------------------------------

    def _perform(self, event: Event) -> None:
        """Do what the table says. An error in an action is the caller's."""
        for action in self.lifecycle.handle(event):
            self._actions[action]()

    def _happened(self, event: Event) -> bool:
        """Do what the table says, each action behind the fence; return whether none failed."""
        before = self._fence.faults
        for action in self.lifecycle.handle(event):
            with self._fence:
                self._actions[action]()
        return self._fence.faults == before

    def stopping(self) -> None:
        """A signal stops gunicorn, which stops the workers next."""
        self._happened(Event.STOP_ORDERED)

    def failing(self) -> None:
        """A worker has failed; gunicorn gives up, and stops the others next."""
        replaced = self.lifecycle.can_serve_again
        self._happened(Event.STOP_ORDERED if replaced else Event.FAILED)

    def workers_may_end(self) -> None:
        """SIGHUP or SIGTTOU ends workers, which may not be ready yet."""
        self._workers_may_end = True

    def step(self, gone: set[int]) -> None:
        """Look at everything that may have happened.

        Raises StopIteration when it is time to stop, and HaltServer if the start has failed.
        `gone`: the pids of workers that gunicorn has just reaped.
        """
        before = self._fence.faults
        self._deadlines.expired("again")
        with self._fence:
            self._pool.update()
        failed = gone - self._pool.ready
        with self._fence:
            self._pool.forget_ended()
        if self.lifecycle.state is State.STARTING:
            self._boot_step(failed)
        if self.lifecycle.serves or self.lifecycle.can_serve_again:
            for look in (
                self._answer,
                self._look_at_workers,
                self._look_at_window,
                self._look_at_new_instance,
                self._look_at_control,
            ):
                with self._fence:
                    look()
        if self._fence.faults == before:
            self._fence.all_well()
        else:
            self._deadlines.set_deadline(_RETRY_DELAY, "again")
        if self.lifecycle.state in (State.STOOD_DOWN, State.LEAVING):
            raise StopIteration

    # -- the start -----------------------------------------------------------------------------

    def start(self, seconds: float) -> None:
        """Wait for this instance's turn, and get the listeners.

        Raises HotRestartError; Overtaken if a newer instance was started meanwhile. `seconds`: for
        the workers to become ready.
        """
        try:
            self._hot.initialize(self._directory, len(self._listeners.addresses))
            self._perform(Event.TURN_CAME)
        except Overtaken:
            self._perform(Event.NEWER_STARTED)
            raise
        except HotRestartError:
            self._perform(Event.FAILED)
            raise
        self._deadlines.set_deadline(seconds, "ready")

    def _boot(self) -> None:
        hot, journal = self._hot, self._journal
        if hot.role is Role.CHILD:
            journal.record = Record(
                self._directory, hot.takeover_id, os.getpid(), "new", journal.logger
            )
        journal.emit(events.STARTED)
        self._listeners.open(hot)
        inherited = sorted(hot.inherited)
        bound = [name for name in hot.listeners if name not in hot.inherited]
        journal.emit(events.LISTENERS_INHERITED, facts={"inherited": inherited, "bound": bound})
        for name in inherited:
            journal.emit(events.LISTENER_INHERITED, address=name, pid=hot.parent_pid)

    def _boot_step(self, failed: set[int]) -> None:
        """Take over if every worker is ready; raise HaltServer if the start has failed."""
        before = self._fence.faults
        with self._fence:
            self._look_at_start(failed)
        if self._fence.faults == before:
            return
        if self._hot.role is Role.PARENT:  # it has taken over all the same
            self._happened(Event.COMMITTED)
        elif self._hot.role is Role.CHILD:
            with self._fence:
                self._singletons.restore_pidfile()
            self._fail(Event.FAILED, "a fault in hotrestart_plugins, see above", EX_SOFTWARE)

    def _look_at_start(self, failed: set[int]) -> None:
        if failed and self._hot.role is Role.CHILD and not self._workers_may_end:
            # Where another instance serves, nothing is won by starting failing workers for ever.
            why = f"a worker (pid {min(failed)}) ended before it was ready, see above"
            self._fail(Event.FAILED, why, NotReady.status)
        over = self._deadlines.expired("ready")
        if self._pool.all_ready:
            self._deadlines.clear_deadline("ready")
            self._perform(Event.READY)
            self._happened(Event.COMMITTED)
        elif over:
            self._server.cfg.set("graceful_timeout", _LAST_GRACE)
            number = self._pool.number
            why = (
                f"{number - len(self._pool.ready)} of {number} workers were not ready within "
                f"{self.settings.ready_timeout:g} s (hotrestart_ready_timeout)"
            )
            self._fail(Event.READY_TIMED_OUT, why, NotReady.status)

    def _fail(self, event: Event, why: str, status: int) -> NoReturn:
        self._perform(event)
        raise HaltServer(why, status)

    def _commit(self) -> None:
        replaces = self._hot.role is Role.CHILD
        self._journal.emit(events.READY)
        try:
            self._singletons.write_pidfile()
            self._hot.ready()
        except Overtaken as error:
            self._singletons.restore_pidfile()
            self._perform(Event.NEWER_STARTED)
            raise HaltServer(str(error), error.status) from error
        except (HotRestartError, OSError) as error:
            self._singletons.restore_pidfile()
            self._fail(Event.FAILED, in_config_words(error), status_of(error))
        self._deadlines.set_deadline(_CONTROL_DELAY if replaces else 0.0, "control")
        if replaces:
            self._singletons.announce("Took over")

    def _accept(self) -> None:
        self._deadlines.watch(self._hot.fileno())
        self._singletons.restore()
        arbiter.may_unlink_paths(self._server)
        self._journal.emit(events.TAKEN_OVER)
        self._journal.emit(events.HOT_RESTART_READY)

    # -- the new instance ----------------------------------------------------------------------

    def _answer(self) -> None:
        for _ in range(_MOST_BATCHES):
            if not self._hot.handle():
                break
        else:
            self._deadlines.now()
        if self._told_to_go():
            self._make_way()

    def _told_to_go(self) -> bool:
        replaced = self._hot.role is Role.REPLACED and self._hot.child is not None
        return replaced and self.lifecycle.serves

    def _make_way(self) -> None:
        if not self._happened(Event.REPLACED):
            # It must not go on accepting beside the new instance.
            self._journal.emit(events.REPLACEMENT_FAILED)
            self._happened(Event.STOP_ORDERED)
        elif not self._pool.can_pause:
            self._happened(Event.WINDOW_ENDED)

    def _look_at_new_instance(self) -> None:
        child = self._hot.child
        if child is None:
            return
        # It has the listeners, too: gunicorn must not unlink their paths.
        arbiter.keep_paths(self._server)
        # Set first: whatever fails here is tried again.
        self._deadlines.set_deadline(_POLL_INTERVAL, "child")
        if child.alive:
            return
        means = self._hot.child_ended()
        if self._told_to_go():  # before its end, of which the next look decides
            self._make_way()
            return
        self._deadlines.clear_deadline("child")
        if means is ChildExitAction.NOTHING:
            self._journal.record = self._record_with(child)
            why = "the new instance exited before it had taken over"
            self._journal.emit(events.TAKEOVER_GIVEN_UP, facts={"reason": why})
        elif means is ChildExitAction.LEAVE:
            self._happened(Event.NEW_INSTANCE_LEFT)
            return
        else:
            self._happened(Event.NEW_INSTANCE_CRASHED)
        arbiter.may_unlink_paths(self._server)
        self._deadlines.watch(self._hot.fileno())

    def _record_with(self, child: Child) -> Record:
        return Record(self._directory, child.takeover_id, child.pid, "old", self._journal.logger)

    def _look_at_control(self) -> None:
        if self._deadlines.expired("control") and self.lifecycle.serves:
            self._singletons.start_control()

    # -- replaced ------------------------------------------------------------------------------

    def _stop_accepting(self) -> None:
        child = self._hot.child
        takeover_id = 0
        if child is not None and not self.settings.no_handover:
            takeover_id = child.takeover_id
        self._pool.pause(takeover_id)

    def _drain(self) -> None:
        child = self._hot.child
        self._drain_ends = time.monotonic() + self.settings.drain_timeout
        self._deadlines.set_deadline(self.settings.rollback_window or _NO_WINDOW, "window")
        self._deadlines.clear_deadline("control")
        self._journal.record = None if child is None else self._record_with(child)
        given = [] if child is None else sorted(child.given)
        self._journal.emit(events.DRAIN_STARTED, facts={"given": given})
        with self._fence:
            self._singletons.stop_control()

    def _look_at_workers(self) -> None:
        if self.lifecycle.can_serve_again:
            self._pool.start_no_more()
        if not self._pool.followed():
            return
        if self.lifecycle.serves:
            self._journal.emit(events.ACCEPTING_AGAIN, facts={"drain": self._pool.stats.counts()})
            return
        self._journal.emit(events.STOPPED_ACCEPTING)
        self._happened(Event.STOPPED_ACCEPTING)
        if not self.settings.rollback_window:
            self._happened(Event.WINDOW_ENDED)

    def _look_at_window(self) -> None:
        if self._deadlines.expired("window"):
            self._happened(Event.WINDOW_ENDED)

    def _accept_again(self) -> None:
        """The new instance has crashed: the workers that there are serve again."""
        self._deadlines.clear_deadline("window")
        self._pool.resume()
        for claim in (self._singletons.write_pidfile, self._singletons.start_control):
            with self._fence, contextlib.suppress(OSError):
                claim()
        self._singletons.announce("Serves again")

    def _stand_down(self) -> None:
        """Give up the place in the line, and the copies of the listeners.

        Whoever connects when the new instance has crashed is refused at once, instead of waiting
        for an instance that never accepts.
        """
        self._hot.stand_down()
        for name in self._hot.listeners:
            self._hot.drop(name)

    def _finish_draining(self) -> None:
        """Let gunicorn stop the workers, which have the rest of the drain timeout.

        The workers keep to it themselves; gunicorn kills those that are still there later.
        """
        left = max(1, math.ceil(self._drain_ends - time.monotonic()))
        self._server.cfg.set("graceful_timeout", left + _EXIT_GRACE)
        self._pool.expect_ends()
        self._deadlines.close()

    def ended(self) -> None:
        """All workers have ended."""
        if self.lifecycle.state is not State.STOOD_DOWN:
            return
        with self._fence:
            self._pool.update()
        self._happened(Event.DRAIN_TIMED_OUT if self._pool.killed else Event.DRAINED)
        stats = self._pool.stats
        if stats.aborted:
            self._journal.emit(events.DRAIN_TIMED_OUT, aborted=stats.aborted_text())
        self._journal.emit(events.DRAINED, stats=stats)
        self._journal.emit(events.DRAIN_ENDED, facts={"drain": stats.counts()})
