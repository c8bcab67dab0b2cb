"""Event streams of an ASGI app, which can be brought to their end from outside.

gunicorn keeps no hold on a response that is under way: whoever is to end one has to stand between
the app and the server from its first message on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

_EVENT_STREAM = b"text/event-stream"


class EventStreams:
    """Those under way in one worker: answers to clients that accept an event stream."""

    def __init__(self) -> None:
        self._open: set[EventStream] = set()

    @property
    def under_way(self) -> list[EventStream]:
        """Begun, and not complete."""
        return [one for one in self._open if one.begun and not one.over]

    @property
    def lingering(self) -> int:
        """How many have been ended here, and their apps not yet noticed."""
        return sum(one.ended for one in self._open)

    def around(self, app: App) -> App:
        """The app whose event streams these are."""

        async def call(scope: dict[str, Any], receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not _accepts_events(scope):
                return await app(scope, receive, send)
            stream = EventStream(receive, send)
            self._open.add(stream)
            try:
                return await app(scope, stream.receive, stream.send)
            finally:
                self._open.discard(stream)

        return call


class EventStream:
    """One answer, between the app and the server."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._sending = False
        self._gone = asyncio.Event()
        self.begun = self.over = self.ended = False
        """Whether its headers were sent, its last part was, and that by `end`."""

    async def end(self) -> None:
        """Send the last part in the app's stead.

        To the app the client has gone: `receive` says so, and what it still sends goes nowhere.
        """
        if self.over:
            return
        self.ended = self.over = True
        self._gone.set()
        if not self._sending:
            await self._last_part()

    async def _last_part(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(self, message: Message) -> None:
        """As the server's, for the app."""
        if self.over:
            return
        self.begun = True
        self.over = message["type"] == "http.response.body" and not message.get("more_body")
        self._sending = True
        try:
            await self._send(message)
        finally:
            self._sending = False
        if self.ended:  # meanwhile
            await self._last_part()

    async def receive(self) -> Message:
        """As the server's, for the app."""
        asked = asyncio.ensure_future(self._receive())
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not self.ended:
                return await asked
        finally:
            asked.cancel()
            gone.cancel()
        return {"type": "http.disconnect"}


def _accepts_events(scope: dict[str, Any]) -> bool:
    return any(name == b"accept" and _EVENT_STREAM in value for name, value in scope["headers"])
