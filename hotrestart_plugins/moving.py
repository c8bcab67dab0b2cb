"""Moving connections to the successor, and taking them in there, under any event loop.

Plain HTTP/1.1 between two messages is nothing but a descriptor. Which connections stand there, and
how they are held, each server says in its `Ways`; how they travel, `connections`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from hotrestart_plugins import connections
from hotrestart_plugins.connections import Arrival, Kind, Successor
from hotrestart_plugins.core.events import Logger
from hotrestart_plugins.errors import HotRestartError, MessageError

_AT_ONCE = 64  # connections in one turn of the loop, so that requests come in between
_UNDER_WAY = 4  # batches that may wait for their acknowledgement
_PATIENCE = 5.0  # seconds to wait for one
_LATER = {errno.EAGAIN, errno.ETOOMANYREFS}
"""No room in the channel; more of this user's descriptors under way than RLIMIT_NOFILE says."""
_PAUSE = 0.01  # seconds until the next attempt then
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_WAIT = 1.0  # seconds until a channel is accepted again, when there was no room for one

Batch = list[tuple[Any, Kind]]
"""Connections that are not read any more, and what each waits for."""


class Ways(Protocol):
    """How one server's connections are dealt with."""

    def kind(self, connection: Any) -> Kind | None:
        """What it waits for, if it stands between two messages; None: it must stay."""

    def watch(self, connection: Any, answered: Callable[[], None]) -> None:
        """Have `answered` called behind each answer from now on, if nobody else sees to that."""

    def hold(self, connection: Any, kind: Kind) -> None:
        """Read nothing from it, and let it be closed by no timer."""

    def release(self, connection: Any, kind: Kind) -> None:
        """Read it again, after `hold`."""

    def fileno(self, connection: Any) -> int:
        """The descriptor of its socket."""

    def let_go(self, connection: Any) -> None:
        """It is another's: close the copy."""

    def closing(self, connection: Any) -> bool:
        """Whether it was closed while it was held."""


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Do not call."""


class Loop(Protocol):
    """What is needed of an event loop; asyncio's have it."""

    def add_reader(self, fd: int, callback: Callable[..., object], /, *args: Any) -> object:
        """Call whenever `fd` is readable."""

    def remove_reader(self, fd: int, /) -> object:
        """No longer."""

    def call_soon(self, callback: Callable[..., object], /, *args: Any) -> Timer:
        """Call in the next turn."""

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any) -> Timer:
        """Call after `delay` seconds."""


