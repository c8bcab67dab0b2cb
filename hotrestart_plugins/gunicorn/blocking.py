"""The gates of gunicorn's sync and gthread workers, and `Connection: close` for all but uvicorn's.

Both workers call ``accept()`` on gunicorn's socket objects, which are plain Python objects: one
that raises EAGAIN in place of the real one stops them between two instructions, wherever they are.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

from gunicorn.glogging import Logger

from hotrestart_plugins.app import drain
from hotrestart_plugins.gunicorn.channel import Report

_NO_CONNECTIONS = -1  # less than any number of connections that a gthread worker can have


class SyncGate:
    """The sync worker: one request, one connection, at a time."""

    def __init__(self, worker: Any, done: Callable[[Report], None]) -> None:
        self._worker = worker
        self._done = done

    def ready(self) -> None:
        """Nothing to do."""

    def pause(self) -> None:
        """The signal has woken select() through the worker's pipe, and leads it to these."""
        _refuse(self._worker.sockets)
        self._worker.wait_fds = [self._worker.PIPE[0]]
        self._done(Report.PAUSED)

    def resume(self) -> None:
        """The same the other way round."""
        _accept(self._worker.sockets)
        self._worker.wait_fds = [*self._worker.sockets, self._worker.PIPE[0]]
        self._done(Report.RESUMED)


class ThreadGate:
    """The gthread worker: its main thread accepts, and the loop there counts connections."""

    def __init__(self, worker: Any, done: Callable[[Report], None]) -> None:
        self._worker = worker
        self._done = done
        self._limit = worker.worker_connections
        self._closing = Closing(worker)

    def ready(self) -> None:
        """Nothing to do."""

    def pause(self) -> None:
        """Have the loop find that it has too many connections, and leave the listeners alone."""
        _refuse(self._worker.sockets)
        self._closing.begin()
        self._set_limit(_NO_CONNECTIONS, drain.set)
        self._done(Report.PAUSED)

    def resume(self) -> None:
        """The same the other way round."""
        _accept(self._worker.sockets)
        self._closing.end()
        self._set_limit(self._limit, drain.clear)
        self._done(Report.RESUMED)

    def _set_limit(self, limit: int, tell: Callable[[], None]) -> None:
        self._worker.worker_connections = limit
        # Wakes the loop, which looks at the limit. The app is told from there, not in the midst
        # of whatever a signal has interrupted.
        self._worker.method_queue.defer(tell)


class Closing:
    """Has gunicorn answer with ``Connection: close`` while that is on, by a `pre_request` hook."""

    def __init__(self, worker: Any) -> None:
        self._cfg = worker.cfg
        self._users = worker.cfg.pre_request
        self._idle = _does_nothing(worker)
        self._on = False

    def attach(self) -> None:
        """Put the hook in, for workers that look it up once for each connection."""
        self._cfg.set("pre_request", self._hook())

    def begin(self) -> None:
        """From now on."""
        self._on = True
        self.attach()

    def end(self, *, detach: bool = True) -> None:
        """No longer; `detach` takes the hook out as well."""
        self._on = False
        if detach:
            self._cfg.set("pre_request", self._users)

    def _hook(self) -> Callable[[Any, Any], None]:
        def pre_request(worker: Any, req: Any) -> None:
            if not self._idle:
                self._users(worker, req)
            if self._on:
                req.must_close = True

        return pre_request


def _does_nothing(worker: Any) -> bool:
    """Whether the hook is gunicorn's default, which logs at debug level, and nobody listens."""
    if worker.cfg.pre_request is not worker.cfg.settings["pre_request"].default:
        return False
    log = worker.log
    error_log = getattr(log, "error_log", None)
    return (
        type(log).debug is Logger.debug
        and error_log is not None
        and not error_log.isEnabledFor(logging.DEBUG)
    )


def _no_accept() -> NoReturn:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _refuse(listeners: list[Any]) -> None:
    for one in listeners:
        one.accept = _no_accept


def _accept(listeners: list[Any]) -> None:
    for one in listeners:
        vars(one).pop("accept", None)
