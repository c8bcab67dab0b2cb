"""A uvicorn server that can stop accepting, drain, and accept again.

uvicorn's own shutdown closes idle connections under requests that are on their way and drops what
it had accepted and not read (uvicorn#2757, #3023). Here a listener is let go without losing what
it had accepted, and each open connection is answered once more, with ``Connection: close``.

Used by the launcher, by its workers, and by gunicorn's uvicorn worker.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import uvicorn
from uvicorn.server import ServerState

CLOSE = (b"connection", b"close")
_LOOK = 0.1  # seconds between two looks at what is still open; uvicorn's own pace

logger = logging.getLogger("uvicorn.error")


class DrainingServer(uvicorn.Server):
    """A `uvicorn.Server` whose listeners can be let go and taken up again."""

    on_created: ClassVar[Callable[[DrainingServer], None] | None] = None
    """Called with each new instance, for whoever does not make it himself."""

    drain_timeout = 60.0
    """Seconds that a drain may take where uvicorn's --timeout-graceful-shutdown says nothing."""

    drain_on_stop = True
    """Whether a plain stop takes the care of a drain, too."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.paused = False
        self._listeners: list[socket.socket] = []
        self._drain_deadline: float | None = None
        if self.on_created is not None:
            type(self).on_created(self)  # type: ignore[misc]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; WebSocket handshakes are kept from the headers of a drain."""
        if self.config.ws_protocol_class is not None:
            self.config.ws_protocol_class = functools.partial(  # type: ignore[assignment]
                _websocket, self.config.ws_protocol_class
            )
        await super().startup(sockets=sockets)
        if self.started:
            self._listeners = list(sockets or _listeners_of(self.servers))

    # -- accepting -----------------------------------------------------------------------------

    async def pause(self) -> None:
        """Accept nothing from now on; what was accepted is kept, and closed after its answer.

        Duplicates of the listeners stay open, so that `resume` can accept on them again.
        """
        if self.paused or not self.started:
            return
        self.paused = True
        loop = asyncio.get_running_loop()
        kept = [socket.socket(fileno=os.dup(one.fileno())) for one in self._listeners]
        if isinstance(loop, asyncio.SelectorEventLoop):
            # Server.close() loses a connection whose accept is done and whose transport is not
            # yet made (cpython#109564): stop accepting first, and let what is under way finish.
            for one in self._listeners:
                loop.remove_reader(one.fileno())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        self.servers = []
        self._listeners = kept
        self._announce_close()

    async def resume(self) -> None:
        """Accept again, after `pause`."""
        if not self.paused:
            return
        self.paused = False
        self._drain_deadline = None
        self.config.encoded_headers = [
            header for header in self.config.encoded_headers if header != CLOSE
        ]
        headers = self.server_state.default_headers
        headers[:] = [header for header in headers if header != CLOSE]
        loop = asyncio.get_running_loop()
        for one in self._listeners:
            self.servers.append(
                await loop.create_server(
                    self._protocol, sock=one, ssl=self.config.ssl, backlog=self.config.backlog
                )
            )

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _announce_close(self) -> None:
        """Have every answer from now on carry ``Connection: close``: all parsers honour it."""
        # Once a second uvicorn makes its default headers anew from these.
        self.config.encoded_headers = [*self.config.encoded_headers, CLOSE]
        # Responses under way hold this very list.
        self.server_state.default_headers.append(CLOSE)

    # -- draining ------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> bool:
        """Pause, then wait until nothing is open, `seconds` at most; whether that is so."""
        await self.pause()
        deadline = time.monotonic() + seconds
        if self._drain_deadline is None:
            self._drain_deadline = deadline
        while self._open() and not self.force_exit:
            if time.monotonic() >= min(deadline, self._drain_deadline):
                return False
            await asyncio.sleep(_LOOK)
        return True

    def _open(self) -> int:
        return len(self.server_state.connections) + len(self.server_state.tasks)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain where that is due, then as uvicorn's."""
        if (self.paused or self.drain_on_stop) and not await self.drain(self._patience()):
            self._warn_of_the_rest()
            # What a drain had time for has had it: uvicorn would wait again, without an end.
            self.config.timeout_graceful_shutdown = 0
        if self.paused:
            for one in self._listeners:
                one.close()
        await super().shutdown(sockets)

    def _patience(self) -> float:
        if self._drain_deadline is not None:
            return max(0.0, self._drain_deadline - time.monotonic())
        timeout = self.config.timeout_graceful_shutdown
        return self.drain_timeout if timeout is None else float(timeout)

    def _warn_of_the_rest(self) -> None:
        requests = sockets = idle = 0
        for connection in self.server_state.connections:
            cycle = getattr(connection, "cycle", None)
            if not hasattr(connection, "cycle"):
                sockets += 1
            elif cycle is None or cycle.response_complete:
                idle += 1
            else:
                requests += 1
        logger.warning(
            "The drain timeout is over: cutting off %d requests, %d WebSockets, %d idle "
            "connections, %d background tasks",
            requests,
            sockets,
            idle,
            max(0, len(self.server_state.tasks) - requests - sockets),
        )


def _listeners_of(servers: Sequence[asyncio.AbstractServer]) -> list[Any]:
    return [one for server in servers for one in getattr(server, "sockets", ())]


def _websocket(
    protocol_class: Callable[..., asyncio.Protocol], *args: Any, **kwargs: Any
) -> asyncio.Protocol:
    """Make the WebSocket protocol; a 101 must not say that the connection closes."""
    state: ServerState = kwargs["server_state"]
    if CLOSE in state.default_headers:
        state = copy.copy(state)
        state.default_headers = [header for header in state.default_headers if header != CLOSE]
        kwargs["server_state"] = state
    return protocol_class(*args, **kwargs)
