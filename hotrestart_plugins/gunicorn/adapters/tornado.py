"""The adapter of gunicorn's tornado worker."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn.adapters.exit_when_orphaned import exit_when_orphaned
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent

_POLL_INTERVAL = 0.05  # seconds between two looks at what is still open
_ANY = 4096  # bytes that signals have left


class TornadoAdapter:
    """Takes the listeners out of tornado's loop, and puts them back."""

    def __init__(self, worker: Any, agent: WorkerAgent) -> None:
        """After the worker has set its signals, before it makes its server."""
        self._worker = worker
        self._agent = agent
        self._server: Any = None
        self._paused = False
        self._leaving = False
        self._keeps_alive = True
        self._open = 0

    def ready(self) -> None:
        """The server is there, unless a class derived from gunicorn's makes another."""
        worker = self._worker
        server: Any = getattr(worker, "server", None)
        if hasattr(server, "conn_params") and hasattr(server, "_connections"):
            self._server = server
            self._keeps_alive = not server.conn_params.no_keep_alive
            signal.signal(signal.SIGTERM, self._terminate)
            signal.siginterrupt(signal.SIGTERM, False)
            exit_when_orphaned(worker, self._leave)
            # The loop sleeps on when a signal comes just before it begins to. Python writes each
            # signal into gunicorn's pipe, which nobody has read here.
            worker.ioloop.add_handler(
                worker.PIPE[0], lambda fd, _: os.read(fd, _ANY), worker.ioloop.READ
            )
        else:
            worker.log.warning(
                "Workers of the class %s make a server of their own: at a takeover they are "
                "stopped at once, and cannot serve again if the new instance dies",
                worker.cfg.worker_class_str,
            )

    def pause(self) -> None:
        """From a signal handler: what follows is the loop's."""
        self._worker.ioloop.add_callback_from_signal(self._pause)

    def resume(self) -> None:
        """The same."""
        self._worker.ioloop.add_callback_from_signal(self._resume)

    def _pause(self) -> None:
        if self._server is None:
            self._worker.alive = False
            return
        self._stop_accepting()
        self._agent.done(WorkerEvent.PAUSED)

    def _resume(self) -> None:
        if self._server is None or self._leaving:
            return
        self._paused = False
        self._server.conn_params.no_keep_alive = not self._keeps_alive
        self._server.add_sockets(self._worker.sockets)
        drain.clear()
        self._agent.done(WorkerEvent.RESUMED)

    def _stop_accepting(self) -> None:
        """As HTTPServer.stop(), which closes the listeners besides."""
        if self._paused:
            return
        self._paused = True
        server = self._server
        self._open = len(server._connections)  # noqa: SLF001
        for remove in server._handlers.values():  # noqa: SLF001
            remove()
        server._handlers.clear()  # noqa: SLF001
        server._sockets.clear()  # noqa: SLF001
        server.conn_params.no_keep_alive = True  # all connections look at this one
        drain.set()

    def stats(self) -> DrainStats:
        """By the number of connections: tornado counts no answers."""
        left = len(self._server._connections) if self._server is not None else 0  # noqa: SLF001
        ended = max(0, self._open - left)
        stats = DrainStats.by_numbers(self._open, left, ended)
        if not self._worker.alive:
            stats.aborted_requests = left
        return stats

    # -- SIGTERM -------------------------------------------------------------------------------

    def _terminate(self, _number: int, _frame: FrameType | None) -> None:
        self._worker.ioloop.add_callback_from_signal(self._leave)

    def _leave(self) -> None:
        """Stop accepting first, and end only when nothing is open: gunicorn's own end cuts it off.

        Connections without a request may stay until half of the time is over.
        """
        if self._leaving:
            return
        self._leaving = True
        self._stop_accepting()
        for one in self._worker.sockets:
            one.close()
        loop = self._worker.ioloop
        self._end_when_idle(loop.time() + self._worker.cfg.graceful_timeout / 2)

    def _end_when_idle(self, latest: float) -> None:
        loop = self._worker.ioloop
        if self._server._connections and loop.time() < latest:  # noqa: SLF001
            loop.call_later(_POLL_INTERVAL, self._end_when_idle, latest)
        else:
            self._worker.alive = False
