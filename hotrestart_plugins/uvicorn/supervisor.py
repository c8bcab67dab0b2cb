"""`--workers N`: uvicorn's supervisor, and the coordinator that talks to its workers."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import sys
import threading
import time

import uvicorn
from uvicorn.supervisors import Multiprocess

from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import HotRestartError, NotReady
from hotrestart_plugins.handover.frames import HandoverTarget
from hotrestart_plugins.lifecycle.table import Event
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn._compat import supervisor as _compat
from hotrestart_plugins.uvicorn._compat.names import say_what_is_missing
from hotrestart_plugins.uvicorn.draining_server import new_journal
from hotrestart_plugins.uvicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.uvicorn.takeover import Takeover
from hotrestart_plugins.uvicorn.worker import (
    DRAINED,
    MAX_MESSAGE,
    PAUSE,
    PAUSED,
    READY,
    RESUME,
    STAND_DOWN,
    WorkerProcess,
)

_EXIT_GRACE = 3  # seconds that a worker may take beyond the drain: to notice, and to clean up
_STOPS = {signal.SIGINT, signal.SIGTERM}


class Supervisor(Multiprocess):
    """uvicorn's supervisor of several workers, which takes over and can be replaced."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        """Take the listeners over, or bind them; raises SystemExit if that fails."""
        self._settings = settings
        self._journal = new_journal()
        say_what_is_missing(self._journal)
        self._takeover = Takeover(config, settings, self._journal)
        self._spawning = threading.Lock()
        self.should_exit = threading.Event()  # uvicorn makes its own below, after the takeover
        self._coordinator = WorkerCoordinator(self, self._takeover, self._journal)
        try:
            sockets = self._coordinator.driver.begin()
        except HotRestartError as error:
            self._takeover.say_overtaken()
            sys.exit(error.status)
        super().__init__(config, sockets)

    def run(self) -> None:
        """Serve until told to stop; raises SystemExit with a status that says why it failed."""
        with _compat.processes_made_by(
            functools.partial(
                WorkerProcess,
                settings=self._settings,
                takeover=self._takeover,
                spawning=self._spawning,
                on_started=self._coordinator.on_started,
            )
        ):
            super().run()
        self._takeover.say_overtaken()
        status = self._coordinator.status
        if status:
            sys.exit(status)

    def terminate_all(self) -> None:
        """Stop the coordinator and every worker. No copy of a listener stays open meanwhile."""
        # uvicorn's own look at its workers may come before the end of their link is heard.
        failed = (
            process.pid
            for process in _compat.processes(self)
            if _compat.exit_status(process) == NotReady.status
        )
        self._coordinator.stop(next(failed, None))
        self.close_listeners()
        self._takeover.close(crashed=self._coordinator.status != 0)
        super().terminate_all()

    def close_listeners(self) -> None:
        """Close this process's copies of the listeners; a worker started later gets none."""
        with self._spawning:
            _compat.close_listeners(self)

    def join_all(self) -> None:
        """Wait for every worker, then end the links: before that, it would look like a crash."""
        super().join_all()
        self._coordinator.close_links()

    def init_processes(self) -> None:
        """Start the workers, and listen to them."""
        self._coordinator.start()
        super().init_processes()

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have ended, unless that would start the code of a newer instance."""
        if self._coordinator.replaced:
            return
        if self._coordinator.must_recount:
            self._keep_count()
            self._coordinator.must_recount = False
        super().keep_subprocess_alive()

    def _keep_count(self) -> None:
        """Go on with the workers that are left: a new one would run the code that has failed."""
        workers = _compat.processes(self)
        left = [process for process in workers if _compat.exit_status(process) is None]
        if not 0 < len(left) < len(workers):
            return
        self._journal.emit(
            events.FEWER_WORKERS,
            left=len(left),
            wanted=len(workers),
            remedy="When it is good again, deploy it, or send SIGTTIN for each",
        )
        _compat.go_on_with(self, left)

    def handle_signals(self) -> None:
        """Obey the signals that have come; a replaced instance starts no workers."""
        if self._coordinator.replaced:
            for number in _compat.take_signals(self, _STOPS):
                name = signal.Signals(number).name
                self._journal.emit(events.SIGNAL_IGNORED, signal=name)
        super().handle_signals()


class WorkerCoordinator:
    """Listens to the workers and to the new instance, on a loop in a thread beside uvicorn's own.

    uvicorn's supervisor looks around twice a second; a takeover need not wait for that. The
    workers are spawned, not forked, so that the thread can do no harm there.
    """

    def __init__(self, supervisor: Supervisor, takeover: Takeover, journal: Journal) -> None:
        self.driver: LifecycleDriver = LifecycleDriver(takeover, self, journal)
        self.must_recount = False
        """From a pause until the supervisor, after a rollback, has counted its workers anew."""
        self.stats = DrainStats()
        self._supervisor = supervisor
        self._takeover = takeover
        self._settings = takeover.settings
        self._journal = journal
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread
        self._received: dict[WorkerProcess, set[bytes]] = {}
        self._message_came = asyncio.Event()
        self._booting: asyncio.Future[None] | None = None

    @property
    def replaced(self) -> bool:
        """Whether another instance serves in this one's place."""
        return self.driver.lifecycle.replaced

    @property
    def status(self) -> int:
        """The exit status: that of what made this instance fail, or 0."""
        failure = self.driver.failure
        return failure.status if isinstance(failure, HotRestartError) else 0

    # -- from the supervisor's thread ----------------------------------------------------------

    def start(self) -> None:
        """Begin to listen."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hotrestart")
        self._thread.start()
        self._loop.call_soon_threadsafe(self._begin)

    def on_started(self, process: WorkerProcess) -> None:
        """A worker process was started."""
        self._loop.call_soon_threadsafe(self._add, process)

    def stop(self, failed: int | None) -> None:
        """Finish the drain, if this instance was replaced, and stop listening.

        `failed`: the pid of a worker because of which uvicorn stops, if one could not start.
        """
        asyncio.run_coroutine_threadsafe(self._finish(failed), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close_links(self) -> None:
        """Close the links, after `stop`."""
        for process in self._received:
            process.link.close()

    # -- on the loop ---------------------------------------------------------------------------

    def _begin(self) -> None:
        self._booting = asyncio.ensure_future(self._boot())

    async def _finish(self, failed: int | None) -> None:
        if self._booting is not None:
            self._booting.cancel()
        if failed is not None and not self.status and not self.replaced:
            self._fail(NotReady(f"worker {failed} ended before it was ready, see above"))
        self.driver.report(Event.STOP_ORDERED)
        await self.driver.drained()
        self.driver.stop()
        for process in self._received:
            self._loop.remove_reader(process.link.fileno())

    def _add(self, process: WorkerProcess) -> None:
        if self.replaced or self.must_recount:
            # The supervisor was about to start it when this instance was replaced. It has not come
            # to its listeners yet, and its code is that on disk: the new one.
            self._journal.emit(events.LATE_WORKER_KILLED, pid=process.pid)
            _compat.kill(process)
        self._received[process] = set()
        self._loop.add_reader(process.link.fileno(), self._on_message, process)

    def _remove(self, process: WorkerProcess) -> None:
        self._loop.remove_reader(process.link.fileno())
        process.link.close()
        self._received.pop(process, None)
        self._message_came.set()

    def _on_message(self, process: WorkerProcess) -> None:
        try:
            word = process.link.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if not word:
            self._remove(process)
            return
        word, _, rest = word.partition(b" ")
        if rest:
            self.stats += DrainStats(**json.loads(rest))
        self._received[process].add(word)
        self._message_came.set()

    async def _all_report(self, word: bytes, seconds: float) -> bool:
        """Wait until every worker has sent `word`; False if that takes longer than `seconds`."""
        try:
            await asyncio.wait_for(self._reported_by_all(word), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    async def _reported_by_all(self, word: bytes) -> None:
        while not all(word in said for said in self._received.values()):
            self._message_came.clear()
            await self._message_came.wait()

    async def _boot(self) -> None:
        """Wait for every worker, then take over; a worker that ends before that ends it all."""
        seconds = self._settings.ready_timeout
        try:
            await asyncio.wait_for(self._all_ready(), seconds)
            if _compat.is_told_to_stop(self._supervisor, _STOPS):
                return
        except asyncio.TimeoutError:
            self._fail(
                NotReady(
                    f"the workers were not ready within {seconds:g} s: "
                    "fix the app, or pass a longer --ready-timeout"
                ),
                Event.READY_TIMED_OUT,
            )
        except HotRestartError as error:
            self._fail(error)
        else:
            self.driver.report(Event.READY)

    async def _all_ready(self) -> None:
        wanted = _compat.number_of_workers(self._supervisor)
        while sum(READY in said for said in self._received.values()) < wanted:
            before = set(self._received)
            self._message_came.clear()
            await self._message_came.wait()
            gone = before - set(self._received)
            if gone:
                pid = next(iter(gone)).pid
                raise NotReady(f"worker {pid} ended before it was ready, see above")

    def _fail(self, error: HotRestartError, event: Event = Event.FAILED) -> None:
        self.driver.fail(error, event)
        for process, said in self._received.items():
            if READY not in said:
                _compat.kill(process)  # a worker that hangs in its import ignores SIGTERM

    # -- Serving, for the lifecycle driver -----------------------------------------------------

    def take_over(self) -> None:
        """Claim the parent socket's name, and tell the old instance to go."""
        self._takeover.ready()

    async def pause(self, target: HandoverTarget | None = None) -> None:
        """Tell every worker to stop accepting, and to hand its connections over to the `target`."""
        self.must_recount = True
        self.stats = DrainStats()
        deadline = time.monotonic() + self._settings.drain_timeout  # one clock for all processes
        where: tuple[str | int, ...] = ()
        if target is not None:
            where = (str(target.directory), target.takeover_id, target.side.value)
        for process, said in self._received.items():
            said -= {PAUSED, DRAINED}
            process.send(PAUSE + b" " + json.dumps([deadline, *where]).encode())

    async def all_paused(self) -> bool:
        """Wait until every worker has stopped accepting; False if the drain timeout ends first."""
        return await self._all_report(PAUSED, self._settings.drain_timeout)

    async def resume(self) -> None:
        """Tell every worker that is left to accept again."""
        for process in self._received:
            process.send(RESUME)

    async def drain(self, seconds: float) -> bool:
        """Wait until every worker has drained, or has ended. They keep the time themselves.

        Returns False if something was cut off, or if a worker has not reported in time.
        """
        if await self._all_report(DRAINED, seconds + _EXIT_GRACE):
            return not self.stats.aborted
        # At least one each: the request that holds the worker up.
        self.stats.aborted_requests += len(self._undrained)
        return False

    @property
    def _undrained(self) -> list[WorkerProcess]:
        return [process for process, said in self._received.items() if DRAINED not in said]

    def abort(self) -> None:
        """Kill every worker that has not drained; the others have closed what was open."""
        for process in self._undrained:
            self._journal.emit(events.WORKER_KILLED, pid=process.pid)
            _compat.kill(process)

    def close_listeners(self) -> None:
        """Close this process's copies of the listeners, and tell every worker to do so."""
        for process in self._received:
            process.send(STAND_DOWN)
        self._supervisor.close_listeners()

    def shut_down(self) -> None:
        """Have the supervisor stop every worker, and exit."""
        self._supervisor.should_exit.set()
