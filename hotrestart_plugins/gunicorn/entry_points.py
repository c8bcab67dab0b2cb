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

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.errors import ConfigurationError
from hotrestart_plugins.gunicorn import worker_agent
from hotrestart_plugins.gunicorn._compat import arbiter, table
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter, Config, Worker
from hotrestart_plugins.gunicorn.adapters.base import say_what_is_missing
from hotrestart_plugins.gunicorn.failures import EX_CONFIG, in_config_words
from hotrestart_plugins.gunicorn.master import MasterController
from hotrestart_plugins.gunicorn.startup import Startup
from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.settings import Settings

_this_process: Startup | MasterController | WorkerAgent | None = None
"""What this process is: a master that starts, one that has listeners, a worker of that one.

None: it takes no part in hot restarts.
"""


def configured(server: Arbiter, settings: Callable[[], Settings], *, first: bool) -> None:
    """The config was read; before the app is loaded and the pid file is looked at."""
    global _this_process  # noqa: PLW0603  # there is one arbiter in a process
    # A module is not executed again on HUP unless it has to be imported anew.
    sys.modules.pop("hotrestart_plugins.gunicorn_conf", None)
    if first:
        _this_process = _startup(server, settings)
    elif isinstance(_this_process, MasterController):
        _this_process.reconfigured(settings)


def starting() -> None:
    """Before gunicorn opens its listeners; exits if this instance cannot have them."""
    global _this_process  # noqa: PLW0603
    if isinstance(_this_process, Startup):
        _this_process = _this_process.start()


def forking() -> None:
    """Last before the master forks a worker, which would lose a signal that comes at once."""
    if isinstance(_this_process, MasterController) and not table.lacks(
        table.Feature.STOP_WHILE_STARTING
    ):
        worker_agent.hold_stops()


def forked(worker: Worker) -> None:
    """In a new worker, first of all."""
    global _this_process  # noqa: PLW0603
    if isinstance(_this_process, MasterController):
        _this_process = _this_process.forked(worker)


def initialised() -> None:
    """In a worker that has loaded the app and is about to enter its loop."""
    if isinstance(_this_process, WorkerAgent):
        _this_process.initialised()


def worker_exiting(worker: Worker) -> None:
    """In a worker that ends; gunicorn calls the hook in the master, too, for one that is lost."""
    if isinstance(_this_process, WorkerAgent) and worker.pid == os.getpid():
        _this_process.exiting()


def exiting(server: Arbiter, reason: BaseException | None) -> None:
    """The master has stopped its workers and is about to exit, because of `reason`."""
    if isinstance(_this_process, MasterController) and _this_process.server is server:
        _this_process.end(reason)


def _startup(server: Arbiter, settings: Callable[[], Settings]) -> Startup | None:
    """A master that takes part, or None if gunicorn is to go on as if we were not there."""
    journal = Journal(server.log)
    try:
        chosen = settings()
        if chosen.disable or not _supported(server, chosen, journal):
            return None
        if "GUNICORN_PID" in os.environ:
            if chosen.manual_usr2:
                journal.emit(events.STARTED_BY_USR2_ALONE, pid=os.environ["GUNICORN_PID"])
                return None
            _forget_other_master(journal)
        if server.cfg.reuse_port:
            raise ConfigurationError(
                "reuse_port and hot restart do not go together, because a worker's own listener "
                "cannot be handed over: leave one out (hotrestart_disable = True is the other's)"
            )
        if chosen.probe:
            Probe.of(chosen, "")  # a bad one is refused here, not in each worker
        if chosen.directory is None and _any_port(server.cfg):
            journal.emit(events.NO_DIRECTORY, option="set hotrestart_dir")
            return None
    except ConfigurationError as error:
        journal.emit(events.CONFIGURATION_REFUSED, error=in_config_words(error))
        sys.exit(EX_CONFIG)
    return Startup(server, chosen, journal)


def _supported(server: Arbiter, chosen: Settings, journal: Journal) -> bool:
    """Say what the installed gunicorn lacks; whether hot restart works without it."""
    lacking = table.check(arbiter.NAMES)
    table.say(lacking, journal)
    ready = say_what_is_missing(arbiter.worker_class(server), journal, has_probe=bool(chosen.probe))
    return ready and table.Feature.HOT_RESTART not in lacking


def _forget_other_master(journal: Journal) -> None:
    """After USR2: be an instance like any other, which asks for its listeners.

    The descriptors that gunicorn has passed on in its own way are closed.
    """
    journal.emit(events.STARTED_BY_USR2, pid=os.environ.pop("GUNICORN_PID"))
    for number in os.environ.pop("GUNICORN_FD", "").split(","):
        with contextlib.suppress(OSError, ValueError):
            passed_on = socket.socket(fileno=int(number))
            if addresses.is_listening(passed_on):
                passed_on.close()
            else:
                passed_on.detach()


def _any_port(cfg: Config) -> bool:
    """Whether an address leaves the port to the kernel."""
    return any(isinstance(bind, tuple) and not bind[1] for bind in cfg.address)
