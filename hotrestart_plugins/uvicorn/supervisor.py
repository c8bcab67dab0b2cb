"""`--workers N`: uvicorn's supervisor, and the coordinator that talks to its workers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.supervisors import Multiprocess, multiprocess

from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import HotRestartError, NotReady, Overtaken
from hotrestart_plugins.handover.frames import HandoverTarget
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.uvicorn.takeover import Takeover
from hotrestart_plugins.uvicorn.worker import (
    DRAINED,
    MAX_MESSAGE,
    PAUSE,
    PAUSED,
    READY,
    RESUME,
    WorkerProcess,
)

_EXIT_GRACE = 3  # seconds that a worker may take beyond the drain: to notice, and to clean up
_STOPS = {sig for sig, name in multiprocess.SIGNALS.items() if name in ("INT", "TERM")}

logger = logging.getLogger("uvicorn.error")


class Supervisor(Multiprocess):
    """uvicorn's supervisor of several workers, taking over and being replaced."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        """Takes the listeners over, or binds them; raises HotRestartError if it cannot."""
        self._settings = settings
        self._takeover = Takeover(config, settings)
        try:
            sockets = self._takeover.listen()
        except HotRestartError as error:
            self._takeover.failed(error)
            if isinstance(error, Overtaken):
                self._takeover.say_overtaken(error)
            sys.exit(error.status)
        super().__init__(config, sockets)
        self._coordinator = WorkerCoordinator(self, self._takeover, settings)
        self._status = 0

    def run(self) -> None:
        """Serve until told to stop; raises SystemExit with a status that says why it failed."""
        with _processes_made_by(
            functools.partial(
                WorkerProcess,
                settings=self._settings,
                takeover=self._takeover,
                on_started=self._coordinator.on_started,
            )
        ):
            super().run()
        if self._coordinator.overtaken is not None:
            self._takeover.say_overtaken(self._coordinator.overtaken)
        if self._status:
            sys.exit(self._status)

    def terminate_all(self) -> None:
        """As uvicorn's. No copy of a listener stays open meanwhile that nobody would accept on."""
        # uvicorn's own look at its workers may come before the end of their link is heard.
        failed = (one.pid for one in self.processes if one.exitcode == NotReady.status)
        self._status = self._coordinator.stop(next(failed, None))
        for one in self.sockets:
            one.close()
        self._takeover.close(crashed=self._status != 0)
        super().terminate_all()

    def join_all(self) -> None:
        """As uvicorn's; the links end behind it, or each worker would take this for a crash."""
        super().join_all()
        self._coordinator.close_links()

    def init_processes(self) -> None:
        """As uvicorn's; and somebody listens to them."""
        self._coordinator.start()
        super().init_processes()

    def keep_subprocess_alive(self) -> None:
        """As uvicorn's, while this instance serves: a replaced one would start the new code."""
        if self._coordinator.replaced:
            return
        if self._coordinator.rolled_back:
            self._keep_count()
            self._coordinator.rolled_back = False
        super().keep_subprocess_alive()

    def _keep_count(self) -> None:
        """As many workers as are left: one started now would run the code that has just failed."""
        left = [one for one in self.processes if one.exitcode is None]
        if not 0 < len(left) < len(self.processes):
            return
        logger.warning(
            "%d of %d workers are left; more would run the code that is on disk now. "
            "When it is good again, deploy it, or send SIGTTIN for each",
            len(left),
            len(self.processes),
        )
        self.processes = left
        self.processes_num = len(left)

    def handle_signals(self) -> None:
        """As uvicorn's; a replaced instance starts no workers."""
        if self._coordinator.replaced:
            for sig in [one for one in self.signal_queue if one not in _STOPS]:
                self.signal_queue.remove(sig)
                logger.info("Ignoring %s: replaced", multiprocess.SIGNALS[sig])
        super().handle_signals()


