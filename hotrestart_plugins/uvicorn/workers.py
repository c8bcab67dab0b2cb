"""`--workers N`: uvicorn's supervisor and its worker processes, with a link between them.

The link is a pair of SOCK_SEQPACKET sockets for each worker. Down it go ``pause``, with the end of
the drain and the successor behind it, and ``resume``; up it come ``ready``, ``paused``, and
``drained`` with a tally behind it; what is behind a word is JSON. Its end tells either side that
the other is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess, multiprocess

from hotrestart_plugins.connections import Successor, path_of
from hotrestart_plugins.draining import DrainingServer
from hotrestart_plugins.errors import HotRestartError, NotReady
from hotrestart_plugins.probe import Probe
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.tally import Tally
from hotrestart_plugins.uvicorn.succession import Succession
from hotrestart_plugins.uvicorn.takeover import Takeover

READY, PAUSE, PAUSED, RESUME, DRAINED = b"ready", b"pause", b"paused", b"resume", b"drained"
_MESSAGE = 4096  # bytes; no message is longer
_WIND_UP = 3  # seconds that a worker may take beyond the drain: to notice, and to clean up
_STOPS = {sig for sig, name in multiprocess.SIGNALS.items() if name in ("INT", "TERM")}

logger = logging.getLogger("uvicorn.error")


class WorkerServer(DrainingServer):
    """The server in a worker process. Owns its end of the link."""

    def __init__(
        self,
        config: uvicorn.Config,
        link: socket.socket,
        settings: Settings,
        successor: Successor | None,
    ) -> None:
        super().__init__(config)
        self._successor = successor
        self.drain_timeout = settings.drain_timeout
        self.probe = Probe.of(settings, f"{config.host}:{config.port}")
        self._link = link
        self._following: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's. What a worker cannot serve for is one line, and the exit status."""
        try:
            await super().serve(sockets)
        except NotReady as error:
            logger.error("Worker [%d] failed to start: %s", os.getpid(), error)  # noqa: TRY400
            sys.exit(error.status)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then tell the supervisor, and listen to it."""
        await super().startup(sockets)
        if self.started:
            self._link.setblocking(False)
            asyncio.get_running_loop().add_reader(self._link.fileno(), self._told)
            if self._successor is not None:
                self.take_in(path_of(self._successor, os.getpid()))
            self._say(READY)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):
            self._link.send(word)

    def _told(self) -> None:
        """Obey the last word: the others are out of date if this loop was held up meanwhile."""
        message = None
        try:
            while message != b"":
                message = self._link.recv(_MESSAGE)
        except BlockingIOError:
            pass
        except OSError:
            message = b""
        loop = asyncio.get_running_loop()
        if message:
            self._following = loop.create_task(self._follow(message, self._following))
        elif message is not None:
            # The supervisor is gone. An orphan would go on serving old code beside the new one.
            loop.remove_reader(self._link.fileno())
            logger.warning("The supervisor has ended; worker [%d] drains and leaves", os.getpid())
            self.should_exit = True

    async def _follow(self, message: bytes, before: asyncio.Task[None] | None) -> None:
        """Pause or resume, behind what was under way; only a drain is cut short."""
        if before is not None:
            await asyncio.wait({before})
        if self._draining is not None:
            self._draining.cancel()
        word, _, rest = message.partition(b" ")
        try:
            if word == RESUME:
                await self.resume()
                return
            deadline, directory, takeover_id = json.loads(rest)
            await self.pause(Successor(Path(directory), takeover_id) if directory else None)
        except Exception:
            logger.exception("Cannot %s: worker [%d] drains and leaves", word.decode(), os.getpid())
            self.should_exit = True
            return
        self._say(PAUSED)
        self._draining = asyncio.get_running_loop().create_task(self._drain_until(deadline))

    async def _drain_until(self, deadline: float) -> None:
        await self.drain(max(0.0, deadline - time.monotonic()))
        self._say(DRAINED + b" " + json.dumps(asdict(self.tally)).encode())


class WorkerProcess(multiprocess.Process):
    """uvicorn's handle of a worker process, in the supervisor; in the worker, its entry."""

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        *,
        settings: Settings,
        takeover: Takeover,
        born: Callable[[WorkerProcess], None],
    ) -> None:
        """`born` is called in the supervisor when the process was started.

        While the instance takes over, its workers take the parent's connections in.
        """
        super().__init__(config, sockets)
        self.link, self._far_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._settings = settings
        self._successor = takeover.successor
        self._born: Callable[[WorkerProcess], None] | None = born

    def __getstate__(self) -> dict[str, Any]:
        """What the worker process gets: its own end of the link, not the supervisor's."""
        state = dict(self.__dict__)
        state["link"] = state["_born"] = None
        return state

    def start(self) -> None:
        """As uvicorn's; then let go of the worker's end of the link, so that its end is heard."""
        super().start()
        self._far_link.close()
        self.link.setblocking(False)
        if self._born is not None:
            self._born(self)

    @property
    def server(self) -> uvicorn.Server:
        """In the worker: its server."""
        if self._server is None:
            self._server = WorkerServer(
                self.config, self._far_link, self._settings, self._successor
            )
        return self._server

    def say(self, word: bytes) -> None:
        """Send a word down the link; a worker that is gone hears nothing."""
        with contextlib.suppress(OSError):
            self.link.send(word)


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
            sys.exit(error.status)
        super().__init__(config, sockets)
        self._conductor = Conductor(self, self._takeover, settings)
        self._status = 0

    def run(self) -> None:
        """Serve until told to stop; raises SystemExit with a status that says why it failed."""
        with _processes_made_by(
            functools.partial(
                WorkerProcess,
                settings=self._settings,
                takeover=self._takeover,
                born=self._conductor.born,
            )
        ):
            super().run()
        if self._status:
            sys.exit(self._status)

    def terminate_all(self) -> None:
        """As uvicorn's. No copy of a listener stays open meanwhile that nobody would accept on."""
        # uvicorn's own look at its workers may come before the end of their link is heard.
        failed = (one.pid for one in self.processes if one.exitcode == NotReady.status)
        self._status = self._conductor.stop(next(failed, None))
        for one in self.sockets:
            one.close()
        self._takeover.close(crashed=self._status != 0)
        super().terminate_all()

    def join_all(self) -> None:
        """As uvicorn's; the links end behind it, or each worker would take this for a crash."""
        super().join_all()
        self._conductor.hang_up()

    def init_processes(self) -> None:
        """As uvicorn's; and somebody listens to them."""
        self._conductor.start()
        super().init_processes()

    def keep_subprocess_alive(self) -> None:
        """As uvicorn's, while this instance serves: a replaced one would start the new code."""
        if self._conductor.replaced:
            return
        if self._conductor.rolled_back:
            self._keep_count()
            self._conductor.rolled_back = False
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
        if self._conductor.replaced:
            for sig in [one for one in self.signal_queue if one not in _STOPS]:
                self.signal_queue.remove(sig)
                logger.info("Ignoring %s: replaced", multiprocess.SIGNALS[sig])
        super().handle_signals()


