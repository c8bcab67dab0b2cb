"""The adapter of gunicorn's gevent workers: those with gevent's stream server, and with its pywsgi.

gevent accepts in its hub: one callback accepts what has come, and starts a greenlet for each
connection. A callback of its own that stops the servers interrupts no such callback.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gevent

from hotrestart_plugins.app import drain
from hotrestart_plugins.core import events
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn._compat.gevent import GeventWorker, RawGeventWorker
from hotrestart_plugins.gunicorn._compat.table import Feature
from hotrestart_plugins.gunicorn.adapters.base import DrainCounter, State, WorkerAdapter
from hotrestart_plugins.gunicorn.adapters.close_hook import CloseHook
from hotrestart_plugins.gunicorn.adapters.exit_when_orphaned import exit_when_orphaned
from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

_READABLE = 1  # gevent's name for it is in the module of whichever event library is in use
_ANY = 4096  # bytes that signals have left


class GeventAdapter(WorkerAdapter):
    """Has the worker make servers that can be paused, and pauses them."""

    def __init__(self, worker: RawGeventWorker, agent: WorkerAgent) -> None:
        """After gevent has patched the process, before the worker makes its servers."""
        super().__init__(agent)
        self._worker = GeventWorker(worker)
        self._close_hook = CloseHook(self._worker)
        self._counter = DrainCounter()
        self._servers: list[Any] = []
        self._loop = gevent.get_hub().loop
        # libev sleeps on when a signal comes just before it begins to. Python writes each signal
        # into gunicorn's pipe, which nobody has read here.
        signal_pipe = self._worker.signal_pipe
        self._signal_watcher = self._loop.io(signal_pipe, _READABLE)
        self._signal_watcher.start(os.read, signal_pipe, _ANY)
        worker.sockets = [_Named(sock) for sock in worker.sockets]
        server_class = self._worker.server_class
        if server_class is not None:
            self._worker.use_server_class(self._pausing_class(server_class))

    def _pausing_class(self, base: Any) -> Any:
        adapter = self

        class WorkerServer(base):  # type: ignore[misc]
            """A server of this worker."""

            paused = False

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                adapter._servers.append(self)

            def start_accepting(self) -> None:
                """Accept, unless it is paused: gevent calls this after each connection, too."""
                if not self.paused:
                    super().start_accepting()

            def answer_with_close(self) -> None:
                """For pywsgi, which knows neither `pre_request` nor that the worker ends."""
                if hasattr(self, "application"):
                    self.application = _with_close(adapter._worker.app)

            def close(self) -> None:
                """Close; but a TLS handshake in progress still leads to a connection."""
                handle = vars(self).get("handle")
                super().close()
                self.answer_with_close()
                gevent.spawn(drain.set)  # may wait for a lock, which the hub must not
                if handle is not None:
                    self.handle = handle

        return WorkerServer

    def ready(self) -> None:
        """Notice the master's end. Warn if a class derived from gunicorn's made other servers."""
        if not self._servers:
            self._agent.journal.emit(
                events.OWN_SERVERS, worker_class=self._worker.cfg.worker_class_str
            )
        elif not self._agent.lacks(Feature.LOSE_MASTER):
            exit_when_orphaned(self._worker, self._agent, self._stop)

    def _stop(self) -> None:
        self._worker.alive = False

    def pause(self) -> None:
        """Stop accepting, in the hub. Called by a signal handler, in whichever greenlet runs."""
        self._loop.run_callback_threadsafe(self._pause)

    def resume(self) -> None:
        """Accept again, in the hub. Called by a signal handler, in whichever greenlet runs."""
        self._loop.run_callback_threadsafe(self._resume)

    def _pause(self) -> None:
        if not self._servers:
            self._stop()
            return
        self._state = State.PAUSED
        self._close_hook.begin()
        self._counter.begin(self._open_connections())
        for server in self._servers:
            server.paused = True
            server.stop_accepting()
            server.answer_with_close()
        self._agent.done(WorkerEvent.PAUSED)
        gevent.spawn(drain.set)

    def _resume(self) -> None:
        if not self._servers:
            return
        self._state = State.ACCEPTING
        self._close_hook.end()
        for server in self._servers:
            server.paused = False
            if server.started:
                server.start_accepting()
            if hasattr(server, "application"):
                server.application = self._worker.app
        self._agent.done(WorkerEvent.RESUMED)
        gevent.spawn(drain.clear)

    def _open_connections(self) -> int:
        return sum(len(server.pool) for server in self._servers if server.pool is not None)

    def stats(self) -> DrainStats:
        """By the number of connections, and of answers, except those of pywsgi."""
        return self._counter.stats(
            self._open_connections(), self._close_hook.answers, ends=not self._worker.alive
        )


class _Named:
    """A listener that still knows its name when it is closed.

    gunicorn asks each new connection's listener for it, with TLS after the handshake. Without the
    name it would drop the connections that it begins to serve after it has closed the listener.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock  # gevent looks for its own socket under this name
        self._name = sock.getsockname()

    def getsockname(self) -> Any:
        return self._name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _with_close(app: Callable[..., Any]) -> Callable[..., Any]:
    """The WSGI app, answering with ``Connection: close``."""

    def closing(environ: Any, start_response: Callable[..., Any]) -> Any:
        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            if not any(name.lower() == "connection" for name, _ in headers):
                headers = [*headers, ("Connection", "close")]
            return start_response(status, headers, *exc_info)

        return app(environ, start)

    return closing
