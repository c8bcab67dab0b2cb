"""The sending side of a handover, under any event loop.

A plain HTTP/1.1 connection that is between two messages is nothing but a descriptor. Which
connections are, and how they are suspended, each server says in its `ConnectionAdapter`; how they
travel is in `frames`. Nothing here knows whether it sends to the new instance or back to the old.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Generic, TypeVar

from hotrestart_plugins.core import events
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.errors import HotRestartError, MessageError
from hotrestart_plugins.handover import frames
from hotrestart_plugins.handover.adapter import ConnectionAdapter, EventLoop, Timer
from hotrestart_plugins.handover.frames import ConnectionState, HandoverTarget

ConnectionT = TypeVar("ConnectionT")

_BATCH_SIZE = 64  # connections in one turn of the loop, so that requests are served in between
_MAX_UNACKNOWLEDGED = 4  # batches that may wait for their acknowledgement
_ACK_TIMEOUT = 5.0  # seconds to wait for one, and for room in a channel that is full
_RETRY_ERRNOS = {errno.EAGAIN, errno.ETOOMANYREFS}
"""No room in the channel; more of this user's descriptors in flight than RLIMIT_NOFILE allows."""
_RETRY_DELAY = 0.01  # seconds until the next attempt then


class ConnectionSender(Generic[ConnectionT]):
    """Hands the connections of one process to the processes of the target, in turn."""

    def __init__(
        self,
        target: HandoverTarget,
        adapter: ConnectionAdapter[ConnectionT],
        *,
        loop: EventLoop,
        on_failure: Callable[[], None],
        journal: Journal,
    ) -> None:
        """`on_failure` is called when the last channel ends, so that all connections stay here."""
        self.handed_over: set[ConnectionT] = set()
        """The connections that the target has."""
        self.unfinished: set[ConnectionT] = set()
        """Those that had something left to write or to read after their answer."""
        self.adapter = adapter
        self.loop = loop
        self.journal = journal
        self.fence = Fence(journal, events.HANDOVER_FAULT)
        self._on_failure = on_failure
        self._unseen: deque[ConnectionT] = deque()  # to be offered, a few in each turn of the loop
        self._tracked: set[ConnectionT] = set()
        self._waiting: set[ConnectionT] = set()  # each is in the queue of one channel
        self._suspended: set[ConnectionT] = set()
        self._channels: list[_Channel[ConnectionT]] = []
        for path in frames.receivers(target):
            with contextlib.suppress(OSError, HotRestartError):
                self._channels.append(_Channel(self, frames.connect(path)))
        # Each process of this instance begins with another process of the target.
        start = os.getpid() % len(self._channels) if self._channels else 0
        self._turn = itertools.cycle(self._channels[start:] + self._channels[:start])

    @property
    def active(self) -> bool:
        """Whether any process receives."""
        return bool(self._channels)

    @property
    def all_offered(self) -> bool:
        """Whether `offer_all` has reached its last connection."""
        return not self._unseen

    @property
    def busy(self) -> bool:
        """Whether connections wait to be sent, or are on their way."""
        return bool(self._unseen) or any(channel.busy for channel in self._channels)

    def offer_all(self, connections: Collection[ConnectionT]) -> None:
        """Hand over each connection: now if it may go, else after the answer that it waits for.

        Call it again, once `all_offered`, for those that had something left after their answer.
        """
        self._unseen.extend(connections)
        self._offer_some(connections)

    def _offer_some(self, connections: Collection[ConnectionT]) -> None:
        for _ in range(min(_BATCH_SIZE, len(self._unseen))):
            connection = self._unseen.popleft()
            if connection in connections:  # else it has ended, or is a WebSocket
                self.add(connection)
        if self._unseen:
            self.loop.call_soon(functools.partial(self._offer_some, connections))

    def add(self, connection: ConnectionT) -> None:
        """Hand over one connection, also one that arrived after the handover began.

        Such a connection comes from an older instance, which still hands over to this one.
        """
        if not self.active:
            return
        with self.fence:
            if connection not in self._tracked:
                self._tracked.add(connection)
                self.adapter.on_response(connection, functools.partial(self.on_answer, connection))
            self.consider(connection)

    def on_answer(self, connection: ConnectionT) -> None:
        """Hand the connection over, which has just answered, if it may go."""
        if not self.active:
            return
        with self.fence:
            state = self._stop_reading(connection)
            if state is None:
                self.unfinished.add(connection)
            else:
                self._next_channel().offer_first(connection, state)

    def consider(self, connection: ConnectionT) -> None:
        """Queue the connection, if it is between two messages.

        It is served until its turn comes: there may be thousands before it.
        """
        if (
            self.active
            and connection not in self._waiting
            and connection not in self._suspended
            and self.adapter.state(connection) is not None
        ):
            self._waiting.add(connection)
            self._next_channel().offer(connection)

    def _next_channel(self) -> _Channel[ConnectionT]:
        return next(channel for channel in self._turn if channel in self._channels)

    def claim(self, connection: ConnectionT) -> ConnectionState | None:
        """Suspend a queued connection whose turn has come, if it still may go.

        One that has become busy goes after its answer.
        """
        return self._stop_reading(connection) if connection in self._waiting else None

    def _stop_reading(self, connection: ConnectionT) -> ConnectionState | None:
        self._waiting.discard(connection)
        state = self.adapter.state(connection)
        if state is None:
            return None
        try:
            self.adapter.suspend(connection, state)
        except Exception:
            with self.fence:
                self.adapter.resume(connection, state)
            raise
        self._suspended.add(connection)
        return state

    def resume_batch(self, batch: Iterable[tuple[ConnectionT, ConnectionState]]) -> None:
        """Read connections here again that were not sent, or not acknowledged; offer them anew."""
        for connection, state in batch:
            with self.fence:  # a fault with one of them must not leave the others suspended
                self._suspended.discard(connection)
                if not self.adapter.is_closing(connection):
                    self.adapter.resume(connection, state)
                    self.consider(connection)

    def ended(
        self,
        channel: _Channel[ConnectionT],
        queued: Iterable[ConnectionT],
        stopped: Iterable[tuple[ConnectionT, ConnectionState]],
    ) -> None:
        """Offer what an ended channel had not delivered to another one, or keep it here.

        The `stopped` connections are suspended, the `queued` ones are not.
        """
        self._channels.remove(channel)
        if not self._channels:
            with self.fence:
                self._on_failure()
        for connection in queued:
            with self.fence:
                self._waiting.discard(connection)
                self.consider(connection)
        self.resume_batch(stopped)

    def close(self) -> None:
        """Hand nothing over any more; read here again what was not acknowledged."""
        for channel in list(self._channels):
            channel.end()


