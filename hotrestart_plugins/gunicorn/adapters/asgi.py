"""The adapter of gunicorn's own asgi worker, under asyncio and uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.event_streams import EventStream, EventStreams
from hotrestart_plugins.draining.stagger import StaggeredClose
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.gunicorn._compat.asgi import (
    AsgiConnection,
    AsgiWorker,
    RawAsgiWorker,
    close_connection_of,
)
from hotrestart_plugins.gunicorn._compat.table import Feature
from hotrestart_plugins.gunicorn.adapters.asyncio_base import AsyncioAdapter
from hotrestart_plugins.gunicorn.adapters.base import LastRequests, State
from hotrestart_plugins.gunicorn.adapters.close_hook import CloseHook, may_hand_over
from hotrestart_plugins.handover.asyncio_glue import (
    ConnectionAdopter,
    duplicate_listeners,
    offer_all,
    stop_accepting,
)
from hotrestart_plugins.handover.frames import ConnectionState
from hotrestart_plugins.handover.receiver import ConnectionReceiver
from hotrestart_plugins.handover.sender import ConnectionSender
from hotrestart_plugins.lifecycle.probe import Probe

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent

_SERVICE_RESTART = 1012  # close code, RFC 6455 section 7.4.2, IANA's registry
_LEAST = 2.0  # seconds of the last part: gunicorn looks once a second whether it is to end
_POLL_INTERVAL = 0.05  # seconds between two looks at what is still open


class AsgiAdapter(AsyncioAdapter):
    """Closes the worker's servers and makes them anew on duplicates of their listeners.

    Owns the duplicates, which are made ahead: a worker that has no descriptors left when it is told
    to pause could make none.
    """

    def __init__(self, worker: RawAsgiWorker, agent: WorkerAgent) -> None:
        """After the worker has set its signals, before its loop runs."""
        super().__init__(agent)
        self._worker = AsgiWorker(worker)
        self._loop = self._worker.loop
        self._close_hook = CloseHook(self._worker)
        self._close_hook.attach()  # connections look for the hook when they are made
        self._account = DrainAccount(self._worker, self._close_hook, agent)
        self._connections = self._account.connections
        self._worker.observe_connections(self)
        self._long = LongConnections(self._loop, self._account)
        self._ends_long_ones = not agent.lacks(Feature.END_LONG_CONNECTIONS)
        if self._ends_long_ones:
            self._worker.wrap_app(self._long.streams.wrap)
        self._can_hand_over = may_hand_over(worker.cfg) and not agent.lacks(Feature.HANDOVER)
        self._sender: ConnectionSender[AsgiConnection] | None = None
        self._receiver: ConnectionReceiver | None = None
        self._adopter: ConnectionAdopter[Any] | None = None
        self._duplicates: list[socket.socket] = []
        self._leaving: asyncio.Task[None] | None = None
        self._loop.add_signal_handler(signal.SIGTERM, self._terminate)
        self._worker.around_shutdown(self._shut_down)
        probe = Probe.of(agent.settings, "localhost")
        if probe is not None and not agent.lacks(Feature.PROBE):
            self._worker.before_serving(lambda: self._ask(probe))

    async def _ask(self, probe: Probe) -> None:
        try:
            await probe.run(self._worker.make_connection)
        except NotReady as error:
            self._agent.fail(error)

    def ready(self) -> None:
        """Set the backlog, which `create_server` has cut to its own default for all instances.

        Receive what the old instance's workers hand over.
        """
        for sock in self._worker.sockets:
            sock.listen(self._worker.cfg.backlog)
        self._duplicate()
        if self._agent.own_target is not None and self._can_hand_over:
            self._adopter = ConnectionAdopter(
                self._loop, self._worker.make_connection, self._on_adopted
            )
            self._receiver = ConnectionReceiver.open(
                self._agent.own_target,
                self._adopter.adopt,
                loop=self._loop,
                journal=self._agent.journal,
            )

    def _duplicate(self) -> None:
        self._duplicates = duplicate_listeners(self._worker.sockets)

    def _on_adopted(self, connection: AsgiConnection, state: ConnectionState) -> None:
        if state is ConnectionState.IDLE:
            connection.begin_keep_alive()
        if self._sender is not None:  # this instance was replaced meanwhile, too
            self._loop.call_soon(self._sender.add, connection)

    # -- what its connections tell -------------------------------------------------------------

    def on_open(self, connection: AsgiConnection) -> None:
        """Keep it in mind."""
        self._connections.add(connection)

    def on_closed(self, connection: AsgiConnection) -> None:
        """Forget it."""
        self._connections.discard(connection)

    def on_answered(self, connection: AsgiConnection) -> None:
        """Offer it in the next turn, when it waits."""
        if self._sender is not None:
            self._loop.call_soon(self._sender.on_answer, connection)

    def on_undecided(self, connection: AsgiConnection) -> None:
        """Offer it in the next turn: it can be handed over from now on."""
        if self._sender is not None:
            self._loop.call_soon(self._sender.add, connection)

    # -- pausing -------------------------------------------------------------------------------

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def _stays(self) -> bool:
        return self._state is not State.LEAVING and self._worker.alive

    async def _pause(self) -> None:
        if self._state is State.ACCEPTING:
            self._state = State.PAUSED
            await self._stop_accepting()

    async def _stop_accepting(self) -> None:
        if not self._duplicates:
            self._duplicate()
        target = self._agent.handover_target if self._can_hand_over else None
        self._close_hook.begin(close=target is None)
        worker = self._worker
        await stop_accepting(worker.servers, [sock.fileno() for sock in worker.sockets])
        worker.servers.clear()
        worker.replace_sockets(self._duplicates)
        self._duplicates = []
        self._account.begin()
        drain.set()
        if target is not None:
            self._sender = ConnectionSender(
                target,
                AsgiConnectionAdapter(),
                loop=self._loop,
                on_failure=self._close_hook.announce,
                journal=self._agent.journal,
            )
            self._account.handed_over = self._sender.handed_over
            if not await offer_all(self._sender, self._connections):
                self._close_hook.announce()

    async def _resume(self) -> None:
        await self._worker.accept_again()
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._close_hook.end(detach=False)
        drain.clear()
        if self._state is State.PAUSED:
            self._state = State.ACCEPTING
        with contextlib.suppress(OSError):  # then it tries again when it is told to pause
            self._duplicate()

    def stats(self) -> DrainStats:
        """What the drain has done; of a worker that leaves, before it closed what was left."""
        return self._account.stats()

    # -- the end -------------------------------------------------------------------------------

    async def _shut_down(self, shut_down: Callable[[], Awaitable[None]]) -> None:
        """Shut down, also in a worker that is used up or has lost its master."""
        self._close_receiver()
        for duplicate in self._duplicates:
            duplicate.close()
        if self._adopter is not None:  # gunicorn waits for connections, which these have yet to be
            await self._adopter.settled()
        await shut_down()

    def _close_receiver(self) -> None:
        """Receive nothing more: it would be cut off, and can stay with the old instance."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _terminate(self) -> None:
        if self._state is not State.LEAVING:
            accepts = self._state is State.ACCEPTING
            self._state = State.LEAVING
            self._leaving = self._loop.create_task(self._leave(accepts=accepts))

    async def _leave(self, *, accepts: bool) -> None:
        """Stop accepting first, and tell connections that they close before they are closed.

        gunicorn's own handler only clears `alive`, and a response whose headers promised
        keep-alive is then followed by a close. HTTP/2 and WebSockets go on until it is cleared,
        so that comes after half of the time at the latest.
        """
        worker = self._worker
        began = self._loop.time()
        patience = self._agent.seconds_left
        last_requests = LastRequests(lambda: worker.open_connections, patience)
        self._close_receiver()
        if accepts:
            await self._stop_accepting()
        for listener in worker.listeners:  # let no client wait for this worker
            listener.close()
        # gunicorn keeps a number of connections, and nothing that could be awaited.
        while worker.alive and not last_requests.over:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_INTERVAL)
        spent = int(self._loop.time() - began)
        worker.cfg.set("graceful_timeout", max(0, patience - spent))
        worker.alive = False
        await self._end_long_ones(began + patience, patience)

    async def _end_long_ones(self, deadline: float, patience: float) -> NoReturn:
        """End what lasts, one after another; go on until gunicorn cancels what is left."""
        staggered = StaggeredClose(self._long.find, self._long.end)
        while True:
            if self._ends_long_ones:
                staggered.step(deadline - self._loop.time(), patience, _LEAST)
            try:
                await asyncio.sleep(_POLL_INTERVAL)
            finally:  # when gunicorn cancels it, too: just before it closes what is left
                self._account.close()


