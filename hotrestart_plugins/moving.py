"""Moving the connections of a uvicorn server to its successor, and taking them in there.

Plain HTTP/1.1 between two messages is nothing but a descriptor. What a connection must be for that
is read off uvicorn's protocols, h11's and httptools'; zttp shows neither its state nor its buffer,
TLS and HTTP/2 have state that cannot be sent, and a WebSocket is never between two messages. These
take the drain's way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import uvicorn

from hotrestart_plugins import connections
from hotrestart_plugins.connections import Arrival, Kind, Successor
from hotrestart_plugins.errors import HotRestartError, MessageError

_PARSERS = {"uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl"}
_AT_ONCE = 64  # connections in one turn of the loop, so that requests come in between
_UNDER_WAY = 4  # batches that may wait for their acknowledgement
_PATIENCE = 5.0  # seconds to wait for one
_LATER = {errno.EAGAIN, errno.ETOOMANYREFS}
"""No room in the channel; more of this user's descriptors under way than RLIMIT_NOFILE says."""
_PAUSE = 0.01  # seconds until the next attempt then

Batch = list[tuple[Any, Kind]]
"""Connections that are not read any more, and what each waits for."""

logger = logging.getLogger("uvicorn.error")


def kind_of(connection: Any) -> Kind | None:
    """What a connection waits for, if it stands between two messages; None: it must stay."""
    if not hasattr(connection, "cycle"):  # a WebSocket
        return None
    transport = connection.transport
    if (
        transport is None
        or transport.is_closing()
        or transport.get_extra_info("ssl_object") is not None
        or transport.get_write_buffer_size()
    ):
        return None
    if hasattr(connection, "conn"):
        return _kind_h11(connection)
    if hasattr(connection, "pipeline") and hasattr(connection, "parser"):
        return _kind_httptools(connection)
    return None


def _kind_h11(connection: Any) -> Kind | None:
    if not hasattr(connection.conn, "trailing_data") or hasattr(connection, "cycles"):
        return None
    states = (connection.conn.our_state.__name__, connection.conn.their_state.__name__)
    if states != ("IDLE", "IDLE") or connection.conn.trailing_data != (b"", False):
        return None
    cycle = connection.cycle
    if cycle is None:
        return Kind.UNREAD
    return Kind.IDLE if cycle.response_complete and cycle.keep_alive else None


def _kind_httptools(connection: Any) -> Kind | None:
    cycle = connection.cycle
    if cycle is None:
        # The scope is made with the first byte of a message.
        return Kind.UNREAD if connection.scope is None else None
    whole = cycle.response_complete and not cycle.more_body and not connection.pipeline
    # A later message has begun if the scope is no longer that of the last request.
    return Kind.IDLE if whole and cycle.keep_alive and cycle.scope is connection.scope else None


def movable(config: uvicorn.Config) -> bool:
    """Whether this server's connections can be moved at all: plaintext, and by these parsers."""
    modules = {one.__module__ for one in config.http_protocol_class.__mro__}
    return config.ssl is None and bool(modules & _PARSERS)


