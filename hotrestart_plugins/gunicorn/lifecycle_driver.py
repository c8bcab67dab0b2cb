"""From ready to exit: the master that answers, is replaced, and serves again if that fails.

After a takeover comes first the pause: the workers accept nothing, finish what they have, and
could accept again. Only when the rollback window is over are they stopped.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

from hotrestart_plugins.core.hot_restart import ChildExitAction, HotRestart, Role
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.core.takeover_server import Child
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn.adapters.base import worker_kind
from hotrestart_plugins.gunicorn.arbiter_events import ArbiterEvents
from hotrestart_plugins.gunicorn.singletons import Singletons
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent, WorkerMessage, WorkerPipe
from hotrestart_plugins.settings import Settings

_POLL_INTERVAL = 0.25  # seconds between two looks at a child: a pidfd sends no SIGIO
_CONTROL_DELAY = 1.0  # seconds in which the replaced instance stops its control server
_NO_WINDOW = 1.0  # seconds that workers have to stop accepting before they are stopped
_EXIT_GRACE = 3  # seconds that a worker may take beyond the drain: to notice, and to clean up
_MOST_BATCHES = 16  # of datagrams in one step, so that a flood cannot starve the arbiter


class Phase(enum.Enum):
    """What this instance does."""

    SERVING = "serving"
    PAUSED = "paused"  # replaced, within the rollback window
    LEAVING = "leaving"


class LifecycleDriver:
    """This master from its handover on. Owns nothing that it is given."""

    def __init__(
        self,
        *,
        server: Any,
        hot: HotRestart,
        pipe: WorkerPipe,
        events: ArbiterEvents,
        singletons: Singletons,
        directory: Path,
        settings: Settings,
    ) -> None:
        """`directory`: the meeting directory."""
        self.settings = settings
        self._directory = directory
        self._server = server
        self._hot = hot
        self._pipe = pipe
        self._events = events
        self._singletons = singletons
        self._log = server.log
        self._phase = Phase.SERVING
        self._ready: set[int] = set()
        self._signalled: set[int] = set()
        self._awaited: set[int] = set()
        self._paused_at = 0.0
        self._workers_before = 0
        self._stats = DrainStats()
        self._unheard: set[int] = set()
        self._record: Record | None = None

    def begin(self, *, replaces: bool) -> None:
        """`hot` is ready: answer from now on."""
        self._events.watch(self._hot.fileno())
        if replaces:
            self._singletons.announce("Took over")
            self._events.set_deadline(_CONTROL_DELAY, "control")
        else:
            self._singletons.start_control()
        self._log.info("Hot restart: ready")

    @property
    def allows_change(self) -> bool:
        """Whether the config may be read again, and workers be started."""
        return self._phase is Phase.SERVING

    @property
    def being_replaced(self) -> bool:
        """Whether a child has been given listeners."""
        return self._hot.child is not None

    def step(self, reports: list[WorkerMessage], ready: set[int]) -> None:
        """Look at everything. Raises StopIteration when it is time to leave, as gunicorn does."""
        self._ready = ready
        self._answer()
        if self._phase is Phase.SERVING and self._hot.role is Role.REPLACED:
            self._pause()
        if self._phase is Phase.PAUSED:
            self._hold_still()
        self._count(reports)
        if self._events.expired("control") and self._phase is Phase.SERVING:
            self._singletons.start_control()
        if self._events.expired("window"):
            self._leave()
        self._watch_child()

    def _answer(self) -> None:
        for _ in range(_MOST_BATCHES):
            if not self._hot.handle():
                return
        self._events.now()

    # -- the child -----------------------------------------------------------------------------

    def _watch_child(self) -> None:
        child = self._hot.child
        if child is None:
            return
        if self._server.reexec_pid == 0:
            # Its listeners are another's too: gunicorn must not unlink their paths any more.
            self._server.reexec_pid = -1
        if child.alive:
            self._events.set_deadline(_POLL_INTERVAL, "child")
            return
        self._events.clear_deadline("child")
        after = self._hot.child_ended()
        if after is ChildExitAction.NOTHING:
            self._record_with(child).note(
                outcome="failed", reason="the child ended before it had taken over"
            )
        elif after is ChildExitAction.LEAVE:
            self._leave()
        elif after is ChildExitAction.RESUME:
            self._resume()
        if self._server.reexec_pid == -1:
            self._server.reexec_pid = 0
        self._events.watch(self._hot.fileno())

    def _record_with(self, child: Child) -> Record:
        return Record(self._directory, child.takeover_id, child.pid, "parent", self._log)

    # -- replaced ------------------------------------------------------------------------------

    def _pause(self) -> None:
        self._phase = Phase.PAUSED
        self._paused_at = time.monotonic()
        self._workers_before = self._server.num_workers
        child = self._hot.child
        self._stats = DrainStats()
        self._record = None
        takeover_id = 0
        if child is not None:
            self._record = self._record_with(child)
            self._record.note(given=sorted(child.given))
            if not self.settings.no_handover:
                takeover_id = child.takeover_id
        self._pipe.set_command(paused=True, takeover_id=takeover_id)
        self._awaited = set(self._ready)
        self._signal(self._ready)
        self._events.clear_deadline("control")
        self._singletons.stop_control()
        if not self._known:
            self._leave()
        self._events.set_deadline(self.settings.rollback_window or _NO_WINDOW, "window")

    @property
    def _known(self) -> bool:
        """Whether the workers can pause, and report."""
        return bool(worker_kind(self._server.worker_class))

    def _hold_still(self) -> None:
        """Start no worker in the place of one that ends: the code on disk is the new one."""
        # The attribute, not the property: the user's nworkers_changed has no part in this.
        self._server._num_workers = len(self._server.WORKERS)  # noqa: SLF001
        # Those that were still starting when the others were signalled.
        self._signal(self._ready - self._signalled)

    def _signal(self, pids: set[int]) -> None:
        """Have workers look at the pipe's command; only those that are ready can bear it.

        Of a class that is not known they never can, and would die of it.
        """
        if not self._known:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        self._signalled |= pids

    def _count(self, reports: list[WorkerMessage]) -> None:
        for one in reports:
            self._stats += one.stats
        if not self._awaited:
            return
        wanted = WorkerEvent.PAUSED if self._phase is Phase.PAUSED else WorkerEvent.RESUMED
        self._awaited -= {one.pid for one in reports if one.what is wanted}
        gone = self._awaited - self._server.WORKERS.keys()
        if gone and wanted is WorkerEvent.RESUMED:
            self._keep_count()  # they were leaving when they were called back
        self._awaited -= gone
        if self._awaited:
            return
        if wanted is WorkerEvent.RESUMED:
            self._note("accepting again", outcome="rolled back", tally=self._stats.as_record())
            self._log.info("Accepting again")
            return
        self._note("stopped accepting")
        self._log.info("Stopped accepting; draining")
        if not self.settings.rollback_window:
            self._leave()

    def _note(self, step: str, **facts: Any) -> None:
        if self._record is not None:
            self._record.note(step, **facts)

    def _resume(self) -> None:
        """The new instance has crashed: the workers that there are serve again."""
        self._phase = Phase.SERVING
        self._events.clear_deadline("window")
        self._pipe.set_command(paused=False)
        self._awaited, self._signalled = set(self._ready), set()
        self._signal(self._ready)
        self._signalled.clear()
        self._keep_count()
        with contextlib.suppress(OSError):
            self._singletons.write_pidfile()
        self._singletons.start_control()
        self._singletons.announce("Serves again")

    def _keep_count(self) -> None:
        """As many workers as are left: one started now would run the code that has just failed."""
        left = len(self._server.WORKERS)
        if 0 < left < self._workers_before:
            self._log.warning(
                "%d of %d workers are left; more would run the code that is on disk now. "
                "Send SIGHUP when it is good again",
                left,
                self._workers_before,
            )
        self._server._num_workers = left or self._workers_before  # noqa: SLF001

    def _leave(self) -> None:
        """Stop as gunicorn stops on SIGTERM, with the time that is left for the drain."""
        self.stopping()
        self._hot.stand_down()
        self._events.close()
        raise StopIteration

    def stopping(self) -> None:
        """The workers are about to be stopped."""
        if self._phase is not Phase.PAUSED:
            return
        self._phase = Phase.LEAVING
        # The workers keep the time themselves; who is still there later is killed.
        left = self._paused_at + self.settings.drain_timeout - time.monotonic()
        self._server.cfg.set("graceful_timeout", max(1, math.ceil(left)) + _EXIT_GRACE)
        self._unheard = set(self._server.WORKERS) if self._known else set()

    def ended(self, reports: list[WorkerMessage]) -> None:
        """The workers have ended; their last reports."""
        if self._phase is not Phase.LEAVING:
            return
        for one in reports:
            self._stats += one.stats
            if one.what is WorkerEvent.ENDS:
                self._unheard.discard(one.pid)
        # A killed worker was in the midst of a request, of one at least.
        self._stats.aborted_requests += len(self._unheard)
        if self._stats.aborted:
            self._log.warning("The drain timeout is over: %s", self._stats.aborted_text())
        self._log.info("Drained: %s; leaving", self._stats)
        self._note("drained", tally=self._stats.as_record())
