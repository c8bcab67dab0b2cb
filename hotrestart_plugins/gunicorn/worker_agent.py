"""A worker's side: it says when it is ready, stops accepting when told, and accepts again.

A worker that is ready looks at the pipe's command whenever SIGUSR2 comes, which gunicorn's workers
do not use. How to stop accepting is each worker class's own affair: a `WorkerAdapter` for each.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn.adapters.base import (
    WITH_EVENT_LOOP,
    WorkerAdapter,
    create_adapter,
    worker_kind,
)
from hotrestart_plugins.gunicorn.arbiter_events import forget_in_worker
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent, WorkerPipe
from hotrestart_plugins.handover.frames import HandoverTarget, path_of
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class WorkerAgent:
    """This worker process, as seen from the arbiter."""

    def __init__(
        self,
        worker: Any,
        pipe: WorkerPipe,
        settings: Settings,
        directory: Path,
        *,
        own_target: HandoverTarget | None,
    ) -> None:
        """`directory`: the meeting directory. `own_target`: its instance, if that takes over."""
        self.settings = settings
        self._worker = worker
        self._pipe = pipe
        self._directory = directory
        # Another user than the master's may not look into the meeting directory.
        self._can_hand_over = worker.cfg.uid == os.geteuid() and not settings.no_handover
        self._own_target = own_target
        self._adapter: WorkerAdapter | None = None
        self._paused = False
        self._looking = False
        self._graceful = worker.cfg.graceful_timeout
        self._drain_ends = 0.0
        self._handlers: dict[int, Any] = {}
        self._told_to_end = False

    def forked(self) -> None:
        """First of all in the new process: keep only what is a worker's."""
        forget_in_worker()
        # The first heartbeat of every worker class comes when it is able to serve.
        self._worker.notify = self._first_notify
        self._end_at_once_until_loaded()

    def _end_at_once_until_loaded(self) -> None:
        """When told to stop: nothing has been accepted yet.

        gunicorn loses such a signal before it has set its own handlers, and looks for it then only
        when the app is loaded, which may never be. What came since the fork comes now.
        """
        init_signals = self._worker.init_signals

        def init_and_end() -> None:
            with mask_restored():
                hold_stops()
                init_signals()
                self._handlers = {number: signal.signal(number, self._end) for number in _STOPS}

        self._worker.init_signals = init_and_end
        for number in _STOPS:
            signal.signal(number, self._end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def _end(self, _number: int, _frame: FrameType | None) -> NoReturn:
        self._told_to_end = True
        sys.exit(0)

    def _take_signals_back(self) -> None:
        """The handlers are gunicorn's again, but for those that the app has set meanwhile."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) != self._end:
                continue
            signal.signal(number, handler)
            if number == signal.SIGTERM:  # as gunicorn has it: no call of the app's is interrupted
                signal.siginterrupt(number, False)

    def initialised(self) -> None:
        """The app is loaded; the loop, if there is one, does not run yet.

        Exits if the app fails the probe, where that can be asked without a loop.
        """
        self._take_signals_back()
        if self._told_to_end:
            # Where the signal came, in a weak reference's callback or in the app's own bare except,
            # the SystemExit was lost.
            sys.exit(0)
        kind = worker_kind(type(self._worker))
        probe = Probe.of(self.settings, "localhost")
        if probe is not None and kind not in WITH_EVENT_LOOP:
            from hotrestart_plugins.gunicorn.adapters.close_hook import ask_app  # noqa: PLC0415

            try:
                probe.run_plain(lambda request: ask_app(self._worker, request))
            except NotReady as error:
                self.fail(error)
        self._adapter = create_adapter(kind, self._worker, self)
        if self._adapter is not None:
            # One handler for all: signal.signal works under every event loop, because each has
            # a wakeup descriptor, and the adapters that need the loop's thread go there.
            signal.signal(signal.SIGUSR2, self._look)
            signal.siginterrupt(signal.SIGUSR2, False)

    def _first_notify(self) -> None:
        del self._worker.notify
        self._worker.notify()
        if self._adapter is not None:
            self._adapter.ready()
        self._pipe.report(WorkerEvent.READY)
        self._look()

    def _look(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Do what the pipe's command says."""
        if self._adapter is None or self._looking:
            return  # a second signal has come while the first is followed: it looks again
        self._looking = True
        try:
            while self._pipe.paused != self._paused:
                self._paused = not self._paused
                self._follow(self._adapter)
        finally:
            self._looking = False

    def _follow(self, adapter: WorkerAdapter) -> None:
        if self._paused:
            drain = self.settings.drain_timeout
            self._drain_ends = time.monotonic() + drain
            # For a stop that does not ask for the exact time that is left.
            self._worker.cfg.set("graceful_timeout", max(1, round(drain)))
            adapter.pause()
        else:
            self._worker.cfg.set("graceful_timeout", self._graceful)
            adapter.resume()

    def fail(self, error: NotReady) -> NoReturn:
        """End before this worker has served, in the way that ends gunicorn's master, too."""
        self._worker.log.error("%s", error)
        sys.exit(error.status)  # gunicorn's WORKER_BOOT_ERROR

    # -- for the adapters ----------------------------------------------------------------------

    def done(self, what: WorkerEvent) -> None:
        """The adapter has paused, or resumed."""
        stats = (
            self._adapter.stats()
            if self._adapter is not None and what is WorkerEvent.RESUMED
            else None
        )
        self._pipe.report(what, stats)

    @property
    def lifeline(self) -> int:
        """A descriptor that is ready for reading once the master has ended."""
        return self._pipe.lifeline

    @property
    def seconds_left(self) -> int:
        """That a stop may take: of the drain since the pause, or what gunicorn was told."""
        if not self._paused:
            return int(self._worker.cfg.graceful_timeout)
        return max(0, math.floor(self._drain_ends - time.monotonic()))

    @property
    def receiver_path(self) -> Path | None:
        """Where this worker is to take in the connections of the old instance's; None: nowhere."""
        if self._own_target is None or not self._can_hand_over:
            return None
        return path_of(self._own_target, os.getpid())

    @property
    def handover_target(self) -> HandoverTarget | None:
        """Whose workers take in this one's connections; None: nobody's."""
        takeover_id = self._pipe.takeover_id
        return (
            HandoverTarget(self._directory, takeover_id)
            if takeover_id and self._can_hand_over
            else None
        )

    def exiting(self) -> None:
        """This worker ends."""
        # Python is about to give the signal its default meaning back, which is to die of it.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if self.receiver_path is not None:
            self.receiver_path.unlink(missing_ok=True)
        if self._adapter is not None and self._paused:
            self._pipe.report(WorkerEvent.ENDS, self._adapter.stats())


@contextlib.contextmanager
def mask_restored() -> Iterator[None]:
    """Which signals are held is behind this what it was before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hold_stops() -> None:
    """The kernel keeps the signals that stop a worker until they may come again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