class Mover:
    """The old side: offers each connection to the processes of the new instance, in turn."""

    def __init__(self, successor: Successor, failed: Callable[[], None]) -> None:
        """`failed` is called if the last channel has ended while it was still wanted."""
        self.moved: set[Any] = set()
        """The connections that the new instance has."""
        self._failed = failed
        self._waiting: set[Any] = set()  # each is in the queue of one outlet
        self._loop = asyncio.get_running_loop()
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
    def busy(self) -> bool:
        """Whether connections wait to be sent, or are on their way."""
        return any(outlet.busy for outlet in self._outlets)

    async def watch_all(self, connections: Collection[Any]) -> None:
        """`watch` those that are there now, a few in each turn of the loop."""
        now = list(connections)
        for start in range(0, len(now), _AT_ONCE):
            if not self.active:
                return
            for connection in now[start : start + _AT_ONCE]:
                if connection in connections:  # it may have ended meanwhile, or be a WebSocket
                    self.watch(connection)
            await asyncio.sleep(0)

    def watch(self, connection: Any) -> None:
        """Move the connection now if it may be, else right after the answer that it waits for."""
        self._have_it_moved_after_each_answer(connection)
        self.consider(connection)

    def _have_it_moved_after_each_answer(self, connection: Any) -> None:
        original = getattr(connection, "on_response_complete", None)
        if original is None:
            return

        def complete() -> None:
            original()
            if self.active and (kind := self._stop_reading(connection)) is not None:
                self._next_outlet().offer_first(connection, kind)

        connection.on_response_complete = complete  # the next cycles are made with it
        cycle = getattr(connection, "cycle", None)
        if cycle is not None and not cycle.response_complete:
            cycle.on_response = complete
        for waiting, _app in getattr(connection, "pipeline", ()):
            waiting.on_response = complete

    def consider(self, connection: Any) -> None:
        """Offer the connection, if it stands between two messages.

        It is served until its turn comes: there may be thousands before it.
        """
        if self.active and connection not in self._waiting and kind_of(connection) is not None:
            self._waiting.add(connection)
            self._next_outlet().offer(connection)

    def _next_outlet(self) -> _Outlet:
        return next(one for one in self._turn if one in self._outlets)

    def take_out(self, connection: Any) -> Kind | None:
        """It is its turn: stop reading, if it still may go. What has become busy goes later."""
        return self._stop_reading(connection) if connection in self._waiting else None

    def _stop_reading(self, connection: Any) -> Kind | None:
        self._waiting.discard(connection)
        kind = kind_of(connection)
        if kind is not None:
            connection.transport.pause_reading()
            _stop_keep_alive(connection)
        return kind

    def put_back(self, batch: Batch) -> None:
        """These were not sent, or not taken: read here again, and offer them anew."""
        for connection, kind in batch:
            if not connection.transport.is_closing():
                connection.transport.resume_reading()
                if kind is Kind.IDLE:
                    _start_keep_alive(connection, self._loop)
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
        self._loop = asyncio.get_running_loop()
        self._first: deque[tuple[Any, Kind]] = deque()  # have just answered, and are not read now
        self._queue: deque[Any] = deque()  # are served until it is their turn
        self._under_way: dict[int, Batch] = {}
        self._numbers = itertools.count(1)
        self._flushing: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
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
                    self._channel, number, [(_fd(one.transport), kind) for one, kind in batch]
                )
            except OSError as error:
                self._mover.put_back(batch)
                if error.errno not in _LATER:
                    logger.warning("Connections stay here: %s", error)
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
            if not connection.transport.is_closing():  # by the app's end, or by a deadline
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
        logger.warning("The new instance has not taken connections in for %g s", _PATIENCE)
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
            connection.transport.abort()

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

    def __init__(self, path: Path, protocol_factory: Callable[[], asyncio.Protocol]) -> None:
        """Listens at once; `protocol_factory` makes the protocol of a connection."""
        self.received = 0
        self._path = path
        self._factory = protocol_factory
        self._loop = asyncio.get_running_loop()
        self._listener = connections.listen(path)
        self._channels: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:
            return
        try:
            connections.check(channel)
        except HotRestartError as error:
            logger.warning("Dropped a channel: %s", error)
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
            logger.warning("Connections cannot be taken in: %s", error)
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
        for one in arrivals:
            task = self._loop.create_task(self._take_in(one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take_in(self, arrival: Arrival) -> None:
        try:
            _, protocol = await self._loop.connect_accepted_socket(self._factory, arrival.sock)
        except (OSError, ValueError):  # its client has gone; it never was a connection
            arrival.sock.close()
            return
        self.received += 1
        if arrival.kind is Kind.IDLE:
            _start_keep_alive(protocol, self._loop)

    def _drop(self, channel: socket.socket) -> None:
        self._loop.remove_reader(channel.fileno())
        self._channels.remove(channel)
        channel.close()

    def close(self) -> None:
        """Take in nothing more; remove the path."""
        for channel in list(self._channels):
            self._drop(channel)
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)


def _fd(transport: Any) -> int:
    return int(transport.get_extra_info("socket").fileno())


def _stop_keep_alive(connection: Any) -> None:
    timer = connection.timeout_keep_alive_task
    if timer is not None:
        timer.cancel()
        connection.timeout_keep_alive_task = None


def _start_keep_alive(connection: Any, loop: asyncio.AbstractEventLoop) -> None:
    """As after an answer, unless the next request has already come."""
    if connection.timeout_keep_alive_task is None and kind_of(connection) is not None:
        connection.timeout_keep_alive_task = loop.call_later(
            connection.timeout_keep_alive, connection.timeout_keep_alive_handler
        )
