"""A worker's side: it says when it is ready, stops accepting when told, and accepts again.

A worker that is ready looks at the channel's word whenever SIGUSR2 comes, which gunicorn's workers
do not use. How to stop accepting is each worker class's own affair: a `Gate` for each.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn.channel import Channel, Report
from hotrestart_plugins.gunicorn.wakeup import forget_in_worker
from hotrestart_plugins.handover.frames import HandoverTarget, path_of
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings

_KINDS = {
    "gunicorn.workers.sync.SyncWorker": "sync",
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gunicorn.workers.ggevent.GeventWorker": "gevent",
    "gunicorn.workers.gtornado.TornadoWorker": "tornado",
    "gunicorn.workers.gasgi.ASGIWorker": "asgi",
    "uvicorn_worker._workers.UvicornWorker": "uvicorn",
    "uvicorn.workers.UvicornWorker": "uvicorn",
}

_GATES = {
    "sync": ("blocking", "SyncGate"),
    "gthread": ("gthread", "ThreadGate"),
    "gevent": ("gevent", "GeventGate"),
    "tornado": ("tornado", "TornadoGate"),
    "asgi": ("asgi", "AsgiGate"),
    "uvicorn": ("uvicorn_worker", "UvicornGate"),
}
_WITH_A_LOOP = ("asgi", "uvicorn")
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def kind_of(worker_class: type) -> str:
    """Which of the known worker classes it is, or is derived from; '' for any other."""
    names = (f"{one.__module__}.{one.__qualname__}" for one in worker_class.__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), "")


def replace_where_defined(
    worker_class: type, name: str, original: object, replacement: object
) -> None:
    """In the modules that define the worker class, whose methods look the name up there."""
    for one in worker_class.__mro__:
        module = sys.modules.get(one.__module__)
        if getattr(module, name, None) is original:
            setattr(module, name, replacement)


class Gate(Protocol):
    """What lets connections into one worker; made with the worker and its `WorkerSide`.

    Calls come in the worker's main thread.
    """

    def ready(self) -> None:
        """The worker has entered its loop."""

    def pause(self) -> None:
        """Accept nothing from now on; call back when that is so."""

    def resume(self) -> None:
        """Accept again; call back when that is so."""

    def stats(self) -> DrainStats:
        """What has become, since the last pause, of what was open then."""


class WorkerSide:
    """This worker process, as seen from the arbiter."""

    def __init__(
        self,
        worker: Any,
        channel: Channel,
        settings: Settings,
        directory: Path,
        *,
        takes_in: HandoverTarget | None,
    ) -> None:
        """`directory`: the meeting directory. `takes_in`: its instance, if that takes over."""
        self.settings = settings
        self._worker = worker
        self._channel = channel
        self._directory = directory
        # Another user than the master's may not look into the meeting directory.
        self._moves = worker.cfg.uid == os.geteuid() and not settings.no_handover
        self._takes_in = takes_in
        self._gate: Gate | None = None
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
        kind = kind_of(type(self._worker))
        probe = Probe.of(self.settings, "localhost")
        if probe is not None and kind not in _WITH_A_LOOP:
            from hotrestart_plugins.gunicorn.blocking import answer  # noqa: PLC0415

            try:
                probe.run_plain(lambda request: answer(self._worker, request))
            except NotReady as error:
                self.fail(error)
        self._gate = _gate(kind, self._worker, self)
        if self._gate is not None:
            # One handler for all: signal.signal works under every event loop, because each has
            # a wakeup descriptor, and the gates that need the loop's thread go there.
            signal.signal(signal.SIGUSR2, self._look)
            signal.siginterrupt(signal.SIGUSR2, False)

    def _first_notify(self) -> None:
        del self._worker.notify
        self._worker.notify()
        if self._gate is not None:
            self._gate.ready()
        self._channel.report(Report.READY)
        self._look()

    def _look(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Do what the channel's word says."""
        if self._gate is None or self._looking:
            return  # a second signal has come while the first is followed: it looks again
        self._looking = True
        try:
            while self._channel.paused != self._paused:
                self._paused = not self._paused
                self._follow(self._gate)
        finally:
            self._looking = False

    def _follow(self, gate: Gate) -> None:
        if self._paused:
            drain = self.settings.drain_timeout
            self._drain_ends = time.monotonic() + drain
            # For a stop that does not ask for the exact time that is left.
            self._worker.cfg.set("graceful_timeout", max(1, round(drain)))
            gate.pause()
        else:
            self._worker.cfg.set("graceful_timeout", self._graceful)
            gate.resume()

    def fail(self, error: NotReady) -> NoReturn:
        """End before this worker has served, in the way that ends gunicorn's master, too."""
        self._worker.log.error("%s", error)
        sys.exit(error.status)  # gunicorn's WORKER_BOOT_ERROR

    # -- for the gates -------------------------------------------------------------------------

    def done(self, what: Report) -> None:
        """The gate has paused, or resumed."""
        stats = self._gate.stats() if self._gate is not None and what is Report.RESUMED else None
        self._channel.report(what, stats)

    @property
    def lifeline(self) -> int:
        """A descriptor that is ready for reading once the master has ended."""
        return self._channel.lifeline

    @property
    def seconds_left(self) -> int:
        """That a stop may take: of the drain since the pause, or what gunicorn was told."""
        if not self._paused:
            return int(self._worker.cfg.graceful_timeout)
        return max(0, math.floor(self._drain_ends - time.monotonic()))

    @property
    def inlet(self) -> Path | None:
        """Where this worker is to take in the connections of the old instance's; None: nowhere."""
        if self._takes_in is None or not self._moves:
            return None
        return path_of(self._takes_in, os.getpid())

    @property
    def handover_target(self) -> HandoverTarget | None:
        """Whose workers take in this one's connections; None: nobody's."""
        takeover_id = self._channel.takeover_id
        return HandoverTarget(self._directory, takeover_id) if takeover_id and self._moves else None

    def exiting(self) -> None:
        """This worker ends."""
        # Python is about to give the signal its default meaning back, which is to die of it.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if self.inlet is not None:
            self.inlet.unlink(missing_ok=True)
        if self._gate is not None and self._paused:
            self._channel.report(Report.ENDS, self._gate.stats())


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


def _gate(kind: str, worker: Any, side: WorkerSide) -> Gate | None:
    if not kind:
        return None
    # Imported where it is needed: a worker of one class has no use for another's libraries.
    module, name = _GATES[kind]
    gate: Gate = getattr(importlib.import_module(f"{__package__}.{module}"), name)(worker, side)
    return gate