class Mover:
    """The old side: offers each connection to the processes of the new instance, in turn."""

    def __init__(
        self,
        successor: Successor,
        ways: Ways,
        *,
        loop: Loop,
        failed: Callable[[], None],
        logger: Logger,
    ) -> None:
        """`failed` is called if the last channel has ended while it was still wanted."""
        self.moved: set[Any] = set()
        """The connections that the new instance has."""
        self.behind: set[Any] = set()
        """Those that had something left to write or to read when they had answered."""
        self.ways = ways
        self.loop = loop
        self.log = logger
        self._failed = failed
        self._unseen: deque[Any] = deque()  # to be watched, a few in each turn of the loop
        self._watched: set[Any] = set()
        self._waiting: set[Any] = set()  # each is in the queue of one outlet
        self._held: set[Any] = set()  # these are not read any more
        self._outlets: list[_Outlet] = []
        for path in connections.receivers(successor):
            with contextlib.suppress(OSError, HotRestartError):
                self._outlets.append(_Outlet(self, connections.connect(path)))
        # Each process of the old instance begins with another one.
        start = os.getpid() % len(self._outlets) if self._outlets else 0
        self._turn = itertools.cycle(self._outlets[start:] + self._outlets[:start])

    @property
    def active(self) -> bool:
        """Whether there is anybody to move connections to."""
        return bool(self._outlets)

    @property
    def all_watched(self) -> bool:
        """Whether `watch_all` has come to the last of them."""
        return not self._unseen

    @property
    def busy(self) -> bool:
        """Whether connections wait to be sent, or are on their way."""
        return bool(self._unseen) or any(outlet.busy for outlet in self._outlets)

    def watch_all(self, connections: Collection[Any]) -> None:
        """Move each now if it may be, else right after the answer that it waits for.

        Again, and once all are watched, for those that had something left behind their answer.
        """
        self._unseen.extend(connections)
        self._watch_some(connections)

    def _watch_some(self, connections: Collection[Any]) -> None:
        for _ in range(min(_AT_ONCE, len(self._unseen))):
            connection = self._unseen.popleft()
            if connection in connections:  # else it has ended, or is a WebSocket
                self.add(connection)
        if self._unseen:
            self.loop.call_soon(self._watch_some, connections)

    def add(self, connection: Any) -> None:
        """One, be it that it was not there yet: from an older instance, which still hands over."""
        if not self.active:
            return
        if connection not in self._watched:
            self._watched.add(connection)
            self.ways.watch(connection, functools.partial(self.answered, connection))
        self.consider(connection)

    def answered(self, connection: Any) -> None:
        """The connection has answered, and goes now, if it may."""
        if not self.active:
            return
        kind = self._stop_reading(connection)
        if kind is None:
            self.behind.add(connection)
        else:
            self._next_outlet().offer_first(connection, kind)

    def consider(self, connection: Any) -> None:
        """Offer the connection, if it stands between two messages.

        It is served until its turn comes: there may be thousands before it.
        """
        if (
            self.active
            and connection not in self._waiting
            and connection not in self._held
            and self.ways.kind(connection) is not None
        ):
            self._waiting.add(connection)
            self._next_outlet().offer(connection)

    def _next_outlet(self) -> _Outlet:
        return next(one for one in self._turn if one in self._outlets)

    def take_out(self, connection: Any) -> Kind | None:
        """It is its turn: stop reading, if it still may go. What has become busy goes later."""
        return self._stop_reading(connection) if connection in self._waiting else None

    def _stop_reading(self, connection: Any) -> Kind | None:
        self._waiting.discard(connection)
        kind = self.ways.kind(connection)
        if kind is not None:
            self._held.add(connection)
            self.ways.hold(connection, kind)
        return kind

    def put_back(self, batch: Batch) -> None:
        """These were not sent, or not taken: read here again, and offer them anew."""
        for connection, kind in batch:
            self._held.discard(connection)
            if not self.ways.closing(connection):
                self.ways.release(connection, kind)
                self.consider(connection)

    def ended(self, outlet: _Outlet, queued: Iterable[Any], stopped: Batch) -> None:
        """A channel has ended: what it had not delivered goes another way, or stays.

        The `stopped` ones are not read any more, the `queued` ones are.
        """
        self._outlets.remove(outlet)
        if not self._outlets:
            self._failed()
        for connection in queued:
            self._waiting.discard(connection)
            self.consider(connection)
        self.put_back(stopped)

    def close(self) -> None:
        """Offer nothing any more; what was not acknowledged is read here again."""
        for outlet in list(self._outlets):
            outlet.end()


