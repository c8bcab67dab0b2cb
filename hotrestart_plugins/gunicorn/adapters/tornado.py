"""The adapter of gunicorn's tornado worker."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

from hotrestart_plugins.app import drain
from hotrestart_plugins.core import events
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn._compat.table import Feature
from hotrestart_plugins.gunicorn._compat.tornado import (
    RawTornadoWorker,
    TornadoServer,
    TornadoWorker,
)
from hotrestart_plugins.gunicorn.adapters.base import (
    DrainCounter,
    LastRequests,
    State,
    WorkerAdapter,
)
from hotrestart_plugins.gunicorn.adapters.exit_when_orphaned import exit_when_orphaned
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent

_POLL_INTERVAL = 0.05  # seconds between two looks at what is still open
_ANY = 4096  # bytes that signals have left


class TornadoAdapter(WorkerAdapter):
    """Takes the listeners out of tornado's loop, and puts them back."""

    def __init__(self, worker: RawTornadoWorker, agent: WorkerAgent) -> None:
        """After the worker has set its signals, before it makes its server."""
        super().__init__(agent)
        self._worker = TornadoWorker(worker)
        self._server: TornadoServer | None = None
        self._counter = DrainCounter()

    def ready(self) -> None:
        """Find the server. Warn if a class derived from gunicorn's made one of another kind."""
        worker = self._worker
        self._server = server = worker.server
        if server is None:
            self._agent.journal.emit(events.OWN_SERVERS, worker_class=worker.cfg.worker_class_str)
            return
        signal.signal(signal.SIGTERM, lambda number, frame: self._terminate(server, number, frame))
        signal.siginterrupt(signal.SIGTERM, False)
        if not self._agent.lacks(Feature.LOSE_MASTER):
            exit_when_orphaned(worker, self._agent, lambda: self._leave(server))
        # The loop sleeps on when a signal comes just before it begins to. Python writes each
        # signal into gunicorn's pipe, which nobody has read here.
        worker.loop.add_handler(worker.signal_pipe, _empty, worker.loop.READ)

    def pause(self) -> None:
        """Stop accepting, in the loop. Called by a signal handler."""
        self._worker.loop.add_callback_from_signal(self._pause)

    def resume(self) -> None:
        """Accept again, in the loop. Called by a signal handler."""
        self._worker.loop.add_callback_from_signal(self._resume)

    def _pause(self) -> None:
        if self._server is None:
            self._worker.alive = False
            return
        if self._state is State.ACCEPTING:
            self._stop_accepting(self._server)
            self._state = State.PAUSED
        self._agent.done(WorkerEvent.PAUSED)

    def _resume(self) -> None:
        if self._server is None:
            return
        if self._state is State.PAUSED:
            self._state = State.ACCEPTING
            if not self._agent.lacks(Feature.CLOSE):
                self._server.keep_alive()
            self._server.add_listeners(self._worker.listeners)
            drain.clear()
        self._agent.done(WorkerEvent.RESUMED)

    def _stop_accepting(self, server: TornadoServer) -> None:
        self._counter.begin(server.open_connections)
        server.remove_listeners()
        if not self._agent.lacks(Feature.CLOSE):
            server.announce_close()
        drain.set()

    def stats(self) -> DrainStats:
        """By the number of connections: tornado counts no answers."""
        left = self._server.open_connections if self._server is not None else 0
        return self._counter.stats(left, self._counter.ended(left), ends=not self._worker.alive)

    # -- the end -------------------------------------------------------------------------------

    def _terminate(self, server: TornadoServer, _number: int, _frame: FrameType | None) -> None:
        self._worker.loop.add_callback_from_signal(self._leave, server)

    def _leave(self, server: TornadoServer) -> None:
        """Stop accepting first, and end when nothing is open: gunicorn's own end cuts it off."""
        if self._state is State.LEAVING:
            return
        if self._state is State.ACCEPTING:
            self._stop_accepting(server)
        self._state = State.LEAVING
        for listener in self._worker.listeners:
            listener.close()
        self._end_after(
            LastRequests(lambda: server.open_connections, self._worker.cfg.graceful_timeout)
        )

    def _end_after(self, last_requests: LastRequests) -> None:
        if last_requests.over:
            self._worker.alive = False
        else:
            self._worker.loop.call_later(_POLL_INTERVAL, self._end_after, last_requests)


def _empty(signal_pipe: int, _events: int) -> None:
    os.read(signal_pipe, _ANY)