class Conductor:
    """Listens to the workers and to the successor, on a loop in a thread beside uvicorn's own.

    uvicorn's supervisor looks around twice a second; a takeover need not wait for that. The
    workers are spawned, not forked, so that the thread can do no harm there.
    """

    def __init__(self, supervisor: Supervisor, takeover: Takeover, settings: Settings) -> None:
        self.replaced = False
        self.rolled_back = False
        """From a rollback until the supervisor, on its own thread, has taken note of it."""
        self.tally = Tally()
        self._supervisor = supervisor
        self._takeover = takeover
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hotrestart")
        self._said: dict[WorkerProcess, set[bytes]] = {}
        self._heard = asyncio.Event()
        self._succession: Succession | None = None
        self._booting: asyncio.Future[None] | None = None
        self._status = 0

    # -- from the supervisor's thread ----------------------------------------------------------

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()
        self._loop.call_soon_threadsafe(self._begin)

    def born(self, process: WorkerProcess) -> None:
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

    def hang_up(self) -> None:
        """Close the links, behind `stop`."""
        for process in self._said:
            process.link.close()

    # -- on the loop ---------------------------------------------------------------------------

    def _begin(self) -> None:
        self._booting = asyncio.ensure_future(self._boot())

    async def _finish(self, failed: int | None) -> None:
        if self._booting is not None:
            self._booting.cancel()
        if failed is not None and not self._status:
            self._fail(NotReady(f"worker {failed} ended before it was ready, see above"))
        if self._succession is not None:
            self._succession.stop()
        for process in self._said:
            self._loop.remove_reader(process.link.fileno())

    def _add(self, process: WorkerProcess) -> None:
        if self.replaced or self.rolled_back:
            # The supervisor was about to start it when this instance was replaced. It has not come
            # to its listeners yet, and its code is that on disk: the new one.
            logger.info("Worker [%s] was started behind the takeover: killing it", process.pid)
            process.process.kill()
        self._said[process] = set()
        self._loop.add_reader(process.link.fileno(), self._hear, process)

    def _remove(self, process: WorkerProcess) -> None:
        self._loop.remove_reader(process.link.fileno())
        process.link.close()
        self._said.pop(process, None)
        self._heard.set()

    def _hear(self, process: WorkerProcess) -> None:
        try:
            word = process.link.recv(_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            word = b""
        if not word:
            self._remove(process)
            return
        word, _, rest = word.partition(b" ")
        if rest:
            self.tally += Tally(**json.loads(rest))
        self._said[process].add(word)
        self._heard.set()

    async def _all_say(self, word: bytes, seconds: float) -> bool:
        """Wait until every worker that is there has said it, `seconds` at most."""
        try:
            await asyncio.wait_for(self._heard_from_all(word), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    async def _heard_from_all(self, word: bytes) -> None:
        while not all(word in said for said in self._said.values()):
            self._heard.clear()
            await self._heard.wait()

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
                self._succession = Succession(hot, self._takeover.directory, self._settings, self)

    async def _all_ready(self) -> None:
        wanted = self._supervisor.processes_num
        while sum(READY in said for said in self._said.values()) < wanted:
            before = set(self._said)
            self._heard.clear()
            await self._heard.wait()
            gone = before - set(self._said)
            if gone:
                pid = next(iter(gone)).pid
                raise NotReady(f"worker {pid} ended before it was ready, see above")

    def _fail(self, error: HotRestartError) -> None:
        self._takeover.failed(error)
        self._status = error.status
        self._supervisor.should_exit.set()
        for process, said in self._said.items():
            if READY not in said:
                process.process.kill()  # a worker that hangs in its import heeds no SIGTERM

    # -- Serving, for the succession -----------------------------------------------------------

    async def pause(self, successor: Successor | None = None) -> None:
        """Every worker stops accepting, and hands its connections to those of the successor."""
        self.replaced = True
        self.tally = Tally()
        deadline = time.monotonic() + self._settings.drain_timeout  # one clock for all processes
        where = (
            (str(successor.directory), successor.takeover_id)
            if successor is not None
            else (None, 0)
        )
        for process, said in self._said.items():
            said -= {PAUSED, DRAINED}
            process.say(PAUSE + b" " + json.dumps([deadline, *where]).encode())

    async def all_paused(self) -> bool:
        """Wait until every worker has stopped accepting; the drain's time at most."""
        return await self._all_say(PAUSED, self._settings.drain_timeout)

    async def resume(self) -> None:
        """Every worker that is left accepts again."""
        for process in self._said:
            process.say(RESUME)
        self.rolled_back = True
        self.replaced = False

    async def drain(self, seconds: float) -> bool:
        """Wait until every worker has drained, or has ended; they keep the time themselves.

        One that does not, since something holds its loop up, is killed.
        """
        if await self._all_say(DRAINED, seconds + _WIND_UP):
            return True
        for process, said in self._said.items():
            if DRAINED not in said:
                logger.warning("Worker [%s] has not drained in time: killing it", process.pid)
                process.process.kill()
                self.tally.cut_requests += 1  # one at least: that which held it up
        return False

    def leave(self) -> None:
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