class _Channel(Generic[ConnectionT]):
    """One channel to one process of the target. Owns it."""

    def __init__(self, sender: ConnectionSender[ConnectionT], channel: socket.socket) -> None:
        self._sender = sender
        self._channel = channel
        self._loop = sender.loop
        self._adapter = sender.adapter
        # Suspended: they have just answered.
        self._first: deque[tuple[ConnectionT, ConnectionState]] = deque()
        self._queue: deque[ConnectionT] = deque()  # served until their turn comes
        self._unacknowledged: dict[int, list[tuple[ConnectionT, ConnectionState]]] = {}
        self._numbers = itertools.count(1)
        self._flushing: Timer | None = None
        self._timer: Timer | None = None
        self._full_since = 0.0  # monotonic seconds; 0: there was room at the last attempt
        self._loop.add_reader(channel.fileno(), self._on_readable)

    @property
    def busy(self) -> bool:
        return bool(self._first or self._queue or self._unacknowledged)

    def offer(self, connection: ConnectionT) -> None:
        self._queue.append(connection)
        self._flush_soon()

    def offer_first(self, connection: ConnectionT, state: ConnectionState) -> None:
        """Send it before those that only wait: its client is about to ask again."""
        self._first.append((connection, state))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None:  # later: others may join the same batch
            self._flushing = self._loop.call_soon(self._on_flush)

    # -- called by the loop: a fault ends the channel, and the connections stay ------------------

    def _on_flush(self) -> None:
        self._guard(self._flush)

    def _on_readable(self) -> None:
        self._guard(self._receive)

    def _on_timeout(self) -> None:
        """The process is stopped or stuck: what it has not acknowledged is served here."""
        self._timer = None
        with self._sender.fence:
            self._sender.journal.emit(events.HANDOVER_TIMED_OUT, seconds=_ACK_TIMEOUT)
        self._guard(self.end)

    def _guard(self, callback: Callable[[], None]) -> None:
        with self._sender.fence:
            callback()
            return
        with self._sender.fence:
            self.end()

    # -- sending -------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._stop_flushing()
        while (self._first or self._queue) and len(self._unacknowledged) < _MAX_UNACKNOWLEDGED:
            batch = self._next_batch()
            if not batch:
                continue
            number = next(self._numbers)
            try:
                frames.send(
                    self._channel,
                    number,
                    [(self._adapter.fileno(connection), state) for connection, state in batch],
                )
            except OSError as error:
                self._sender.resume_batch(batch)
                self._not_sent(error)
                return
            except Exception:
                self._sender.resume_batch(batch)
                raise
            self._full_since = 0.0  # also if the next batch finds no room
            self._unacknowledged[number] = batch
            if self._timer is None:
                self._timer = self._loop.call_later(_ACK_TIMEOUT, self._on_timeout)
        self._full_since = 0.0

    def _not_sent(self, error: OSError) -> None:
        """Try again in a moment if there was no room; not for ever, and else not at all."""
        now = time.monotonic()
        self._full_since = self._full_since or now
        if error.errno not in _RETRY_ERRNOS or now >= self._full_since + _ACK_TIMEOUT:
            self._sender.journal.emit(events.HANDOVER_FAILED, error=error)
            self.end()
            return
        self._stop_flushing()
        self._flushing = self._loop.call_later(_RETRY_DELAY, self._on_flush)

    def _next_batch(self) -> list[tuple[ConnectionT, ConnectionState]]:
        """The next connections that may go, suspended."""
        batch: list[tuple[ConnectionT, ConnectionState]] = []
        while self._first and len(batch) < _BATCH_SIZE:
            connection, state = self._first.popleft()
            with self._sender.fence:
                if not self._adapter.is_closing(connection):
                    batch.append((connection, state))
        while self._queue and len(batch) < _BATCH_SIZE:
            connection = self._queue.popleft()
            with self._sender.fence:
                claimed = self._sender.claim(connection)
                if claimed is not None:
                    batch.append((connection, claimed))
        return batch

    def _stop_flushing(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- acknowledgements ----------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            number = frames.acknowledged(self._channel)
        except BlockingIOError:
            return
        except MessageError as error:
            self._sender.journal.emit(events.HANDOVER_FAILED, error=error)
            number = None
        except OSError:
            number = None
        if number is None:
            self.end()
            return
        self._stop_timer()
        self._acknowledged(number)
        if self._unacknowledged:
            self._timer = self._loop.call_later(_ACK_TIMEOUT, self._on_timeout)
        self._flush()

    def _acknowledged(self, number: int) -> None:
        """The target has these connections: close the copies, which closes no connection."""
        for connection, _ in self._unacknowledged.pop(number, ()):
            self._sender.handed_over.add(connection)
            with self._sender.fence:
                self._adapter.discard(connection)

    def end(self) -> None:
        """End the channel; what it had not delivered goes another way, or stays."""
        if self._channel.fileno() < 0:
            return
        self._stop_timer()
        self._stop_flushing()
        with self._sender.fence:
            self._loop.remove_reader(self._channel.fileno())
        for number in frames.cut(self._channel):
            self._acknowledged(number)
        stopped = [pair for batch in self._unacknowledged.values() for pair in batch]
        stopped += self._first
        queued = list(self._queue)
        self._unacknowledged.clear()
        self._first.clear()
        self._queue.clear()
        self._sender.ended(self, queued, stopped)
