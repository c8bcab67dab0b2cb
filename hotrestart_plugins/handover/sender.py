"""The old side of a handover: connections go to the new instance, under any event loop.

Plain HTTP/1.1 between two messages is nothing but a descriptor. Which connections stand there, and
how they are held, each server says in its `ConnectionAdapter`; how they travel, `frames`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

from hotrestart_plugins.core.events import Logger
from hotrestart_plugins.errors import HotRestartError
from hotrestart_plugins.handover import frames
from hotrestart_plugins.handover.adapter import ConnectionAdapter, EventLoop, Timer
from hotrestart_plugins.handover.frames import ConnectionState, HandoverTarget

_BATCH_SIZE = 64  # connections in one turn of the loop, so that requests come in between
_MAX_UNACKNOWLEDGED = 4  # batches that may wait for their acknowledgement
_ACK_TIMEOUT = 5.0  # seconds to wait for one
_RETRY_ERRNOS = {errno.EAGAIN, errno.ETOOMANYREFS}
"""No room in the channel; more of this user's descriptors under way than RLIMIT_NOFILE says."""
_RETRY_DELAY = 0.01  # seconds until the next attempt then

Batch = list[tuple[Any, ConnectionState]]
"""Connections that are not read any more, and what each waits for."""


class ConnectionSender:
    """The old side: offers each connection to the processes of the new instance, in turn."""

    def __init__(
        self,
        target: HandoverTarget,
        adapter: ConnectionAdapter,
        *,
        loop: EventLoop,
        on_failure: Callable[[], None],
        logger: Logger,
    ) -> None:
        """`on_failure` is called if the last channel has ended while it was still wanted."""
        self.handed_over: set[Any] = set()
        """The connections that the new instance has."""
        self.unfinished: set[Any] = set()
        """Those that had something left to write or to read when they had answered."""
        self.adapter = adapter
        self.loop = loop
        self.log = logger
        self._on_failure = on_failure
        self._unseen: deque[Any] = deque()  # to be watched, a few in each turn of the loop
        self._tracked: set[Any] = set()
        self._waiting: set[Any] = set()  # each is in the queue of one channel
        self._suspended: set[Any] = set()  # these are not read any more
        self._channels: list[_Channel] = []
        for path in frames.receivers(target):
            with contextlib.suppress(OSError, HotRestartError):
                self._channels.append(_Channel(self, frames.connect(path)))
        # Each process of the old instance begins with another one.
        start = os.getpid() % len(self._channels) if self._channels else 0
        self._turn = itertools.cycle(self._channels[start:] + self._channels[:start])

    @property
    def active(self) -> bool:
        """Whether there is anybody to move connections to."""
        return bool(self._channels)

    @property
    def all_offered(self) -> bool:
        """Whether `offer_all` has come to the last of them."""
        return not self._unseen

    @property
    def busy(self) -> bool:
        """Whether connections wait to be sent, or are on their way."""
        return bool(self._unseen) or any(channel.busy for channel in self._channels)

    def offer_all(self, connections: Collection[Any]) -> None:
        """Move each now if it may be, else right after the answer that it waits for.

        Again, and once all are watched, for those that had something left behind their answer.
        """
        self._unseen.extend(connections)
        self._offer_some(connections)

    def _offer_some(self, connections: Collection[Any]) -> None:
        for _ in range(min(_BATCH_SIZE, len(self._unseen))):
            connection = self._unseen.popleft()
            if connection in connections:  # else it has ended, or is a WebSocket
                self.add(connection)
        if self._unseen:
            self.loop.call_soon(self._offer_some, connections)

    def add(self, connection: Any) -> None:
        """One, be it that it was not there yet: from an older instance, which still hands over."""
        if not self.active:
            return
        if connection not in self._tracked:
            self._tracked.add(connection)
            self.adapter.on_response(connection, functools.partial(self.on_answer, connection))
        self.consider(connection)

    def on_answer(self, connection: Any) -> None:
        """The connection has answered, and goes now, if it may."""
        if not self.active:
            return
        state = self._stop_reading(connection)
        if state is None:
            self.unfinished.add(connection)
        else:
            self._next_channel().offer_first(connection, state)

    def consider(self, connection: Any) -> None:
        """Offer the connection, if it stands between two messages.

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

    def _next_channel(self) -> _Channel:
        return next(channel for channel in self._turn if channel in self._channels)

    def claim(self, connection: Any) -> ConnectionState | None:
        """It is its turn: stop reading, if it still may go. What has become busy goes later."""
        return self._stop_reading(connection) if connection in self._waiting else None

    def _stop_reading(self, connection: Any) -> ConnectionState | None:
        self._waiting.discard(connection)
        state = self.adapter.state(connection)
        if state is not None:
            self._suspended.add(connection)
            self.adapter.suspend(connection, state)
        return state

    def resume_batch(self, batch: Batch) -> None:
        """These were not sent, or not taken: read here again, and offer them anew."""
        for connection, state in batch:
            self._suspended.discard(connection)
            if not self.adapter.is_closing(connection):
                self.adapter.resume(connection, state)
                self.consider(connection)

    def ended(self, channel: _Channel, queued: Iterable[Any], stopped: Batch) -> None:
        """A channel has ended: what it had not delivered goes another way, or stays.

        The `stopped` ones are not read any more, the `queued` ones are.
        """
        self._channels.remove(channel)
        if not self._channels:
            self._on_failure()
        for connection in queued:
            self._waiting.discard(connection)
            self.consider(connection)
        self.resume_batch(stopped)

    def close(self) -> None:
        """Offer nothing any more; what was not acknowledged is read here again."""
        for channel in list(self._channels):
            channel.end()


class _Channel:
    """One channel to one process of the new instance. Owns it."""

    def __init__(self, sender: ConnectionSender, channel: socket.socket) -> None:
        self._sender = sender
        self._channel = channel
        self._loop = sender.loop
        self._adapter = sender.adapter
        # Those that have just answered, and are not read now.
        self._first: deque[tuple[Any, ConnectionState]] = deque()
        self._queue: deque[Any] = deque()  # are served until it is their turn
        self._unacknowledged: dict[int, Batch] = {}
        self._numbers = itertools.count(1)
        self._flushing: Timer | None = None
        self._timer: Timer | None = None
        self._loop.add_reader(channel.fileno(), self._readable)

    @property
    def busy(self) -> bool:
        return bool(self._first or self._queue or self._unacknowledged)

    def offer(self, connection: Any) -> None:
        self._queue.append(connection)
        self._flush_soon()

    def offer_first(self, connection: Any, state: ConnectionState) -> None:
        """Before those that only wait: this one's client is about to ask again."""
        self._first.append((connection, state))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None:  # later: others may come along in the same batch
            self._flushing = self._loop.call_soon(self._flush)

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
                if error.errno not in _RETRY_ERRNOS:
                    self._sender.log.warning("Connections stay here: %s", error)
                    self.end()
                    return
                self._stop_flushing()
                self._flushing = self._loop.call_later(_RETRY_DELAY, self._flush)
                return
            self._unacknowledged[number] = batch
            if self._timer is None:
                self._timer = self._loop.call_later(_ACK_TIMEOUT, self._on_timeout)

    def _next_batch(self) -> Batch:
        """The next ones that may go, no longer read here."""
        batch: Batch = []
        while self._first and len(batch) < _BATCH_SIZE:
            connection, state = self._first.popleft()
            if not self._adapter.is_closing(connection):
                batch.append((connection, state))
        while self._queue and len(batch) < _BATCH_SIZE:
            connection = self._queue.popleft()
            found = self._sender.claim(connection)
            if found is not None:
                batch.append((connection, found))
        return batch

    def _stop_flushing(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None

    def _on_timeout(self) -> None:
        """Stopped or stuck: whatever it has not acknowledged is served here."""
        self._sender.log.warning(
            "The new instance has not taken connections in for %g s", _ACK_TIMEOUT
        )
        self.end()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _readable(self) -> None:
        try:
            number = frames.acknowledged(self._channel)
        except BlockingIOError:
            return
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
        """The other side has them: close our copies, which closes no connection."""
        for connection, _ in self._unacknowledged.pop(number, ()):
            self._sender.handed_over.add(connection)
            self._adapter.discard(connection)

    def end(self) -> None:
        if self._channel.fileno() < 0:
            return
        self._stop_timer()
        self._stop_flushing()
        self._loop.remove_reader(self._channel.fileno())
        for number in frames.cut(self._channel):
            self._acknowledged(number)
        stopped = [pair for batch in self._unacknowledged.values() for pair in batch] + [
            *self._first
        ]
        queued = [*self._queue]
        self._unacknowledged.clear()
        self._first.clear()
        self._queue.clear()
        self._sender.ended(self, queued, stopped)
