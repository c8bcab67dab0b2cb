"""A master that starts: from the config to its listeners, or to the line that says why not."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from types import FrameType

from hotrestart_plugins.core import events
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.hot_restart import HotRestart
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.rendezvous import default_directory
from hotrestart_plugins.errors import HotRestartError, NotReady
from hotrestart_plugins.gunicorn._compat import arbiter
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter
from hotrestart_plugins.gunicorn.arbiter_events import ArbiterEvents
from hotrestart_plugins.gunicorn.failures import in_config_words, status_of
from hotrestart_plugins.gunicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.gunicorn.listeners import Listeners
from hotrestart_plugins.gunicorn.master import MasterController, complain
from hotrestart_plugins.gunicorn.singletons import Singletons
from hotrestart_plugins.gunicorn.worker_ipc import WorkerPipe
from hotrestart_plugins.gunicorn.worker_pool import WorkerPool
from hotrestart_plugins.settings import Settings


class Startup:
    """This master, from its first config until it has listeners."""

    def __init__(self, server: Arbiter, settings: Settings, journal: Journal) -> None:
        self._server = server
        self._settings = settings
        self._journal = journal
        self._pid = os.getpid()
        self._began = time.monotonic()
        self._singletons = Singletons(server)
        self._singletons.suppress()
        # gunicorn calls no hook when an app cannot be preloaded.
        atexit.register(self._ended_early)
        if server.cfg.preload_app:
            signal.signal(signal.SIGALRM, self._on_preload_timeout)
            signal.setitimer(signal.ITIMER_REAL, settings.ready_timeout)

    def _ended_early(self) -> None:
        if os.getpid() == self._pid:
            why = "gunicorn ended before it could serve, see above"
            self._journal.emit(events.START_FAILED, reason=why)

    def _on_preload_timeout(self, _number: int, _frame: FrameType | None) -> None:
        self._journal.emit(events.PRELOAD_TIMED_OUT, seconds=self._settings.ready_timeout)
        os._exit(NotReady.status)

    def start(self) -> MasterController:
        """Meet the running instance and get its listeners; exits if that fails."""
        server, settings, journal = self._server, self._settings, self._journal
        signal.setitimer(signal.ITIMER_REAL, 0)  # the app is loaded, if it is preloaded
        spent = time.monotonic() - self._began if server.cfg.preload_app else 0.0
        hot = HotRestart(
            takeover_timeout=settings.takeover_timeout,
            turn_timeout=settings.ready_timeout + settings.takeover_timeout,
            logger=journal.logger,
        )
        # gunicorn would unlink the live path of a Unix socket if it ended now; and it must refuse
        # USR2, which would pass on what may not be ours yet.
        arbiter.keep_paths(server)
        try:
            listeners = Listeners(server, journal)
        except HotRestartError as error:
            atexit.unregister(self._ended_early)
            complain(journal, hot, in_config_words(error))
            sys.exit(status_of(error))
        directory = settings.directory or default_directory(listeners.addresses[0])
        pipe, deadlines, fence = WorkerPipe(), ArbiterEvents(server), Fence(journal)
        driver = LifecycleDriver(
            server,
            settings,
            directory,
            hot=hot,
            listeners=listeners,
            pool=WorkerPool(server, pipe, journal),
            deadlines=deadlines,
            singletons=self._singletons,
            journal=journal,
            fence=fence,
        )
        master = MasterController(
            server,
            directory,
            hot=hot,
            listeners=listeners,
            pipe=pipe,
            deadlines=deadlines,
            singletons=self._singletons,
            driver=driver,
            journal=journal,
            fence=fence,
        )
        atexit.unregister(self._ended_early)
        master.start(max(0.0, settings.ready_timeout - spent))
        return master
