"""How the connections of a draining uvicorn server end."""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet
from typing import Any

from uvicorn.server import ServerState

from hotrestart_plugins.draining.event_streams import EventStream, EventStreams
from hotrestart_plugins.draining.stagger import StaggeredClose
from hotrestart_plugins.draining.stats import DrainStats

_NO_ERROR = 0  # RFC 9113 section 7
_MOST_STREAM = 2**31 - 1  # a GOAWAY that only says 'no new ones, please', RFC 9113 section 6.8


def is_websocket(connection: Any) -> bool:
    """HTTP connections have a request cycle, or several; WebSockets have none.

    One that has not said yet whether it is HTTP/1.1 or HTTP/2 has a timeout of its own instead.
    """
    return not any(hasattr(connection, name) for name in ("cycle", "cycles", "timeout_task"))


def is_idle(connection: Any) -> bool:
    """Whether the connection waits for a request. HTTP/2 too; a WebSocket never does."""
    if hasattr(connection, "cycles"):
        return not connection.cycles
    cycle = getattr(connection, "cycle", None)
    return not is_websocket(connection) and (cycle is None or cycle.response_complete)


def announce_close(connection: Any, header: tuple[bytes, bytes]) -> None:
    """Have the answer under way say that the connection closes, by `header` or by GOAWAY."""
    if hasattr(connection, "cycles"):  # HTTP/2: what is on its way is served all the same
        connection.conn.close(_NO_ERROR, _MOST_STREAM)
        connection.flush()
        return
    cycle = getattr(connection, "cycle", None)
    # A list of an earlier second, that uvicorn has replaced for later requests.
    if cycle is not None and not cycle.response_started and header not in cycle.default_headers:
        cycle.default_headers.append(header)


def close_after_response(connection: Any, header: tuple[bytes, bytes]) -> None:
    """Have the last answer that is awaited on this one connection say, by `header`, that it closes.

    What is sent behind that request is not answered here.
    """
    cycle = connection.cycle  # the last of those that wait, with httptools; h11 reads one at a time
    if cycle is not None and not cycle.response_started and header not in cycle.default_headers:
        cycle.default_headers = [*cycle.default_headers, header]


class DrainTracker:
    """The connections that were open when a drain began, and what becomes of them."""

    def __init__(self, state: ServerState, streams: EventStreams) -> None:
        """`streams`: those of the app's answers."""
        self._state = state
        self._streams = streams
        self._requests = state.total_requests
        # Whether an answer was under way, or which one was the last.
        self._then = {one: (is_idle(one), getattr(one, "cycle", None)) for one in state.connections}
        self._stats = DrainStats()
        self._staggered = StaggeredClose(self._long, self._end)
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: set[Any] = set()
        """The long-lived connections that were brought to their end."""

    def spread(self, left: float, whole: float) -> None:
        """With `left` of `whole` seconds to go, end as many of the long-lived as is due."""
        self._staggered.step(left, whole)

    def _long(self) -> list[Any]:
        return [
            one for one in self._state.connections if is_websocket(one) or self._streams_of(one)
        ]

    def _streams_of(self, connection: Any) -> list[EventStream]:
        """Event streams under way; HTTP/2 can have several."""
        if hasattr(connection, "cycles"):
            cycles = list(connection.cycles.values())
        else:
            cycles = [getattr(connection, "cycle", None)]
        found = (self._streams.of(one) for one in cycles)
        return [one for one in found if one is not None]

    def _end(self, connection: Any) -> None:
        if connection not in self._state.connections:
            return
        if is_websocket(connection):
            self.ended.add(connection)
            self._stats.websockets += 1
            connection.shutdown()
            return
        # In tasks, since a client that does not read holds its own up, and nobody else's.
        for stream in self._streams_of(connection):
            task = asyncio.get_running_loop().create_task(self._end_stream(connection, stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _end_stream(self, connection: Any, stream: EventStream) -> None:
        """Send its last chunk, so that the client sees the end of the stream and not a cut."""
        cycle: Any = stream.sender
        cycle.keep_alive = False
        await stream.end()
        if stream.ended:
            self.ended.add(connection)
            self._stats.streams += 1
            cycle.disconnected = True  # the app's receive() says that the client has gone

    def cancel(self) -> None:
        """The time is over: wait no more for clients that do not read."""
        for task in self._tasks:
            task.cancel()

    def stats(
        self, handed_over: AbstractSet[Any] = frozenset(), *, abort: bool = True
    ) -> DrainStats:
        """The account, as of now, less what was `handed_over`; `abort`: what is open is cut off."""
        stats = DrainStats(websockets=self._stats.websockets, streams=self._stats.streams)
        stats.handed_over = len(handed_over)
        stats.requests = self._state.total_requests - self._requests
        for one, (was_idle, cycle) in self._then.items():
            if one in self._state.connections or one in self.ended or one in handed_over:
                continue
            if was_idle and getattr(one, "cycle", None) is cycle:
                stats.idle += 1
            else:
                stats.finished += 1
        if not abort:
            return stats
        busy = 0
        for one in self._state.connections:
            if is_websocket(one):
                stats.aborted_websockets += one not in self.ended
                busy += one not in self.ended
            elif not is_idle(one):
                stats.aborted_requests += 1
                busy += 1
            elif one.transport.get_write_buffer_size():  # its client has yet to read the answer
                stats.aborted_requests += 1
            else:
                stats.aborted_idle += 1
        stats.aborted_tasks = max(0, len(self._state.tasks) - busy)
        return stats
