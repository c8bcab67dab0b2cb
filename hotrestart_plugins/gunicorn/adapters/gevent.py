"""The adapter of gunicorn's gevent workers: those with gevent's stream server, and with its pywsgi.

gevent accepts in its hub: one callback takes what has come, and leaves a greenlet for each
connection. What is asked of the servers in a callback of its own finds no accept half done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gevent
from gevent.baseserver import BaseServer
from gevent.server import StreamServer

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn.adapters.base import replace_where_defined
from hotrestart_plugins.gunicorn.adapters.close_hook import CloseHook
from hotrestart_plugins.gunicorn.adapters.exit_when_orphaned import exit_when_orphaned
from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

_READABLE = 1  # gevent's name for it is in the module of whichever event library is in use
_ANY = 4096  # bytes that signals have left


class GeventAdapter:
    """Has the worker make servers that can be paused, and pauses them."""

    def __init__(self, worker: Any, agent: WorkerAgent) -> None:
        """After gevent has patched the process, before the worker makes its servers."""
        self._worker = worker
        self._agent = agent
        self._close_hook = CloseHook(worker)
        self._servers: list[Any] = []
        self._open = 0
        self._loop = gevent.get_hub().loop
        # libev sleeps on when a signal comes just before it begins to. Python writes each signal
        # into gunicorn's pipe, which nobody has read here.
        signal_pipe = worker.PIPE[0]
        self._signal_watcher = self._loop.io(signal_pipe, _READABLE)
        self._signal_watcher.start(os.read, signal_pipe, _ANY)
        worker.sockets = [_Named(one) for one in worker.sockets]
        given = worker.server_class
        if given is None:
            replace_where_defined(
                type(worker), "StreamServer", StreamServer, self._server_class(StreamServer)
            )
        elif issubclass(given, BaseServer):
            worker.server_class = self._server_class(given)

    def _server_class(self, base: Any) -> Any:
        adapter = self

        class WorkerServer(base):  # type: ignore[misc]
            """A server of this worker."""

            paused = False

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                adapter._servers.append(self)

            def start_accepting(self) -> None:
                """As gevent's, which calls it whenever a connection has ended, too."""
                if not self.paused:
                    super().start_accepting()

            def answer_with_close(self) -> None:
                """For pywsgi, which knows neither `pre_request` nor that the worker ends."""
                if hasattr(self, "application"):
                    self.application = _with_close(adapter._worker.wsgi)

            def close(self) -> None:
                """As gevent's; but a TLS handshake under way still leads to a connection."""
                handle = vars(self).get("handle")
                super().close()
                self.answer_with_close()
                gevent.spawn(drain.set)  # may wait for a lock, which the hub must not
                if handle is not None:
                    self.handle = handle

        return WorkerServer

    def ready(self) -> None:
        """The servers are there, unless a class derived from gunicorn's makes others."""
        if self._servers:
            exit_when_orphaned(self._worker, self._stop)
        else:
            self._worker.log.warning(
                "Workers of the class %s make servers of their own: at a takeover they are "
                "stopped at once, and cannot serve again if the new instance dies",
                self._worker.cfg.worker_class_str,
            )

    def _stop(self) -> None:
        self._worker.alive = False

    def pause(self) -> None:
        """From a signal handler, in whichever greenlet runs: what follows is the hub's."""
        self._loop.run_callback_threadsafe(self._pause)

    def resume(self) -> None:
        """The same."""
        self._loop.run_callback_threadsafe(self._resume)

    def _pause(self) -> None:
        if not self._servers:
            self._stop()
            return
        self._close_hook.begin()
        self._open = self._connections()
        for server in self._servers:
            server.paused = True
            server.stop_accepting()
            server.answer_with_close()
        self._agent.done(WorkerEvent.PAUSED)
        gevent.spawn(drain.set)

    def _resume(self) -> None:
        if not self._servers:
            return
        self._close_hook.end()
        for server in self._servers:
            server.paused = False
            if server.started:
                server.start_accepting()
            if hasattr(server, "application"):
                server.application = self._worker.wsgi
        self._agent.done(WorkerEvent.RESUMED)
        gevent.spawn(drain.clear)

    def _connections(self) -> int:
        return sum(len(server.pool) for server in self._servers if server.pool is not None)

    def stats(self) -> DrainStats:
        """By the number of connections, and of answers, which pywsgi's are not told of."""
        left = self._connections()
        stats = DrainStats.by_numbers(self._open, left, self._close_hook.answers)
        if not self._worker.alive:
            stats.aborted_requests = left
        return stats


class _Named:
    """A listener that still knows its name when it is closed.

    gunicorn asks each new connection's listener for it, when TLS is on after the handshake, and
    would drop those connections whose turn comes when it has closed the listener to stop.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock  # so named that gevent finds its own socket within
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
