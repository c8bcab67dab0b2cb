"""What workers with blocking sockets have in common: ``Connection: close``, and ``accept()``.

The sync and gthread workers call ``accept()`` on gunicorn's socket objects, which are plain Python
objects: one that raises EAGAIN in place of the real one stops them between two instructions,
wherever they are.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, NoReturn

from gunicorn import http
from gunicorn.glogging import Logger
from gunicorn.http import wsgi


def accept_nothing() -> NoReturn:
    """In the place of ``accept()``: raise BlockingIOError, as if nobody had connected."""
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


class CloseHook:
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


def ask_app(worker: Any, request: bytes) -> int:
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


def stop_accepting(listeners: list[Any]) -> None:
    """Have ``accept()`` find nothing from now on."""
    for one in listeners:
        one.accept = accept_nothing


def resume_accepting(listeners: list[Any]) -> None:
    """Have ``accept()`` work again."""
    for one in listeners:
        vars(one).pop("accept", None)


def uses_proxy_protocol(cfg: Any) -> bool:
    """Whether a connection begins with a PROXY line, which only its first process reads."""
    return getattr(cfg, "proxy_protocol", False) not in (False, "off")
