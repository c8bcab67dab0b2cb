"""The master's workers: which are ready, what they were told, and what they have reported."""

from __future__ import annotations

import contextlib
import os
import signal

from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn._compat import arbiter
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter
from hotrestart_plugins.gunicorn._compat.table import Feature, lacks
from hotrestart_plugins.gunicorn.adapters.base import worker_kind
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent, WorkerPipe


class WorkerPool:
    """The workers of one master. Owns nothing that it is given."""

    def __init__(self, server: Arbiter, pipe: WorkerPipe, journal: Journal) -> None:
        self._server = server
        self._pipe = pipe
        self._journal = journal
        self._told: set[int] = set()  # of the command that holds now
        self._awaited: set[int] = set()  # have not reported yet that they have followed it
        self._pending = False  # whether `followed` is still to say so
        self._wanted_before = 0
        self._unheard: set[int] = set()
        self.ready: set[int] = set()
        """The pids of those that can serve."""
        self.stats = DrainStats()
        """What became of the connections that were open when the workers were last paused."""

    @property
    def can_pause(self) -> bool:
        """Whether the workers can stop accepting without ending, and report it."""
        return bool(worker_kind(arbiter.worker_class(self._server))) and not lacks(Feature.ROLLBACK)

    @property
    def number(self) -> int:
        """How many there are to be."""
        return arbiter.wanted_workers(self._server)

    @property
    def all_ready(self) -> bool:
        """Whether there are as many as there are to be, and each can serve."""
        return len(self.ready) >= self.number and self.ready >= arbiter.workers(self._server)

    def update(self) -> None:
        """Read what the workers have reported; forget those that have ended."""
        followed = WorkerEvent.PAUSED if self._pipe.paused else WorkerEvent.RESUMED
        for report in self._pipe.reports():
            self.stats += report.stats
            if report.what is WorkerEvent.READY:
                self.ready.add(report.pid)
            elif report.what is WorkerEvent.ENDS:
                self._unheard.discard(report.pid)
            elif report.what is followed:
                self._awaited.discard(report.pid)

    def forget_ended(self) -> None:
        """Forget the workers that gunicorn has reaped."""
        alive = arbiter.workers(self._server)
        self.ready &= alive
        if not self._pipe.paused and self._awaited - alive:
            self.limit()  # they were leaving when they were told to accept again
        self._awaited &= alive

    def followed(self) -> bool:
        """Whether every worker has done what the last command says; True once for a command."""
        if not self._pending or self._awaited:
            return False
        self._pending = False
        return True

    # -- commands ------------------------------------------------------------------------------

    def pause(self, takeover_id: int) -> None:
        """Have them stop accepting. `takeover_id`: who receives their connections; 0: nobody."""
        self._wanted_before = self.number
        self.stats = DrainStats()
        self._command(paused=True, takeover_id=takeover_id)

    def resume(self) -> None:
        """Have those that are left accept again."""
        self._command(paused=False)
        self.limit()

    def _command(self, *, paused: bool, takeover_id: int = 0) -> None:
        self._pipe.set_command(paused=paused, takeover_id=takeover_id)
        self._told = set()
        self._awaited = set(self.ready)
        self._pending = paused or bool(self._awaited)
        self._tell(self.ready)

    def start_no_more(self) -> None:
        """Start no worker in place of one that ends: the code on disk is that of the new instance.

        Those that were still starting when the others were told to pause are told now.
        """
        arbiter.set_wanted_workers(self._server, len(arbiter.workers(self._server)))
        self._tell(self.ready - self._told)

    def _tell(self, pids: set[int]) -> None:
        """Have workers look at the command. Only those that are ready survive the signal."""
        if not self.can_pause:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        self._told |= pids

    def limit(self) -> None:
        """Want only the workers that are left: a new one would run the code that has failed."""
        left = len(arbiter.workers(self._server))
        if 0 < left < self._wanted_before:
            self._journal.emit(
                events.FEWER_WORKERS,
                left=left,
                wanted=self._wanted_before,
                remedy="Send SIGHUP when it is good again",
            )
        if self._wanted_before:
            arbiter.set_wanted_workers(self._server, left or self._wanted_before)

    # -- the end -------------------------------------------------------------------------------

    def expect_ends(self) -> None:
        """They are told to end: each says so, unless it is killed."""
        self._unheard = arbiter.workers(self._server) if self.can_pause else set()

    @property
    def killed(self) -> bool:
        """Whether some have ended without a word."""
        return bool(self._unheard)

    def count_killed(self) -> None:
        """Count one request for each that was killed: it was at work on one at least."""
        self.stats.aborted_requests += len(self._unheard)
        self._unheard = set()