class WorkerCoordinator:
    """Listens to the workers and to the new instance, on a loop in a thread beside uvicorn's own.

    uvicorn's supervisor looks around twice a second; a takeover need not wait for that. The
    workers are spawned, not forked, so that the thread can do no harm there.
    """

    def __init__(self, supervisor: Supervisor, takeover: Takeover, settings: Settings) -> None:
        self.replaced = False
        self.rolled_back = False
        """From a rollback until the supervisor, on its own thread, has taken note of it."""
        self.overtaken: Overtaken | None = None
        """Why this instance ends before it has taken over, if that is why."""
        self.stats = DrainStats()
        self._supervisor = supervisor
        self._takeover = takeover
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hotrestart")
        self._received: dict[WorkerProcess, set[bytes]] = {}
        self._message_came = asyncio.Event()
        self._driver: LifecycleDriver | None = None
        self._booting: asyncio.Future[None] | None = None
        self._status = 0

    # -- from the supervisor's thread ----------------------------------------------------------

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        self._loop.call_soon_threadsafe(self._begin)

    def on_started(self, process: WorkerProcess) -> None:
        """A worker process was started."""
        self._loop.call_soon_threadsafe(self._add, process)

    def stop(self, failed: int | None) -> int:
        """Stop listening; the status to exit with.

        `failed`: the pid of a worker because of which uvicorn stops, if one could not start.
        """
        asyncio.run_coroutine_threadsafe(self._finish(failed), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return self._status

    def close_links(self) -> None:
        """Close the links, behind `stop`."""
        for process in self._received:
            process.link.close()

    # -- on the loop ---------------------------------------------------------------------------

    def _begin(self) -> None:
        self._booting = asyncio.ensure_future(self._boot())

    async def _finish(self, failed: int | None) -> None:
        if self._booting is not None:
            self._booting.cancel()
        if failed is not None and not self._status:
            self._fail(NotReady(f"worker {failed} ended before it was ready, see above"))
        if self._driver is not None:
            self._driver.stop()
        for process in self._received:
            self._loop.remove_reader(process.link.fileno())

    def _add(self, process: WorkerProcess) -> None:
        if self.replaced or self.rolled_back:
            # The supervisor was about to start it when this instance was replaced. It has not come
            # to its listeners yet, and its code is that on disk: the new one.
            logger.info("Worker [%s] was started behind the takeover: killing it", process.pid)
            process.process.kill()
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
        """Wait until every worker that is there has said it, `seconds` at most."""
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
            if self._supervisor.should_exit.is_set() or _STOPS & {*self._supervisor.signal_queue}:
                return  # it looks at its signals twice a second, and will end
            hot = self._takeover.ready(self._supervisor.sockets)
        except asyncio.TimeoutError:
            self._fail(
                NotReady(
                    f"the workers were not ready within {seconds:g} s: "
                    "mend the app, or pass a longer --ready-timeout"
                )
            )
        except HotRestartError as error:
            self._fail(error)
        else:
            if hot is not None:
                self._driver = LifecycleDriver(hot, self._takeover.directory, self._settings, self)

    async def _all_ready(self) -> None:
        wanted = self._supervisor.processes_num
        while sum(READY in said for said in self._received.values()) < wanted:
            before = set(self._received)
            self._message_came.clear()
            await self._message_came.wait()
            gone = before - set(self._received)
            if gone:
                pid = next(iter(gone)).pid
                raise NotReady(f"worker {pid} ended before it was ready, see above")

    def _fail(self, error: HotRestartError) -> None:
        self._takeover.failed(error)
        self.overtaken = error if isinstance(error, Overtaken) else None
        self._status = error.status
        self._supervisor.should_exit.set()
        for process, said in self._received.items():
            if READY not in said:
                process.process.kill()  # a worker that hangs in its import heeds no SIGTERM

    # -- Serving, for the lifecycle driver -----------------------------------------------------

    async def pause(self, target: HandoverTarget | None = None) -> None:
        """Every worker stops accepting, and hands its connections to those of the `target`."""
        self.replaced = True
        self.stats = DrainStats()
        deadline = time.monotonic() + self._settings.drain_timeout  # one clock for all processes
        where: tuple[str | int, ...] = ()
        if target is not None:
            where = (str(target.directory), target.takeover_id, target.side.value)
        for process, said in self._received.items():
            said -= {PAUSED, DRAINED}
            process.send(PAUSE + b" " + json.dumps([deadline, *where]).encode())

    async def all_paused(self) -> bool:
        """Wait until every worker has stopped accepting; the drain's time at most."""
        return await self._all_report(PAUSED, self._settings.drain_timeout)

    async def resume(self) -> None:
        """Every worker that is left accepts again."""
        for process in self._received:
            process.send(RESUME)
        self.rolled_back = True
        self.replaced = False

    async def drain(self, seconds: float) -> bool:
        """Wait until every worker has drained, or has ended; they keep the time themselves.

        One that does not, since something holds its loop up, is killed.
        """
        if await self._all_report(DRAINED, seconds + _EXIT_GRACE):
            return True
        for process, said in self._received.items():
            if DRAINED not in said:
                logger.warning("Worker [%s] has not drained in time: killing it", process.pid)
                process.process.kill()
                self.stats.aborted_requests += 1  # one at least: that which held it up
        return False

    def shut_down(self) -> None:
        """End, with status 0."""
        self._supervisor.should_exit.set()


@contextlib.contextmanager
def _processes_made_by(factory: Callable[..., WorkerProcess]) -> Iterator[None]:
    """Have uvicorn's supervisor make our processes: it takes the class from its module."""
    original = multiprocess.Process
    multiprocess.Process = factory  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        multiprocess.Process = original  # type: ignore[misc]
