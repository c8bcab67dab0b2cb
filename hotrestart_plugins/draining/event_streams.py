"""Event streams of an ASGI app, which can be brought to their end from outside.

No server keeps the headers of a response that is under way: whoever is to end one has to stand
between the app and the server from its first message on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]

_EVENT_STREAM = b"text/event-stream"


class EventStreams:
    """Those under way in one process."""

    def __init__(self) -> None:
        self._open: dict[int, EventStream] = {}  # by the identity of what sends it, or its own

    @property
    def active(self) -> list[EventStream]:
        """Begun, and not complete."""
        return [one for one in self._open.values() if one.active]

    def of(self, sender: object) -> EventStream | None:
        """The one under way that the server sends with this object, if there is one."""
        stream = self._open.get(id(sender))
        return stream if stream is not None and stream.active else None

    def wrap(self, app: App) -> App:
        """The app whose event streams these are; of requests that accept one."""

        async def call(scope: dict[str, Any], receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not _names(b"accept", scope["headers"]):
                return await app(scope, receive, send)
            stream = EventStream(receive, send)
            key = id(stream.sender or stream)
            self._open[key] = stream
            try:
                return await app(scope, receive, stream.send)
            finally:
                del self._open[key]

        return call


class EventStream:
    """One answer on its way from the app to the server, if it turns out to be an event stream."""

    def __init__(self, receive: Receive, send: Send) -> None:
        """`receive` and `send` are the server's."""
        self.receive = receive
        self.active = False
        """Whether it is an event stream, and its last part has still to come."""
        self.ended = False
        """Whether the last part was sent by `end`."""
        self._send = send
        self._turn = asyncio.Lock()

    @property
    def sender(self) -> object:
        """What the server sends it with, if `send` is a method of that; else None."""
        return getattr(self._send, "__self__", None)

    async def send(self, message: Message) -> None:
        """As the server's, for the app; after `end` it goes nowhere."""
        async with self._turn:
            if self.ended:
                return
            if message["type"] == "http.response.start":
                self.active = _lasts(message.get("headers", ()))
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                self.active = False
            await self._send(message)

    async def end(self) -> None:
        """Send the last part in the app's stead, behind what it is sending now.

        Takes as long as that; for ever, where the client has stopped reading.
        """
        async with self._turn:
            if self.active:
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                self.active = False
                self.ended = True


def _lasts(headers: Iterable[tuple[Any, Any]]) -> bool:
    pairs = [(_bytes(name).lower(), value) for name, value in headers]
    return _names(b"content-type", pairs) and all(name != b"content-length" for name, _ in pairs)


def _names(header: bytes, headers: Iterable[tuple[Any, Any]]) -> bool:
    return any(name == header and _EVENT_STREAM in _bytes(value).lower() for name, value in headers)


def _bytes(text: Any) -> bytes:
    """Some apps send their headers as text, which gunicorn lets pass."""
    return text.encode("latin-1") if isinstance(text, str) else bytes(text)
