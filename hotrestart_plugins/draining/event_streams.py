"""Event streams of an ASGI app, which can be ended while the app still sends.

No server keeps the headers of an in-flight response. To end one, a wrapper must stand between the
app and the server from the first message of the response on.
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
    """The event streams in flight in one process."""

    def __init__(self) -> None:
        self._open: dict[int, EventStream] = {}  # by the id of its sender, else by its own id

    @property
    def active(self) -> list[EventStream]:
        """The streams that have started and are not complete."""
        return [stream for stream in self._open.values() if stream.active]

    def of(self, sender: object) -> EventStream | None:
        """Return the active stream that the server sends with this object, if any."""
        stream = self._open.get(id(sender))
        return stream if stream is not None and stream.active else None

    def wrap(self, app: App) -> App:
        """Return the app wrapped, so that its event streams are known here.

        Only answers to requests that accept an event stream are looked at.
        """

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
    """One response on its way from the app to the server, which may be an event stream."""

    def __init__(self, receive: Receive, send: Send) -> None:
        """`receive` and `send` are the server's."""
        self.receive = receive
        self.active = False
        """Whether it is an event stream in progress."""
        self.ended = False
        """Whether the last part was sent by `end`."""
        self._send = send
        self._turn = asyncio.Lock()

    @property
    def sender(self) -> object:
        """The server's object whose method sends the response; None if it is sent otherwise."""
        return getattr(self._send, "__self__", None)

    async def send(self, message: Message) -> None:
        """Pass a message of the app to the server; after `end`, drop it."""
        async with self._turn:
            if self.ended:
                return
            if message["type"] == "http.response.start":
                self.active = _lasts(message.get("headers", ()))
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                self.active = False
            await self._send(message)

    async def end(self) -> None:
        """Complete the response in the app's place, after the message that it is sending now.

        Waits for that message, without an end if the client has stopped reading: the caller
        needs a deadline.
        """
        async with self._turn:
            if self.active:
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                self.active = False
                self.ended = True


def _lasts(headers: Iterable[tuple[bytes | str, bytes | str]]) -> bool:
    pairs = [(_bytes(name).lower(), value) for name, value in headers]
    return _names(b"content-type", pairs) and all(name != b"content-length" for name, _ in pairs)


def _names(header: bytes, headers: Iterable[tuple[bytes | str, bytes | str]]) -> bool:
    return any(name == header and _EVENT_STREAM in _bytes(value).lower() for name, value in headers)


def _bytes(text: bytes | str) -> bytes:
    """Return a header's name or value as bytes: some apps send text, which gunicorn accepts."""
    return text.encode("latin-1") if isinstance(text, str) else bytes(text)
