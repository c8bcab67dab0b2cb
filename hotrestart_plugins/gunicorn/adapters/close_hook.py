"""What several worker classes have in common: ``Connection: close``, and ``accept()``.

The sync and gthread workers call ``accept()`` on gunicorn's socket objects, which are plain Python
objects: one that raises EAGAIN in place of the real one stops them between two instructions,
wherever they are.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

from gunicorn.glogging import Logger

from hotrestart_plugins.gunicorn._compat.interfaces import Config
from hotrestart_plugins.gunicorn._compat.workers import Request, Worker, close_after_response


def accept_nothing() -> NoReturn:
    """Replace ``accept()``: raise BlockingIOError, as if nobody had connected."""
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


class CloseHook:
    """Has gunicorn answer with ``Connection: close`` while that is on, and counts the answers.

    It replaces gunicorn's `pre_request` and `post_request` hooks, and calls the user's own.
    """

    def __init__(self, worker: Worker[Any]) -> None:
        self._cfg = worker.cfg
        self._users_pre_request = worker.cfg.pre_request
        self._users_post_request = worker.cfg.post_request
        self._has_users_hook = not _does_nothing(worker)
        self._on = self._close = False
        # Its next() is atomic: requests come in many threads.
        self._begun = self._answered = itertools.count(1)
        self.requests = 0
        """Requests since it began."""
        self.answers = 0
        """Answers since it began, of workers that look `post_request` up for each request."""

    def attach(self) -> None:
        """Set `pre_request`, for workers that look it up once for each connection."""
        self._cfg.set("pre_request", self._pre_request())

    def begin(self, *, close: bool = True) -> None:
        """Begin to count; without `close` nothing else happens until `announce`."""
        self._on = True
        self._close = close
        self._begun, self._answered = itertools.count(1), itertools.count(1)
        self.requests = self.answers = 0
        self.attach()
        self._cfg.set("post_request", self._post_request())

    def announce(self) -> None:
        """Have each answer say that the connection closes."""
        self._close = True

    def end(self, *, detach: bool = True) -> None:
        """Stop; `detach` sets the user's `pre_request` again."""
        self._on = False
        self._cfg.set("post_request", self._users_post_request)
        if detach:
            self._cfg.set("pre_request", self._users_pre_request)

    def _pre_request(self) -> Callable[[Any, Any], None]:
        # gunicorn counts the arguments of a hook, so that it cannot be a method.
        def pre_request(worker: object, request: Request) -> None:
            if self._has_users_hook:
                self._users_pre_request(worker, request)
            if self._on:
                self.requests = next(self._begun)
                if self._close:
                    close_after_response(request)

        return pre_request

    def _post_request(self) -> Callable[[Any, Any, Any, Any], None]:
        def post_request(worker: object, request: object, environ: object, resp: object) -> None:
            self.answers = next(self._answered)
            self._users_post_request(worker, request, environ, resp)

        return post_request


def _does_nothing(worker: Worker[Any]) -> bool:
    """Whether the hook is gunicorn's default, which logs at debug level, and nobody listens."""
    if worker.cfg.pre_request is not worker.cfg.settings["pre_request"].default:
        return False
    log = worker.log
    return (
        isinstance(log, Logger)
        and type(log).debug is Logger.debug
        and not log.error_log.isEnabledFor(logging.DEBUG)
    )


def stop_accepting(listeners: list[Any]) -> None:
    """Have ``accept()`` find nothing from now on."""
    for listener in listeners:
        listener.accept = accept_nothing


def resume_accepting(listeners: list[Any]) -> None:
    """Have ``accept()`` work again."""
    for listener in listeners:
        vars(listener).pop("accept", None)


def may_hand_over(cfg: Config) -> bool:
    """Whether connections can go to another process: no TLS, and no PROXY line.

    Only the process that accepted a connection has read its PROXY line.
    """
    return not cfg.is_ssl and cfg.proxy_protocol in (False, "off")
