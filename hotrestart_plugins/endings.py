"""How the connections of a draining uvicorn server end."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from uvicorn.server import ServerState

from hotrestart_plugins.tally import Tally

SPREAD = 0.2  # the last part of a drain, over which long-lived connections are ended
MOST_SPREAD = 10.0  # seconds; a longer one helps no client

_NO_ERROR = 0  # RFC 9113 section 7
_MOST_STREAM = 2**31 - 1  # a GOAWAY that only says 'no new ones, please', RFC 9113 section 6.8
_EVENT_STREAM = b"text/event-stream"


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


def ask_to_leave(connection: Any, header: tuple[bytes, bytes]) -> None:
    """Have the answer under way say that the connection closes, by `header` or by GOAWAY."""
    if hasattr(connection, "cycles"):  # HTTP/2: what is on its way is served all the same
        connection.conn.close(_NO_ERROR, _MOST_STREAM)
        connection.flush()
        return
    cycle = getattr(connection, "cycle", None)
    # A list of an earlier second, that uvicorn has replaced for later requests.
    if cycle is not None and not cycle.response_started and header not in cycle.default_headers:
        cycle.default_headers.append(header)


class Endings:
    """The connections that were open when a drain began, and what becomes of them."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._requests = state.total_requests
        # Whether an answer was under way, or which one was the last.
        self._then = {one: (is_idle(one), getattr(one, "cycle", None)) for one in state.connections}
        self._tally = Tally()
        self._long: list[Any] | None = None
        self.ended: set[Any] = set()
        """The long-lived connections that were brought to their end."""

    async def spread(self, left: float, whole: float) -> None:
        """With `left` of `whole` seconds to go, end as many of the long-lived as is due."""
        spread = min(whole * SPREAD, MOST_SPREAD)
        if left > spread:
            return
        if self._long is None:
            self._long = [one for one in self._state.connections if _is_long(one)]
        # The last quarter is the apps', to notice and to end.
        part = min(1.0, (spread - left) / (spread * 0.75)) if spread else 1.0
        due = round(len(self._long) * part)
        for one in self._long[len(self.ended) : max(due, 1)]:
            self.ended.add(one)
            if one in self._state.connections:
                await self._end(one)

    async def _end(self, connection: Any) -> None:
        if is_websocket(connection):
            self._tally.websockets += 1
            connection.shutdown()
            return
        # Its last chunk, so that the client sees the end of the stream and not a cut; the app's
        # receive() then says that the client has gone.
        for cycle in _event_streams(connection):
            self._tally.streams += 1
            cycle.keep_alive = False
            await cycle.send({"type": "http.response.body", "body": b"", "more_body": False})
            cycle.disconnected = True  # what the app sends until it has heard goes nowhere

    def tally(self, moved: AbstractSet[Any] = frozenset(), *, cut: bool = True) -> Tally:
        """The account, as of now, less what was `moved`; `cut`: what is open is cut off."""
        tally = Tally(websockets=self._tally.websockets, streams=self._tally.streams)
        tally.moved = len(moved)
        tally.requests = self._state.total_requests - self._requests
        for one, (was_idle, cycle) in self._then.items():
            if one in self._state.connections or one in self.ended or one in moved:
                continue
            if was_idle and getattr(one, "cycle", None) is cycle:
                tally.idle += 1
            else:
                tally.finished += 1
        if not cut:
            return tally
        for one in self._state.connections:
            if is_websocket(one):
                tally.cut_websockets += one not in self.ended
            elif is_idle(one):
                tally.cut_idle += 1
            else:
                tally.cut_requests += 1
        busy = tally.cut_requests + tally.cut_websockets
        tally.cut_tasks = max(0, len(self._state.tasks) - busy)
        return tally


def _is_long(connection: Any) -> bool:
    """Whether it lasts until somebody ends it: a WebSocket, or an event stream under way."""
    return is_websocket(connection) or bool(_event_streams(connection))


def _event_streams(connection: Any) -> list[Any]:
    """Its requests whose answers are event streams, and under way; HTTP/2 can have several."""
    if hasattr(connection, "cycles"):
        cycles = list(connection.cycles.values())
    else:
        cycles = [getattr(connection, "cycle", None)]
    return [one for one in cycles if one is not None and _is_event_stream(one)]


def _is_event_stream(cycle: Any) -> bool:
    if cycle.response_complete or not cycle.response_started:
        return False
    accepted = (value for name, value in cycle.scope["headers"] if name == b"accept")
    return any(_EVENT_STREAM in value for value in accepted)
