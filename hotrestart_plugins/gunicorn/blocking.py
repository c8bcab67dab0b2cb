"""The gates of gunicorn's sync and gthread workers, and `Connection: close` for all but uvicorn's.

Both workers call ``accept()`` on gunicorn's socket objects, which are plain Python objects: one
that raises EAGAIN in place of the real one stops them between two instructions, wherever they are.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from gunicorn import http
from gunicorn.glogging import Logger
from gunicorn.http import wsgi

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn.channel import Report

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.workers import WorkerSide


def _no_accept() -> NoReturn:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


class SyncGate:
    """The sync worker: one request, one connection, at a time."""

    def __init__(self, worker: Any, side: WorkerSide) -> None:
        self._worker = worker
        self._side = side
        self._closing = Closing(worker)
        self._master = _Master(side.lifeline)
        worker.wait_fds.append(self._master)
        self._paused = False
        self._telling = allocate_lock()

    def ready(self) -> None:
        """Nothing to do."""

    def pause(self) -> None:
        """The signal has woken select() through the worker's pipe, and leads it to these."""
        refuse(self._worker.sockets)
        self._worker.wait_fds = [self._worker.PIPE[0], self._master]
        self._closing.begin()
        self._tell_app(paused=True)
        self._side.done(Report.PAUSED)

    def resume(self) -> None:
        """The same the other way round."""
        accept(self._worker.sockets)
        self._worker.wait_fds = [*self._worker.sockets, self._worker.PIPE[0], self._master]
        self._closing.end()
        self._tell_app(paused=False)
        self._side.done(Report.RESUMED)

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
        return DrainStats(requests=self._closing.answers, finished=self._closing.answers)


class _Master:
    """What ends the wait of a worker whose master was killed; else it goes on for half a minute.

    gunicorn takes it for a listener, and then looks for its master.
    """

    accept = staticmethod(_no_accept)

    def __init__(self, lifeline: int) -> None:
        self._lifeline = lifeline

    def fileno(self) -> int:
        """A descriptor that is ready once the master has ended."""
        return self._lifeline


class Closing:
    """Has gunicorn answer with ``Connection: close`` while that is on, and counts the answers.

    By gunicorn's `pre_request` and `post_request` hooks, around the user's own.
    """

    def __init__(self, worker: Any) -> None:
        self._cfg = worker.cfg
        self._users = worker.cfg.pre_request
        self._users_after = worker.cfg.post_request
        self._idle = _does_nothing(worker)
        self._on = self._close = False
        # Its next() is atomic: requests come in many threads.
        self._begun = self._answered = itertools.count(1)
        self.requests = 0
        """That have come since it was begun."""
        self.answers = 0
        """That were given since, by workers that look the second hook up for each request."""

    def attach(self) -> None:
        """Put the first hook in, for workers that look it up once for each connection."""
        self._cfg.set("pre_request", self._hook())

    def begin(self, *, close: bool = True) -> None:
        """From now on; without `close` answers are only counted, until `announce`."""
        self._on = True
        self._close = close
        self._begun, self._answered = itertools.count(1), itertools.count(1)
        self.requests = self.answers = 0
        self.attach()
        self._cfg.set("post_request", self._after())

    def announce(self) -> None:
        """Have answers say that the connection closes, too."""
        self._close = True

    def end(self, *, detach: bool = True) -> None:
        """No longer; `detach` takes the hook out as well."""
        self._on = False
        self._cfg.set("post_request", self._users_after)
        if detach:
            self._cfg.set("pre_request", self._users)

    def _hook(self) -> Callable[[Any, Any], None]:
        def pre_request(worker: Any, req: Any) -> None:
            if not self._idle:
                self._users(worker, req)
            if self._on:
                self.requests = next(self._begun)
                if self._close:
                    req.must_close = True

        return pre_request

    def _after(self) -> Callable[[Any, Any, Any, Any], None]:
        def post_request(worker: Any, req: Any, environ: Any, resp: Any) -> None:
            self.answers = next(self._answered)
            self._users_after(worker, req, environ, resp)

        return post_request


def answer(worker: Any, request: bytes) -> int:
    """The status with which the worker's WSGI app answers; what it says goes nowhere."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(request)
        client, server = ("127.0.0.1", 0), worker.sockets[0].getsockname()
        parsed = next(http.get_parser(worker.cfg, theirs, client))
        response, environ = wsgi.create(parsed, theirs, client, server, worker.cfg)
        body = worker.wsgi(environ, response.start_response)
        try:
            for _ in body:
                pass
        finally:
            if hasattr(body, "close"):
                body.close()
        return int(response.status_code or 0)


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


def refuse(listeners: list[Any]) -> None:
    """Have ``accept()`` find nothing from now on."""
    for one in listeners:
        one.accept = _no_accept


def accept(listeners: list[Any]) -> None:
    """Have ``accept()`` work again."""
    for one in listeners:
        vars(one).pop("accept", None)


def proxied(cfg: Any) -> bool:
    """Whether a connection begins with a PROXY line, which only its first process reads."""
    return getattr(cfg, "proxy_protocol", False) not in (False, "off")