class _Outlet:
    """One channel to one process of the new instance. Owns it."""

    def __init__(self, mover: Mover, channel: socket.socket) -> None:
        self._mover = mover
        self._channel = channel
        self._loop = mover.loop
        self._ways = mover.ways
        self._first: deque[tuple[Any, Kind]] = deque()  # have just answered, and are not read now
        self._queue: deque[Any] = deque()  # are served until it is their turn
        self._under_way: dict[int, Batch] = {}
        self._numbers = itertools.count(1)
        self._flushing: Timer | None = None
        self._timer: Timer | None = None
        self._loop.add_reader(channel.fileno(), self._heard)

    @property
    def busy(self) -> bool:
        return bool(self._first or self._queue or self._under_way)

    def offer(self, connection: Any) -> None:
        self._queue.append(connection)
        self._flush_soon()

    def offer_first(self, connection: Any, kind: Kind) -> None:
        """Before those that only wait: this one's client is about to ask again."""
        self._first.append((connection, kind))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None:  # later: others may come along in the same batch
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._stop_flushing()
        while (self._first or self._queue) and len(self._under_way) < _UNDER_WAY:
            batch = self._take_out()
            if not batch:
                continue
            number = next(self._numbers)
            try:
                connections.send(
                    self._channel, number, [(self._ways.fileno(one), kind) for one, kind in batch]
                )
            except OSError as error:
                self._mover.put_back(batch)
                if error.errno not in _LATER:
                    self._mover.log.warning("Connections stay here: %s", error)
                    self.end()
                    return
                self._stop_flushing()
                self._flushing = self._loop.call_later(_PAUSE, self._flush)
                return
            self._under_way[number] = batch
            if self._timer is None:
                self._timer = self._loop.call_later(_PATIENCE, self._out_of_patience)

    def _take_out(self) -> Batch:
        """The next ones that may go, no longer read here."""
        batch: Batch = []
        while self._first and len(batch) < _AT_ONCE:
            connection, kind = self._first.popleft()
            if not self._ways.closing(connection):
                batch.append((connection, kind))
        while self._queue and len(batch) < _AT_ONCE:
            connection = self._queue.popleft()
            found = self._mover.take_out(connection)
            if found is not None:
                batch.append((connection, found))
        return batch

    def _stop_flushing(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None

    def _out_of_patience(self) -> None:
        """Stopped or stuck: whatever it has not acknowledged is served here."""
        self._mover.log.warning("The new instance has not taken connections in for %g s", _PATIENCE)
        self.end()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _heard(self) -> None:
        try:
            number = connections.acknowledged(self._channel)
        except BlockingIOError:
            return
        except OSError:
            number = None
        if number is None:
            self.end()
            return
        self._stop_timer()
        self._taken(number)
        if self._under_way:
            self._timer = self._loop.call_later(_PATIENCE, self._out_of_patience)
        self._flush()

    def _taken(self, number: int) -> None:
        """The other side has them: close our copies, which closes no connection."""
        for connection, _ in self._under_way.pop(number, ()):
            self._mover.moved.add(connection)
            self._ways.let_go(connection)

    def end(self) -> None:
        if self._channel.fileno() < 0:
            return
        self._stop_timer()
        self._stop_flushing()
        self._loop.remove_reader(self._channel.fileno())
        for number in connections.cut(self._channel):
            self._taken(number)
        stopped = [one for batch in self._under_way.values() for one in batch] + [*self._first]
        queued = [*self._queue]
        self._under_way.clear()
        self._first.clear()
        self._queue.clear()
        self._mover.ended(self, queued, stopped)


class Receiver:
    """The new side, in each of its processes: takes in what comes. Owns its listener and path."""

    def __init__(
        self,
        path: Path,
        take_in: Callable[[Sequence[Arrival]], None],
        *,
        loop: Loop,
        logger: Logger,
    ) -> None:
        """Listens at once. `take_in` is given what comes, and owns it. Raises OSError."""
        self._path = path
        self._take_in = take_in
        self._loop = loop
        self._log = logger
        self._listener = connections.listen(path)
        self._channels: list[socket.socket] = []
        self._waiting: Timer | None = None  # until it listens again
        self._listen()

    @classmethod
    def open(
        cls, path: Path, take_in: Callable[[Sequence[Arrival]], None], *, loop: Loop, logger: Logger
    ) -> Receiver | None:
        """One that listens; None, with a line in the log, where that cannot be.

        The connections then stay with the old instance, and are closed after their next answer.
        """
        try:
            return cls(path, take_in, loop=loop, logger=logger)
        except OSError as error:
            logger.info("No connections are taken in at %s: %s", path, error)
            return None

    def _listen(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # it stays readable meanwhile
                self._log.warning("Connections cannot be taken in: %s", error)
                self._loop.remove_reader(self._listener.fileno())
                self._waiting = self._loop.call_later(_WAIT, self._listen)
            return
        try:
            connections.check(channel)
        except HotRestartError as error:
            self._log.warning("Dropped a channel: %s", error)
            channel.close()
            return
        channel.setblocking(False)
        self._channels.append(channel)
        self._loop.add_reader(channel.fileno(), self._readable, channel)

    def _readable(self, channel: socket.socket) -> None:
        try:
            found = connections.receive(channel)
        except BlockingIOError:
            return
        except (OSError, MessageError) as error:
            self._log.warning("Connections cannot be taken in: %s", error)
            found = None
        if found is None:
            self._drop(channel)
            return
        number, arrivals = found
        try:
            connections.acknowledge(channel, number)
        except OSError:
            for one in arrivals:
                one.sock.close()
            self._drop(channel)
            return
        self._take_in(arrivals)

    def _drop(self, channel: socket.socket) -> None:
        self._loop.remove_reader(channel.fileno())
        self._channels.remove(channel)
        channel.close()

    def close(self) -> None:
        """Take in nothing more; remove the path."""
        for channel in list(self._channels):
            self._drop(channel)
        if self._waiting is None:
            self._loop.remove_reader(self._listener.fileno())
        else:
            self._waiting.cancel()
        self._listener.close()
        self._path.unlink(missing_ok=True)
