"""A worker's side: it reports when it is ready, stops accepting when told, and accepts again.

A worker that is ready looks at the pipe's command whenever SIGUSR2 comes, which gunicorn's workers
do not use. How to stop accepting depends on the worker class: there is a `WorkerAdapter` for each.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn._compat import interfaces
from hotrestart_plugins.gunicorn._compat.table import Feature
from hotrestart_plugins.gunicorn._compat.workers import (
    GunicornWorker,
    Worker,
    answer_status,
    missing_in,
)
from hotrestart_plugins.gunicorn.adapters.base import (
    WorkerAdapter,
    create_adapter,
    has_event_loop,
)
from hotrestart_plugins.gunicorn.arbiter_events import forget_in_worker
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent, WorkerPipe
from hotrestart_plugins.handover.frames import HandoverTarget, Side, path_of
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class WorkerAgent:
    """This worker process, as the master sees it."""

    def __init__(
        self,
        worker: interfaces.Worker,
        pipe: WorkerPipe,
        settings: Settings,
        directory: Path,
        *,
        own_target: HandoverTarget | None,
    ) -> None:
        """`directory`: the rendezvous directory. `own_target`: its instance, if that takes over."""
        self.settings = settings
        self.journal = Journal(worker.log)
        """What this worker says goes to gunicorn's log."""
        # The hooks get any worker. What one of a known class lacks is looked up before it is used.
        self._raw_worker = cast("GunicornWorker", worker)
        self._worker = Worker(self._raw_worker)
        self._pipe = pipe
        self._directory = directory
        # Another user than the master's may not look into the rendezvous directory.
        self._can_hand_over = worker.cfg.uid == os.geteuid() and not settings.no_handover
        self._own_target = own_target
        self._adapter: WorkerAdapter | None = None
        self._told_to_pause = False  # by the last command that was followed
        self._following = False
        self._graceful = worker.cfg.graceful_timeout
        self._drain_ends = 0.0
        self._handlers: dict[int, Any] = {}
        self._told_to_end = False

    def forked(self) -> None:
        """Keep only what is a worker's. Called first of all in the new process."""
        forget_in_worker()
        self._worker.on_first_heartbeat(self._ready)
        self._end_at_once_until_loaded()

    def _end_at_once_until_loaded(self) -> None:
        """Until the app is loaded, end at once when told to stop: nothing has been accepted yet.

        gunicorn loses such a signal before it has set its own handlers, and looks for it then only
        when the app is loaded, which may never be. What came since the fork comes now.
        """
        if not self.lacks(Feature.STOP_WHILE_STARTING):
            self._worker.around_signals(self._init_signals)
        for number in _STOPS:
            signal.signal(number, self._end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def _init_signals(self, gunicorns: Callable[[], None]) -> None:
        with mask_restored():
            hold_stops()
            gunicorns()
            self._handlers = {number: signal.signal(number, self._end) for number in _STOPS}

    def _end(self, _number: int, _frame: FrameType | None) -> NoReturn:
        self._told_to_end = True
        sys.exit(0)

    def _restore_signals(self) -> None:
        """Set gunicorn's handlers again, where the app has not set its own meanwhile."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) != self._end:
                continue
            signal.signal(number, handler)
            if number == signal.SIGTERM:  # gunicorn does so: no call of the app's is interrupted
                signal.siginterrupt(number, False)

    def initialised(self) -> None:
        """Make the adapter. The app is loaded; the loop, if there is one, does not run yet.

        Exits if the app fails the probe, where that can be asked without a loop.
        """
        self._restore_signals()
        if self._told_to_end:
            # If the signal came during a weak reference's callback or a bare `except` of the app,
            # the SystemExit was lost.
            sys.exit(0)
        probe = Probe.of(self.settings, "localhost")
        if probe is not None and not has_event_loop(type(self._raw_worker)):
            self._ask(probe)
        self._adapter = create_adapter(self._raw_worker, self)
        if self._adapter is not None:
            # One handler for all: signal.signal works under every event loop, because each has
            # a wakeup descriptor, and the adapters that need the loop's thread go there.
            signal.signal(signal.SIGUSR2, self._look)
            signal.siginterrupt(signal.SIGUSR2, False)

    def _ask(self, probe: Probe) -> None:
        if self.lacks(Feature.PROBE):
            return
        try:
            probe.run_plain(lambda request: answer_status(self._raw_worker, request))
        except NotReady as error:
            self.fail(error)

    def _ready(self) -> None:
        if self._adapter is not None:
            self._adapter.ready()
        self._pipe.report(WorkerEvent.READY)
        self._look()

    def _look(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Follow the pipe's command."""
        if self._adapter is None or self._following:
            return  # a second signal came while the first is followed: that one looks again
        self._following = True
        try:
            while self._pipe.paused != self._told_to_pause:
                self._told_to_pause = not self._told_to_pause
                self._follow(self._adapter)
        finally:
            self._following = False

    def _follow(self, adapter: WorkerAdapter) -> None:
        if self._told_to_pause:
            drain = self.settings.drain_timeout
            self._drain_ends = time.monotonic() + drain
            # For a stop that does not ask for the exact time that is left.
            self._worker.cfg.set("graceful_timeout", max(1, round(drain)))
            adapter.pause()
        else:
            self._worker.cfg.set("graceful_timeout", self._graceful)
            adapter.resume()

    def fail(self, error: NotReady) -> NoReturn:
        """End before this worker has served, with a status that ends gunicorn's master, too."""
        self.journal.emit(events.WORKER_NOT_READY, error=error)
        sys.exit(error.status)  # gunicorn's WORKER_BOOT_ERROR

    # -- for the adapters ----------------------------------------------------------------------

    def lacks(self, feature: Feature) -> bool:
        """Whether gunicorn lacks a name that the feature needs in a worker of this class."""
        return feature in missing_in(type(self._raw_worker))

    def done(self, what: WorkerEvent) -> None:
        """Report that the adapter has followed the command: PAUSED or RESUMED."""
        resumed = self._adapter is not None and what is WorkerEvent.RESUMED
        self._pipe.report(what, self._adapter.stats() if self._adapter and resumed else None)

    @property
    def lifeline(self) -> int:
        """A descriptor that is ready for reading once the master has ended. It stays the pipe's."""
        return self._pipe.lifeline

    @property
    def has_lost_master(self) -> bool:
        """Whether the master has ended."""
        return os.getppid() != self._pipe.master_pid

    @property
    def seconds_left(self) -> int:
        """Seconds that a stop may take: the rest of the drain if paused, else graceful_timeout."""
        if not self._told_to_pause:
            return int(self._worker.cfg.graceful_timeout)
        return max(0, math.floor(self._drain_ends - time.monotonic()))

    @property
    def own_target(self) -> HandoverTarget | None:
        """This instance, if its workers receive the connections of the old one; else None."""
        return self._own_target if self._can_hand_over else None

    @property
    def handover_target(self) -> HandoverTarget | None:
        """The instance whose workers receive this one's connections; None if there is none."""
        takeover_id = self._pipe.takeover_id
        if not takeover_id or not self._can_hand_over:
            return None
        return HandoverTarget(self._directory, takeover_id, Side.NEW)

    def exiting(self) -> None:
        """This worker ends."""
        # Interpreter shutdown resets SIGUSR2 to SIG_DFL, which would kill this process.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if self.own_target is not None:
            path_of(self.own_target, os.getpid()).unlink(missing_ok=True)
        if self._adapter is not None and self._told_to_pause:
            self._pipe.report(WorkerEvent.ENDS, self._adapter.stats())


@contextlib.contextmanager
def mask_restored() -> Iterator[None]:
    """Restore the signal mask on exit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hold_stops() -> None:
    """Block the signals that stop a worker. The kernel keeps them until they are unblocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