class DrainAccount:
    """What becomes of the connections of an asgi worker: gunicorn itself only counts them."""

    def __init__(self, worker: AsgiWorker, close_hook: CloseHook, agent: WorkerAgent) -> None:
        self._worker = worker
        self._close_hook = close_hook
        self._knows_who_waits = not agent.lacks(Feature.HANDOVER)
        self._knows_websockets = not agent.lacks(Feature.END_LONG_CONNECTIONS)
        self._before = self._busy_before = 0
        self._closed: DrainStats | None = None
        self.connections: set[AsgiConnection] = set()
        """Those that are open."""
        self.handed_over: set[Any] = set()
        """Those that the new instance has."""
        self.ended: set[AsgiConnection] = set()
        """WebSockets that were told to come back."""
        self.ended_streams = 0

    def begin(self) -> None:
        """Count from here on."""
        self._before, self._busy_before = len(self.connections), self._busy()
        self.handed_over = set()

    def close(self) -> None:
        """Stop counting: what is still open is about to be cut off."""
        self._closed = self._count()

    def stats(self) -> DrainStats:
        """What has become of them until now, or until `close`."""
        return self._closed or self._count()

    def _busy(self) -> int:
        """How many have a request, or part of one; 0 where that is not known."""
        if not self._knows_who_waits:
            return 0
        return sum(not connection.waits for connection in self.connections)

    def _websockets(self) -> int:
        if not self._knows_websockets:
            return 0
        return sum(connection.is_websocket for connection in self.connections)

    def _count(self) -> DrainStats:
        """By the number of connections and of requests: those in flight, and those that came."""
        left, busy, websockets = len(self.connections), self._busy(), self._websockets()
        answers = max(0, self._busy_before + self._close_hook.requests - busy)
        stats = DrainStats.by_numbers(self._before, left, answers, len(self.handed_over))
        if not self._worker.alive:
            if not self._knows_who_waits:
                busy = left
            stats.aborted_requests = busy - websockets
            stats.aborted_websockets = websockets - len(self.ended & self.connections)
            stats.websockets, stats.streams = len(self.ended), self.ended_streams
            stats.finished = max(0, stats.finished - stats.websockets - stats.streams)
            stats.aborted_idle = left - busy
        return stats


