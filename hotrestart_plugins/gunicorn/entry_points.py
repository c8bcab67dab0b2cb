"""What gunicorn's hooks call, and whether this process takes part in hot restarts at all.

gunicorn calls, in this order: `configured` (also on HUP, TTIN, TTOU), `starting`, for each worker
`forking` and in it `forked`, `initialised` and `worker_exiting`, at the end `exiting`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.errors import ConfigurationError
from hotrestart_plugins.gunicorn import worker_agent
from hotrestart_plugins.gunicorn.master import EX_CONFIG, MasterController, in_gunicorns_words
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings

_controller: MasterController | None = None


def configured(server: Any, settings: Callable[[], Settings], *, first: bool) -> None:
    """The config has been read; before the app is loaded and the pid file is looked at."""
    global _controller  # noqa: PLW0603  # one arbiter a process; workers find theirs after the fork
    # A module is not executed again on HUP unless it has to be imported anew.
    sys.modules.pop("hotrestart_plugins.gunicorn_conf", None)
    if first:
        _controller = _participant(server, settings)
    elif _controller is not None:
        _controller.reconfigured(settings)


def starting(server: Any) -> None:
    """Before gunicorn opens its listeners; exits if this instance cannot have them."""
    if _controller is not None:
        _controller.start(server)


def forking() -> None:
    """Last before the master forks a worker, which would lose a signal that comes at once."""
    if _controller is not None:
        worker_agent.hold_stops()


def forked(worker: Any) -> None:
    """In a new worker, first of all."""
    if _controller is not None:
        _controller.forked(worker)


def initialised() -> None:
    """In a worker that has loaded the app and is about to enter its loop."""
    if _controller is not None and _controller.worker is not None:
        _controller.worker.initialised()


def worker_exiting(worker: Any) -> None:
    """In a worker that ends; gunicorn calls the hook in the master, too, for one that is lost."""
    if _controller is not None and _controller.worker is not None and worker.pid == os.getpid():
        _controller.worker.exiting()


def exiting(server: Any, reason: BaseException | None) -> None:
    """The master has stopped its workers and is about to exit, because of `reason`."""
    if _controller is not None and _controller.server is server:
        _controller.end(reason)


def _participant(server: Any, settings: Callable[[], Settings]) -> MasterController | None:
    """The instance, or None where gunicorn is to go on as if we were not there."""
    try:
        chosen = settings()
        if chosen.disable:
            return None
        if "GUNICORN_PID" in os.environ:
            if chosen.manual_usr2:
                server.log.warning(
                    "Started by USR2 from pid %s: this instance takes part in no hot restart "
                    "(hotrestart_manual_usr2)",
                    os.environ["GUNICORN_PID"],
                )
                return None
            _be_on_ones_own(server.log)
        if server.cfg.reuse_port:
            raise ConfigurationError(
                "reuse_port and hot restart do not go together, because a worker's own listener "
                "cannot be handed over: leave one out (hotrestart_disable = True is the other's)"
            )
        if chosen.probe:
            Probe.of(chosen, "")  # a bad one is refused here, not in each worker
        if chosen.directory is None and _no_place(server.cfg):
            server.log.warning(
                "Port 0 names no place to meet: this instance cannot be replaced "
                "(set hotrestart_dir)"
            )
            return None
    except ConfigurationError as error:
        server.log.error("%s", in_gunicorns_words(str(error)))  # noqa: TRY400  # one line: the user's to mend
        sys.exit(EX_CONFIG)
    return MasterController(server, chosen)


def _be_on_ones_own(log: Any) -> None:
    """After USR2: be an instance like any other, which asks for its listeners.

    What gunicorn has passed on in its own way is closed.
    """
    log.info("Started by USR2 from pid %s", os.environ.pop("GUNICORN_PID"))
    for number in os.environ.pop("GUNICORN_FD", "").split(","):
        with contextlib.suppress(OSError, ValueError):
            passed_on = socket.socket(fileno=int(number))
            if addresses.is_listening(passed_on):
                passed_on.close()
            else:
                passed_on.detach()


def _no_place(cfg: Any) -> bool:
    return any(isinstance(bind, tuple) and not bind[1] for bind in cfg.address)
