"""A uvicorn server that can stop accepting, drain, and accept again.

uvicorn's own shutdown closes idle connections under requests that are on their way and drops what
it had accepted and not read (uvicorn#2757, #3023). Here a listener is closed without losing what
it had accepted, and each open connection is answered once more, with ``Connection: close``.

Used by the launcher, by its workers, and by gunicorn's uvicorn worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
import weakref
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from types import FrameType
from typing import ClassVar

import uvicorn

from hotrestart_plugins.app import drain
from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.draining.event_streams import EventStreams
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.handover.asyncio_glue import (
    ConnectionAdopter,
    duplicate_listeners,
    offer_all,
    stop_accepting,
)
from hotrestart_plugins.handover.frames import ConnectionState, HandoverTarget, Side
from hotrestart_plugins.handover.receiver import ConnectionReceiver
from hotrestart_plugins.handover.sender import ConnectionSender
from hotrestart_plugins.lifecycle.probe import Probe
from hotrestart_plugins.uvicorn._compat import server as _compat
from hotrestart_plugins.uvicorn._compat.connections import (
    Connection,
    Connections,
    UvicornConnectionAdapter,
)
from hotrestart_plugins.uvicorn._compat.names import has
from hotrestart_plugins.uvicorn._compat.server import CLOSE, CloseAnnouncement
from hotrestart_plugins.uvicorn._compat.table import Feature
from hotrestart_plugins.uvicorn.drain_tracker import DrainTracker

_POLL_INTERVAL = 0.1  # seconds between two looks at what is still open; uvicorn's own pace
_POLL_INTERVAL_IN_HANDOVER = 0.01  # the same while connections are on their way to the successor
_POLL_INTERVAL_EACH = 1e-4  # for each connection, between two looks at all: each takes 2 or 3 us
_NEW_INSTANCE_DEATH_GRACE = 0.5
"""Seconds for the word that the new instance has died: its channels end before it."""
_ABORT_GRACE = 0.1  # seconds for the last words of what is aborted; uvicorn's own
_EXIT_GRACE = 1.0  # seconds for the app's side of what was brought to its end at the last moment


def new_journal() -> Journal:
    """Return a journal of this process, which writes to the log of uvicorn."""
    return Journal(logging.getLogger("uvicorn.error"))


class DrainingServer(uvicorn.Server):
    """A `uvicorn.Server` that can stop accepting and drain, and accept again."""

    on_created: ClassVar[Callable[[DrainingServer], None] | None] = None
    """Called with each new server, for code that does not construct it itself."""

    drain_timeout = 60.0
    """Seconds that a drain may take where uvicorn's --timeout-graceful-shutdown says nothing."""

    drain_on_stop = True
    """Whether a plain stop drains, too."""

    shares_listeners = False
    """Whether somebody else accepts on the same listeners when this server stops."""

    probe: Probe | None = None
    """The health check that must pass before this server accepts anything."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.journal = new_journal()
        self.paused = False
        self.stats = DrainStats()
        """What the last drain did."""
        self._listeners: list[socket.socket] = []
        self._spares: list[socket.socket] = []
        """Duplicates of the listeners, for a pause: there may be no room for a descriptor then."""
        self._streams = EventStreams()
        self._tracker: DrainTracker | None = None
        self._sender: ConnectionSender[Connection] | None = None
        self._announcing: asyncio.TimerHandle | None = None
        self._receivers: dict[Side, ConnectionReceiver] = {}
        self._adopter: ConnectionAdopter[Connection] | None = None
        self._aborting: asyncio.Task[None] | None = None
        self._drain_deadline = 0.0
        self._told: weakref.WeakSet[Connection] = weakref.WeakSet()
        """The connections that know that they close."""
        if self.on_created is not None:
            type(self).on_created(self)  # type: ignore[misc]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, ask the probe, and accept. Raises NotReady if the probe fails."""
        self._is = Connections(self.config)
        self._adapter = UvicornConnectionAdapter(self._is)
        self._close = CloseAnnouncement(self)
        if has(Feature.EVENT_STREAMS):
            _compat.wrap_app(self.config, self._streams.wrap)
        if self.probe is not None:
            _compat.wrap_startup(self, self._start_and_probe)
        await super().startup(sockets=sockets)
        if _compat.has_started(self):
            self._listeners = list(sockets or _compat.listeners_of(self))
            self._spares = duplicate_listeners(self._listeners)

    async def _start_and_probe(self, start: Callable[[], Awaitable[None]]) -> None:
        await start()
        if self.probe is None or _compat.app_failed(self):
            return
        try:
            await self.probe.run(self._protocol)
        except BaseException:
            await _compat.stop_app(self)
            raise

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; however that ends, no listener stays open."""
        try:
            await super().serve(sockets)
        finally:
            self._close_spares()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal that stops the server. After Ctrl-C it waits for no idle connection."""
        if sig == signal.SIGINT:
            self.drain_on_stop = False
        super().handle_exit(sig, frame)

    def forget_signals(self) -> None:
        """End by returning from `serve`, and not by the signal that has stopped this server."""
        _compat.forget_signals(self)

    @property
    def limit_max_requests(self) -> int | None:
        """The limit of ``--limit-max-requests``; None while paused, to be able to accept again."""
        return None if self.paused else super().limit_max_requests

    # -- accepting -----------------------------------------------------------------------------

    async def pause(self, target: HandoverTarget | None = None) -> None:
        """Accept nothing from now on; what was accepted is kept, and closed after its answer.

        With a `target`, connections go to it between two messages instead. Duplicates of the
        listeners stay open, so that `resume` can accept on them again. A stop that follows without
        a `drain` waits for what is open, `drain_timeout` from now at most.
        """
        if self.paused or not _compat.has_started(self):
            return
        kept, self._spares = self._spares or duplicate_listeners(self._listeners), []
        self.paused = True
        self._drain_deadline = time.monotonic() + self.drain_timeout
        loop = asyncio.get_running_loop()
        servers = _compat.asyncio_servers(self)
        await stop_accepting(servers, [sock.fileno() for sock in self._listeners])
        servers.clear()
        self._listeners = kept
        self._tracker = DrainTracker(self, self._is, self._streams)
        drain.set()
        if target is not None and self._is.can_be_handed_over:
            self._sender = ConnectionSender(
                target,
                self._adapter,
                loop=loop,
                on_failure=self._on_handover_failure,
                journal=self.journal,
            )
        if self._sender is None or not await offer_all(self._sender, self._connections):
            self._announce_close()

    def _on_handover_failure(self) -> None:
        """The new instance receives no more connections; if it has crashed, `resume` is next."""
        if self.paused and self._sender is not None:
            loop = asyncio.get_running_loop()
            self._announcing = loop.call_later(_NEW_INSTANCE_DEATH_GRACE, self._announce_close)

    async def resume(self) -> None:
        """Accept again, after `pause`."""
        if not self.paused:
            return
        if self._aborting is not None:
            await self._aborting
            self._aborting = None
        if self._announcing is not None:
            self._announcing.cancel()
            self._announcing = None
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()
        if self._tracker is not None:
            self._tracker.cancel()
            handed_over = sender.handed_over if sender is not None else frozenset()
            self.stats = self._tracker.stats(handed_over, abort=False)
            # Else the limit that they have reached would end it as soon as it serves again.
            _compat.forget_answered(self, self.stats.requests)
        self._tracker = None
        drain.clear()
        self._close.end()
        self._told.clear()
        loop = asyncio.get_running_loop()
        tls = _compat.tls_context(self.config)
        for sock in self._listeners:
            _compat.asyncio_servers(self).append(
                await loop.create_server(
                    self._protocol, sock=sock, ssl=tls, backlog=self.config.backlog
                )
            )
        with contextlib.suppress(OSError):  # no room now; the next pause tries again
            self._spares = duplicate_listeners(self._listeners)
        self.paused = False

    def _protocol(self) -> asyncio.Protocol:
        return _compat.make_protocol(self)

    @property
    def _connections(self) -> set[Connection]:
        return _compat.open_connections(self)

    def _announce_close(self) -> None:
        """Have every answer from now on carry ``Connection: close``."""
        if not self._close.is_on:
            self._close.begin()
            self._announce_close_to_all()

    def _announce_close_to_all(self) -> None:
        """Tell each connection once; some turn out to be HTTP/2 only later."""
        if not self._close.is_on:
            return
        for connection in [each for each in self._connections if each not in self._told]:
            self._told.add(connection)
            try:
                self._is.announce_close(connection, CLOSE)
            except Exception as error:  # noqa: BLE001 (the others and the drain do not need it)
                self.journal.emit(events.CLOSE_NOT_ANNOUNCED, traceback=error)

    def receive(self, target: HandoverTarget) -> None:
        """Adopt what the other instance of a takeover hands over, until this server shuts down.

        `target` is this instance: the new one of a takeover, or the old one if the new one gives
        back. A second call for the same side replaces the receiver of the first. A handover by
        this server ends with the call, or it would send straight back what it receives.
        """
        if not self._is.can_be_handed_over:
            return
        loop = asyncio.get_running_loop()
        if self._sender is not None:
            self._sender.close()
        if target.side in self._receivers:
            self._receivers.pop(target.side).close()
        if self._adopter is None:
            self._adopter = ConnectionAdopter(loop, self._protocol, self._on_adopted)
        receiver = ConnectionReceiver.open(
            target, self._adopter.adopt, loop=loop, journal=self.journal
        )
        if receiver is not None:
            self._receivers[target.side] = receiver

    def _on_adopted(self, connection: Connection, state: ConnectionState) -> None:
        if state is ConnectionState.IDLE:
            self._adapter.start_keep_alive(connection)
        if self._sender is not None:  # this instance was replaced meanwhile, too
            self._sender.add(connection)

    # -- draining ------------------------------------------------------------------------------

    async def drain(self, seconds: float, *, linger: float | None = None) -> bool:
        """Pause, then wait until nothing is open, `seconds` at most; whether that is so.

        In the second half of the time, connections that could not be handed over after their answer
        are closed after one more. In the last part, WebSockets and event streams are ended, spread
        out. `linger`: close what is idle after so many seconds; None: leave it to its own timeout.
        """
        await self.pause()
        begun = time.monotonic()
        self._drain_deadline = begun + seconds
        tracker = self._tracker or DrainTracker(self, self._is, self._streams)
        look_at_all = begun
        while self._open() and not _compat.is_forced(self):
            now = time.monotonic()
            if now >= look_at_all:
                self._offer_again()
                look_at_all = now + len(self._connections) * _POLL_INTERVAL_EACH
            if now >= begun + seconds / 2 and self._sender is not None:
                for connection in self._sender.unfinished & self._connections:
                    self._is.close_after_response(connection, CLOSE)
            self._announce_close_to_all()
            tracker.spread(max(0.0, self._drain_deadline - now), seconds)
            if now >= self._drain_deadline + (_EXIT_GRACE if tracker.ended else 0.0):
                break
            if linger is not None and now >= begun + linger:
                for connection in list(self._connections):
                    if self._is.is_idle(connection):
                        self._is.shut_down(connection)
            moving = self._sender is not None and self._sender.busy
            await asyncio.sleep(_POLL_INTERVAL_IN_HANDOVER if moving else _POLL_INTERVAL)
        tracker.cancel()
        self.stats = tracker.stats(self._handed_over)
        return not self._open()

    def _offer_again(self) -> None:
        """Offer the connections again that had something left to write or to read at first."""
        if self._sender is not None and self._sender.all_offered:
            self._sender.offer_all(self._connections)

    @property
    def _handed_over(self) -> AbstractSet[Connection]:
        return self._sender.handed_over if self._sender is not None else frozenset()

    def _open(self) -> int:
        arriving = self._adopter.pending if self._adopter is not None else 0
        return len(self._connections) + len(_compat.open_tasks(self)) + arriving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain if that is due, close the rest, and shut the app down."""
        if self.paused:
            await self.drain(max(0.0, self._drain_deadline - time.monotonic()))
        elif self.drain_on_stop:
            await self._stop_accepting()
            timeout = self.config.timeout_graceful_shutdown
            await self.drain(
                self.drain_timeout if timeout is None else float(timeout),
                linger=self.config.timeout_keep_alive,
            )
        for receiver in self._receivers.values():
            receiver.close()
        if self._sender is not None:
            self._sender.close()
        if self.paused:
            self.abort()
            if self._aborting is not None:
                await self._aborting
            if self._open():
                # It has had its time: uvicorn would wait again, without an end.
                self.config.timeout_graceful_shutdown = 0
            self.close_listeners()
        self._close_spares()
        await super().shutdown(sockets)

    async def _stop_accepting(self) -> None:
        """Without a new instance: accept what waits in the listeners' queues, and close them.

        A client that connects later is refused at once, and a proxy turns to the next server.
        """
        await self.pause()
        loop = asyncio.get_running_loop()
        tasks = []
        for listener in [] if self.shares_listeners else self._listeners:
            with contextlib.suppress(OSError):  # its queue is empty
                while True:
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    waiting = loop.connect_accepted_socket(
                        self._protocol, sock, ssl=_compat.tls_context(self.config)
                    )
                    tasks.append(loop.create_task(waiting))
        self.listeners_closing()
        self.close_listeners()
        await asyncio.gather(*tasks, return_exceptions=True)

    def listeners_closing(self) -> None:
        """Close other copies of the listeners, in a subclass that has any."""

    def close_listeners(self) -> None:
        """Close the copies of the listeners, after `pause`; `resume` can accept no more then."""
        for sock in self._listeners:
            sock.close()
        self._listeners = []

    def _close_spares(self) -> None:
        for sock in self._spares:
            sock.close()
        self._spares = []

    def abort(self) -> None:
        """Close what is still open, since its time is over. `shutdown` waits for that."""
        if self._open() and self._aborting is None:
            self.journal.emit(events.DRAIN_TIMED_OUT, aborted=self.stats.aborted_text())
            self._aborting = asyncio.get_running_loop().create_task(self._abort())

    async def _abort(self) -> None:
        for connection in list(self._connections):
            self._is.shut_down(connection)
        for task in list(_compat.open_tasks(self)):
            task.cancel()
        await asyncio.sleep(_ABORT_GRACE)
        for connection in list(self._connections):
            self._is.abort(connection)  # its client does not read
