"""The adapter of gunicorn's sync worker."""

from __future__ import annotations

from _thread import allocate_lock, start_new_thread
from typing import TYPE_CHECKING, Any

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn.adapters.close_hook import (
    CloseHook,
    accept_nothing,
    resume_accepting,
    stop_accepting,
)
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent


class SyncAdapter:
    """The sync worker: one request, one connection, at a time."""

    def __init__(self, worker: Any, agent: WorkerAgent) -> None:
        self._worker = worker
        self._agent = agent
        self._close_hook = CloseHook(worker)
        self._master = _Master(agent.lifeline)
        worker.wait_fds.append(self._master)
        self._paused = False
        self._telling = allocate_lock()

    def ready(self) -> None:
        """Nothing to do."""

    def pause(self) -> None:
        """The signal has woken select() through the worker's pipe, and leads it to these."""
        stop_accepting(self._worker.sockets)
        self._worker.wait_fds = [self._worker.PIPE[0], self._master]
        self._close_hook.begin()
        self._tell_app(paused=True)
        self._agent.done(WorkerEvent.PAUSED)

    def resume(self) -> None:
        """The same the other way round."""
        resume_accepting(self._worker.sockets)
        self._worker.wait_fds = [*self._worker.sockets, self._worker.PIPE[0], self._master]
        self._close_hook.end()
        self._tell_app(paused=False)
        self._agent.done(WorkerEvent.RESUMED)

    def _tell_app(self, *, paused: bool) -> None:
        # From a thread: the signal may have interrupted the app in the midst of what `drain`, or
        # `threading`, guards with its locks.
        self._paused = paused
        start_new_thread(self._set_drain, ())

    def _set_drain(self) -> None:
        with self._telling:
            (drain.set if self._paused else drain.clear)()

    def stats(self) -> DrainStats:
        """Whoever ends is done with its only connection; who is killed says nothing."""
        return DrainStats(requests=self._close_hook.answers, finished=self._close_hook.answers)


class _Master:
    """What ends the wait of a worker whose master was killed; else it goes on for half a minute.

    gunicorn takes it for a listener, and then looks for its master.
    """

    accept = staticmethod(accept_nothing)

    def __init__(self, lifeline: int) -> None:
        self._lifeline = lifeline

    def fileno(self) -> int:
        """A descriptor that is ready once the master has ended."""
        return self._lifeline