class LongConnections:
    """WebSockets and event streams, which last until somebody ends them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, account: DrainAccount) -> None:
        self._loop = loop
        self._account = account
        self._endings: set[asyncio.Task[None]] = set()
        self.streams = EventStreams()

    def find(self) -> list[AsgiConnection | EventStream]:
        """Those that are open now."""
        connections = self._account.connections
        websockets = [connection for connection in connections if connection.is_websocket]
        return [*websockets, *self.streams.active]

    def end(self, item: AsgiConnection | EventStream) -> None:
        """Begin to end it. A client that does not read delays its own end, and nobody else's."""
        if isinstance(item, EventStream):
            ending = self._end_stream(item)
        else:
            self._account.ended.add(item)
            ending = item.end_websocket(_SERVICE_RESTART)
        task = self._loop.create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _end_stream(self, stream: EventStream) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # its client has gone
            await stream.end()
        if stream.ended:
            self._account.ended_streams += 1
            close_connection_of(stream)


class AsgiConnectionAdapter:
    """The worker's connections, as a handover needs them."""

    def state(self, connection: AsgiConnection) -> ConnectionState | None:
        """What it waits for; None if it must stay."""
        return connection.state

    def on_response(self, connection: AsgiConnection, answered: Callable[[], None]) -> None:
        """Do nothing: each connection tells `AsgiAdapter` when it begins to wait."""

    def fileno(self, connection: AsgiConnection) -> int:
        """The descriptor of its socket, which stays the connection's."""
        return connection.fileno()

    def suspend(self, connection: AsgiConnection, _state: ConnectionState) -> None:
        """Read nothing from it, and let no time pass."""
        connection.suspend()

    def resume(self, connection: AsgiConnection, state: ConnectionState) -> None:
        """Wait for its request again."""
        connection.resume(state)

    def discard(self, connection: AsgiConnection) -> None:
        """Close this process's copy."""
        connection.discard()

    def is_closing(self, connection: AsgiConnection) -> bool:
        """Whether it was closed while it was suspended."""
        return connection.is_closing
