"""A worker's side: it says when it is ready, stops accepting when told, and accepts again.

A worker that is ready looks at the channel's byte whenever SIGUSR2 comes, which gunicorn's workers
do not use. How to stop accepting is each worker class's own affair: a `Gate` for each.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from hotrestart_plugins.gunicorn.channel import Channel, Report
from hotrestart_plugins.gunicorn.wakeup import forget_in_worker
from hotrestart_plugins.settings import Settings

_KINDS = {
    "gunicorn.workers.sync.SyncWorker": "sync",
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gunicorn.workers.gasgi.ASGIWorker": "asgi",
    "uvicorn_worker._workers.UvicornWorker": "uvicorn",
    "uvicorn.workers.UvicornWorker": "uvicorn",
}


def kind_of(worker_class: type) -> str:
    """Which of the known worker classes it is, or is derived from; '' for any other."""
    names = (f"{one.__module__}.{one.__qualname__}" for one in worker_class.__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), "")


class Gate(Protocol):
    """What lets connections into one worker. Calls come in the worker's main thread."""

    def ready(self) -> None:
        """The worker has entered its loop."""

    def pause(self) -> None:
        """Accept nothing from now on; call back when that is so."""

    def resume(self) -> None:
        """Accept again; call back when that is so."""


class WorkerSide:
    """This worker process, as seen from the arbiter."""

    def __init__(self, worker: Any, channel: Channel, settings: Settings) -> None:
        self._worker = worker
        self._channel = channel
        self._settings = settings
        self._gate: Gate | None = None
        self._paused = False
        self._looking = False
        self._graceful = worker.cfg.graceful_timeout

    def forked(self) -> None:
        """First of all in the new process: keep only what is a worker's."""
        self._channel.forked()
        forget_in_worker()
        # The first heartbeat of every worker class comes when it is able to serve.
        self._worker.notify = self._first_notify

    def initialised(self) -> None:
        """The app is loaded; the loop, if there is one, does not run yet."""
        self._gate = _gate(kind_of(type(self._worker)), self._worker, self._done)
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
        """Do what the channel's byte says."""
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
            # For gunicorn's own stop, which may follow: the arbiter keeps the exact time.
            drain = max(1, round(self._settings.drain_timeout))
            self._worker.cfg.set("graceful_timeout", drain)
            gate.pause()
        else:
            self._worker.cfg.set("graceful_timeout", self._graceful)
            gate.resume()

    def _done(self, what: Report) -> None:
        self._channel.report(what)


def _gate(kind: str, worker: Any, done: Callable[[Report], None]) -> Gate | None:
    # Imported where they are needed: a worker of one class has no use for another's libraries.
    if kind == "sync":
        from hotrestart_plugins.gunicorn.blocking import SyncGate  # noqa: PLC0415

        return SyncGate(worker, done)
    if kind == "gthread":
        from hotrestart_plugins.gunicorn.blocking import ThreadGate  # noqa: PLC0415

        return ThreadGate(worker, done)
    if kind == "asgi":
        from hotrestart_plugins.gunicorn.asgi import AsgiGate  # noqa: PLC0415

        return AsgiGate(worker, done)
    if kind == "uvicorn":
        from hotrestart_plugins.gunicorn.uvicorn_worker import UvicornGate  # noqa: PLC0415

        return UvicornGate(worker, done)
    return None
