"""How the connections of a draining uvicorn server end."""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet

import uvicorn

from hotrestart_plugins.draining.event_streams import EventStream, EventStreams
from hotrestart_plugins.draining.stagger import StaggeredClose
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.uvicorn._compat.connections import (
    Connection,
    Connections,
    end_after_last_chunk,
    tell_app_of_disconnect,
)
from hotrestart_plugins.uvicorn._compat.server import answered, open_connections, open_tasks


class DrainTracker:
    """The connections that were open when a drain began, and what becomes of them."""

    def __init__(
        self, server: uvicorn.Server, connections: Connections, streams: EventStreams
    ) -> None:
        """`streams`: those of the app's answers."""
        self._server = server
        self._open = open_connections(server)
        self._is = connections
        self._streams = streams
        self._answered = answered(server)
        # Whether an answer was in flight, or which one was the last.
        self._then = {
            connection: (connections.is_idle(connection), connections.last_cycle(connection))
            for connection in self._open
        }
        self._stats = DrainStats()
        self._staggered = StaggeredClose(self._long, self._end)
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: set[Connection] = set()
        """The long-lived connections that were brought to their end."""

    def spread(self, left: float, whole: float) -> None:
        """End as many long-lived connections as is due when `left` of `whole` seconds remain."""
        self._staggered.step(left, whole)

    def _long(self) -> list[Connection]:
        return [
            connection
            for connection in self._open
            if self._is.is_websocket(connection) or self._streams_of(connection)
        ]

    def _streams_of(self, connection: Connection) -> list[EventStream]:
        """The event streams in flight on it; HTTP/2 can have several."""
        found = (self._streams.of(sender) for sender in self._is.senders(connection))
        return [stream for stream in found if stream is not None]

    def _end(self, connection: Connection) -> None:
        if connection not in self._open:
            return
        if self._is.is_websocket(connection):
            self.ended.add(connection)
            self._stats.websockets += 1
            self._is.shut_down(connection)
            return
        # In tasks, since a client that does not read holds its own up, and nobody else's.
        for stream in self._streams_of(connection):
            task = asyncio.get_running_loop().create_task(self._end_stream(connection, stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _end_stream(self, connection: Connection, stream: EventStream) -> None:
        """Send its last chunk, so that the client sees the end of the stream and not a cut."""
        end_after_last_chunk(stream.sender)
        await stream.end()
        if stream.ended:
            self.ended.add(connection)
            self._stats.streams += 1
            tell_app_of_disconnect(stream.sender)

    def cancel(self) -> None:
        """Stop waiting for clients that do not read: the time is over."""
        for task in self._tasks:
            task.cancel()

    def stats(
        self, handed_over: AbstractSet[Connection] = frozenset(), *, abort: bool = True
    ) -> DrainStats:
        """Return the counts as of now. `abort`: what is open, and not `handed_over`, is cut off."""
        stats = DrainStats(websockets=self._stats.websockets, streams=self._stats.streams)
        stats.handed_over = len(handed_over)
        stats.requests = answered(self._server) - self._answered
        for connection, (was_idle, cycle) in self._then.items():
            if connection in self._open or connection in self.ended or connection in handed_over:
                continue
            if was_idle and self._is.last_cycle(connection) is cycle:
                stats.idle += 1
            else:
                stats.finished += 1
        if not abort:
            return stats
        busy = 0
        for connection in self._open:
            if self._is.is_websocket(connection):
                stats.aborted_websockets += connection not in self.ended
                busy += connection not in self.ended
            elif not self._is.is_idle(connection):
                stats.aborted_requests += 1
                busy += 1
            elif self._is.unwritten(connection):  # its client has yet to read the answer
                stats.aborted_requests += 1
            else:
                stats.aborted_idle += 1
        stats.aborted_tasks = max(0, len(open_tasks(self._server)) - busy)
        return stats
