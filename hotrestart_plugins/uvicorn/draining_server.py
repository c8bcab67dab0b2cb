"""A uvicorn server that can stop accepting, drain, and accept again.

uvicorn's own shutdown closes idle connections under requests that are on their way and drops what
it had accepted and not read (uvicorn#2757, #3023). Here a listener is let go without losing what
it had accepted, and each open connection is answered once more, with ``Connection: close``.

Used by the launcher, by its workers, and by gunicorn's uvicorn worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import logging
import signal
import socket
import time
import weakref
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from types import FrameType
from typing import Any, ClassVar

import uvicorn
from uvicorn.server import ServerState

from hotrestart_plugins.app import drain
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
from hotrestart_plugins.uvicorn.connection_adapter import UvicornConnectionAdapter, can_hand_over
from hotrestart_plugins.uvicorn.drain_tracker import (
    DrainTracker,
    announce_close,
    close_after_response,
    is_idle,
)

CLOSE = (b"connection", b"close")
_POLL_INTERVAL = 0.1  # seconds between two looks at what is still open; uvicorn's own pace
_POLL_INTERVAL_IN_HANDOVER = 0.01  # the same while connections are on their way to the successor
_POLL_INTERVAL_EACH = 1e-4  # for each connection, between two looks at all: each takes 2 or 3 us
_NEW_INSTANCE_DEATH_GRACE = 0.5
"""Seconds for the word that the new instance has died: its channels end before it."""
_EXIT_GRACE = 1.0  # seconds for the app's side of what was brought to its end at the last moment

logger = logging.getLogger("uvicorn.error")


class DrainingServer(uvicorn.Server):
    """A `uvicorn.Server` whose listeners can be let go and taken up again."""

    on_created: ClassVar[Callable[[DrainingServer], None] | None] = None
    """Called with each new instance, for whoever does not make it himself."""

    drain_timeout = 60.0
    """Seconds that a drain may take where uvicorn's --timeout-graceful-shutdown says nothing."""

    drain_on_stop = True
    """Whether a plain stop takes the care of a drain, too."""

    shares_listeners = False
    """Whether somebody else accepts on the same listeners when this server stops."""

    probe: Probe | None = None
    """What the app is asked before this server accepts anything."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.paused = False
        self.stats = DrainStats()
        """What the last drain did."""
        self._listeners: list[socket.socket] = []
        self._spares: list[socket.socket] = []
        """Duplicates of the listeners, for a pause: there may be no room for a descriptor then."""
        self._streams = EventStreams()
        self._tracker: DrainTracker | None = None
        self._sender: ConnectionSender[Any] | None = None
        self._announcing: asyncio.TimerHandle | None = None
        self._receivers: dict[Side, ConnectionReceiver] = {}
        self._adopter: ConnectionAdopter[asyncio.Protocol] | None = None
        self._drain_deadline = 0.0
        self._leaving: weakref.WeakSet[Any] | None = None
        """The connections that were asked to leave; None: none shall."""
        if self.on_created is not None:
            type(self).on_created(self)  # type: ignore[misc]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's. The probe comes between the lifespan and the listeners.

        Raises NotReady if the probe fails. WebSocket handshakes are kept from the headers of a
        drain.
        """
        if self.config.ws_protocol_class is not None:
            self.config.ws_protocol_class = functools.partial(  # type: ignore[assignment]
                _websocket, self.config.ws_protocol_class
            )
        self.config.loaded_app = self._streams.wrap(self.config.loaded_app)
        if self.probe is not None:
            self.lifespan.startup = functools.partial(
                self._start_and_probe, self.lifespan.startup, self.probe
            )
        await super().startup(sockets=sockets)
        if self.started:
            self._listeners = list(sockets or _listeners_of(self.servers))
            self._spares = duplicate_listeners(self._listeners)

    async def _start_and_probe(self, start: Callable[[], Any], probe: Probe) -> None:
        await start()
        if self.lifespan.should_exit:
            return
        try:
            await probe.run(self._protocol)
        except BaseException:
            await self.lifespan.shutdown()
            raise

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; however it ends, no listener stays open."""
        try:
            await super().serve(sockets)
        finally:
            self._close_spares()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's; who presses Ctrl-C does not want to wait for idle connections."""
        if sig == signal.SIGINT:
            self.drain_on_stop = False
        super().handle_exit(sig, frame)

    @property
    def limit_max_requests(self) -> int | None:
        """As uvicorn's; none while it is paused, so that it stays to accept again."""
        return None if self.paused else super().limit_max_requests

    # -- accepting -----------------------------------------------------------------------------

    async def pause(self, target: HandoverTarget | None = None) -> None:
        """Accept nothing from now on; what was accepted is kept, and closed after its answer.

        With a `target`, connections go to it between two messages instead. Duplicates of the
        listeners stay open, so that `resume` can accept on them again. A stop that follows without
        a `drain` waits for what is open, `drain_timeout` from now at most.
        """
        if self.paused or not self.started:
            return
        kept, self._spares = self._spares or duplicate_listeners(self._listeners), []
        self.paused = True
        self._drain_deadline = time.monotonic() + self.drain_timeout
        loop = asyncio.get_running_loop()
        await stop_accepting(self.servers, [one.fileno() for one in self._listeners])
        self.servers = []
        self._listeners = kept
        self._tracker = DrainTracker(self.server_state, self._streams)
        drain.set()
        if target is not None and can_hand_over(self.config):
            self._sender = ConnectionSender(
                target,
                UvicornConnectionAdapter(),
                loop=loop,
                on_failure=self._on_handover_failure,
                journal=Journal(logger),
            )
        if self._sender is None or not await offer_all(self._sender, self.server_state.connections):
            self._announce_close()

    def _on_handover_failure(self) -> None:
        """The successor takes no connections any more; or it has died, and `resume` comes next."""
        if self.paused and self._sender is not None:
            loop = asyncio.get_running_loop()
            self._announcing = loop.call_later(_NEW_INSTANCE_DEATH_GRACE, self._announce_close)

    async def resume(self) -> None:
        """Accept again, after `pause`."""
        if not self.paused:
            return
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
            self.server_state.total_requests -= self.stats.requests
        announced = self._leaving is not None
        self._tracker = self._leaving = None
        drain.clear()
        if announced:  # it comes last, behind a header of the user's own that may be the same
            self.config.encoded_headers = self.config.encoded_headers[:-1]
            # A list of its own: responses under way keep theirs, and close.
            self.server_state.default_headers = self.server_state.default_headers[:-1]
        loop = asyncio.get_running_loop()
        for one in self._listeners:
            self.servers.append(
                await loop.create_server(
                    self._protocol, sock=one, ssl=self.config.ssl, backlog=self.config.backlog
                )
            )
        with contextlib.suppress(OSError):  # no room now; the next pause tries again
            self._spares = duplicate_listeners(self._listeners)
        self.paused = False

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _announce_close(self) -> None:
        """Have every answer from now on carry ``Connection: close``: all parsers honour it."""
        if self._leaving is not None:
            return
        # Once a second uvicorn makes its default headers anew from these.
        self.config.encoded_headers = [*self.config.encoded_headers, CLOSE]
        # Responses under way hold this very list.
        self.server_state.default_headers.append(CLOSE)
        self._leaving = weakref.WeakSet()
        self._announce_close_to_all()

    def _announce_close_to_all(self) -> None:
        """Ask each connection once, be it that it only now turns out to be HTTP/2."""
        if self._leaving is None:
            return
        for connection in [
            one for one in self.server_state.connections if one not in self._leaving
        ]:
            self._leaving.add(connection)
            try:
                announce_close(connection, CLOSE)
            except Exception:  # the others, and the drain itself, do not depend on it
                logger.exception("A connection cannot be told that it closes")

    def receive(self, target: HandoverTarget) -> None:
        """Adopt what the other instance of a takeover hands over, until this server shuts down.

        `target` is this instance: the new one of a takeover, or the old one if the new one gives
        back. A second call for the same side replaces the receiver of the first. A handover by
        this server ends with the call, or it would send straight back what it receives.
        """
        if not can_hand_over(self.config):
            return
        loop = asyncio.get_running_loop()
        if self._sender is not None:
            self._sender.close()
        if target.side in self._receivers:
            self._receivers.pop(target.side).close()
        if self._adopter is None:
            self._adopter = ConnectionAdopter(loop, self._protocol, self._on_adopted)
        receiver = ConnectionReceiver.open(
            target, self._adopter.adopt, loop=loop, journal=Journal(logger)
        )
        if receiver is not None:
            self._receivers[target.side] = receiver

    def _on_adopted(self, connection: Any, state: ConnectionState) -> None:
        if state is ConnectionState.IDLE:
            UvicornConnectionAdapter().start_keep_alive(connection)
        if self._sender is not None:  # this instance was replaced meanwhile, too
            self._sender.add(connection)

    # -- draining ------------------------------------------------------------------------------

    async def drain(self, seconds: float, *, linger: float | None = None) -> bool:
        """Pause, then wait until nothing is open, `seconds` at most; whether that is so.

        From half of the time on those close that have answered and could not move, behind one more
        answer. In the last part WebSockets and event streams are brought to their end, spread out.
        `linger`: close what is idle after so many seconds; None: leave it to its own timeout.
        """
        await self.pause()
        begun = time.monotonic()
        self._drain_deadline = begun + seconds
        tracker = self._tracker or DrainTracker(self.server_state, self._streams)
        look_at_all = begun
        while self._open() and not self.force_exit:
            now = time.monotonic()
            if now >= look_at_all:
                self._offer_again()
                look_at_all = now + len(self.server_state.connections) * _POLL_INTERVAL_EACH
            if now >= begun + seconds / 2 and self._sender is not None:
                for connection in self._sender.unfinished & self.server_state.connections:
                    close_after_response(connection, CLOSE)
            self._announce_close_to_all()
            tracker.spread(max(0.0, self._drain_deadline - now), seconds)
            if now >= self._drain_deadline + (_EXIT_GRACE if tracker.ended else 0.0):
                break
            if linger is not None and now >= begun + linger:
                for connection in list(self.server_state.connections):
                    if is_idle(connection):
                        connection.shutdown()
            moving = self._sender is not None and self._sender.busy
            await asyncio.sleep(_POLL_INTERVAL_IN_HANDOVER if moving else _POLL_INTERVAL)
        tracker.cancel()
        self.stats = tracker.stats(self._handed_over)
        return not self._open()

    def _offer_again(self) -> None:
        """Offer those, too, that had something left to be written or read behind their answer."""
        if self._sender is not None and self._sender.all_offered:
            self._sender.offer_all(self.server_state.connections)

    @property
    def _handed_over(self) -> AbstractSet[Any]:
        return self._sender.handed_over if self._sender is not None else frozenset()

    def _open(self) -> int:
        arriving = self._adopter.pending if self._adopter is not None else 0
        return len(self.server_state.connections) + len(self.server_state.tasks) + arriving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain where that is due, then as uvicorn's."""
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
            self._abort_open()
            self._close_listeners()
        self._close_spares()
        await super().shutdown(sockets)

    async def _stop_accepting(self) -> None:
        """Without a new instance: accept what waits in the listeners' queues, and close them.

        Whoever connects later is refused at once, and a proxy turns to the next server.
        """
        await self.pause()
        loop = asyncio.get_running_loop()
        tasks = []
        for one in [] if self.shares_listeners else self._listeners:
            with contextlib.suppress(OSError):  # its queue is empty
                while True:
                    sock, _ = one.accept()
                    sock.setblocking(False)
                    waiting = loop.connect_accepted_socket(
                        self._protocol, sock, ssl=self.config.ssl
                    )
                    tasks.append(loop.create_task(waiting))
        self.listeners_closing()
        self._close_listeners()
        await asyncio.gather(*tasks, return_exceptions=True)

    def listeners_closing(self) -> None:
        """Close whatever else keeps the listeners open; for whoever holds copies of them."""

    def _close_listeners(self) -> None:
        for one in self._listeners:
            one.close()
        self._listeners = []

    def _close_spares(self) -> None:
        for one in self._spares:
            one.close()
        self._spares = []

    def _abort_open(self) -> None:
        if self._open():
            logger.warning("The drain timeout is over: %s", self.stats.aborted_text())
            # What a drain had time for has had it: uvicorn would wait again, without an end.
            self.config.timeout_graceful_shutdown = 0


def _listeners_of(servers: Sequence[asyncio.AbstractServer]) -> list[Any]:
    return [one for server in servers for one in getattr(server, "sockets", ())]


def _without_close(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header != CLOSE]


def _websocket(
    protocol_class: Callable[..., asyncio.Protocol], *args: Any, **kwargs: Any
) -> asyncio.Protocol:
    """Make the WebSocket protocol; a 101 must not say that the connection closes."""
    state: ServerState = kwargs["server_state"]
    if CLOSE in state.default_headers:
        state = copy.copy(state)
        state.default_headers = _without_close(state.default_headers)
        kwargs["server_state"] = state
    return protocol_class(*args, **kwargs)
