"""The adapter of gunicorn's sync worker."""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread
from typing import TYPE_CHECKING

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn._compat.sync import RawSyncWorker, SyncWorker
from hotrestart_plugins.gunicorn.adapters.base import State, WorkerAdapter
from hotrestart_plugins.gunicorn.adapters.close_hook import (
    CloseHook,
    accept_nothing,
    resume_accepting,
    stop_accepting,
)
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent


class SyncAdapter(WorkerAdapter):
    """Controls a sync worker, which has one connection, with one request, at a time."""

    def __init__(self, worker: RawSyncWorker, agent: WorkerAgent) -> None:
        super().__init__(agent)
        self._worker = SyncWorker(worker)
        self._close_hook = CloseHook(self._worker)
        self._master = _Master(agent.lifeline)
        self._worker.wait_for(self._worker.listeners, self._master)
        self._telling = allocate_lock()

    def ready(self) -> None:
        """Do nothing: the worker needs no more."""

    def pause(self) -> None:
        """Stop accepting. The signal wakes the worker's select(2), which then finds this."""
        stop_accepting(self._worker.listeners)
        self._worker.wait_for([], self._master)
        self._close_hook.begin()
        self._enter(State.PAUSED)
        self._agent.done(WorkerEvent.PAUSED)

    def resume(self) -> None:
        """Accept again."""
        resume_accepting(self._worker.listeners)
        self._worker.wait_for(self._worker.listeners, self._master)
        self._close_hook.end()
        self._enter(State.ACCEPTING)
        self._agent.done(WorkerEvent.RESUMED)

    def _enter(self, state: State) -> None:
        # The app is told by a thread: the signal may have interrupted it while it holds one of the
        # locks that guard `drain` and the module `threading`.
        self._state = state
        start_new_thread(self._set_drain, ())

    def _set_drain(self) -> None:
        with self._telling:
            (drain.set if self._state is State.PAUSED else drain.clear)()

    def stats(self) -> DrainStats:
        """What it answered. A worker that ends by itself has no connection left."""
        return DrainStats(requests=self._close_hook.answers, finished=self._close_hook.answers)


class _Master:
    """Ends the wait of a worker whose master was killed, which else lasts half a minute.

    gunicorn takes it for a listener, and then looks for its master.
    """

    accept = staticmethod(accept_nothing)

    def __init__(self, lifeline: int) -> None:
        self._lifeline = lifeline

    def fileno(self) -> int:
        """A descriptor that is ready once the master has ended; it stays the agent's."""
        return self._lifeline
