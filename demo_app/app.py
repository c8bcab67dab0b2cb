"""The demo app for uvicorn (ASGI, Starlette): every answer says which process gave it.

    cd demo_app && uvicorn app:app

Start it, start it again with DEMO_VERSION=2, and watch the pid and the version change.
To see what a failed deployment does, set DEMO_FAIL for the second start:

    import    raises while it is imported
    lifespan  raises in the startup of its lifespan
    hang      never finishes its import
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from hotrestart_plugins.starlette import health, until_drain

VERSION = os.environ.get("DEMO_VERSION", "1")
FAIL = os.environ.get("DEMO_FAIL", "")
SINCE = datetime.now(timezone.utc).isoformat(timespec="milliseconds")

if FAIL == "import":
    raise RuntimeError("DEMO_FAIL=import: this version cannot be imported")
if FAIL == "hang":
    threading.Event().wait()  # DEMO_FAIL=hang: for ever


class SaysWhoAnswered:
    """Count each request, and put X-Served-By on each answer."""

    requests = 0

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_pid(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                MutableHeaders(scope=message)["X-Served-By"] = str(os.getpid())
            await send(message)

        if scope["type"] in ("http", "websocket"):
            SaysWhoAnswered.requests += 1
        await self.app(scope, receive, send_with_pid)


def number(request: Request, name: str, default: float, most: float) -> float:
    """The query parameter `name`, from 0 to `most`."""
    try:
        return min(max(0.0, float(request.query_params.get(name, default))), most)
    except ValueError:
        raise HTTPException(400, f"{name} is not a number") from None


async def who(request: Request) -> JSONResponse:
    return JSONResponse(
        {
            "pid": os.getpid(),
            "version": VERSION,
            "since": SINCE,
            "requests": SaysWhoAnswered.requests,
            # The same for as long as the client's connection lives; none over a Unix socket.
            "client_port": request.client.port if request.client else None,
        }
    )


async def slow(request: Request) -> JSONResponse:
    await asyncio.sleep(number(request, "seconds", default=1, most=60))
    return await who(request)


async def upload(request: Request) -> JSONResponse:
    size, digest = 0, hashlib.sha256()
    async for piece in request.stream():
        size += len(piece)
        digest.update(piece)
    return JSONResponse({"pid": os.getpid(), "bytes": size, "sha256": digest.hexdigest()})


async def events(request: Request) -> StreamingResponse:
    """Server-sent events, ten a second: without ?count=N until this instance is replaced."""
    endless = "count" not in request.query_params
    count = int(number(request, "count", default=0, most=1_000_000))

    async def stream() -> AsyncIterator[str]:
        for event in itertools.count() if endless else range(count):
            yield f"data: {json.dumps({'pid': os.getpid(), 'event': event})}\n\n"
            await asyncio.sleep(0.1)

    source = until_drain(stream(), last="event: bye\ndata: {}\n\n") if endless else stream()
    return StreamingResponse(source, media_type="text/event-stream")


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(f"{os.getpid()} {await websocket.receive_text()}")
    except WebSocketDisconnect:
        pass


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    if FAIL == "lifespan":
        raise RuntimeError("DEMO_FAIL=lifespan: this version cannot start")
    yield


app = Starlette(
    routes=[
        Route("/", who),
        Route("/slow", slow),
        Route("/upload", upload, methods=["POST"]),
        Route("/events", events),
        Route("/health", health),
        WebSocketRoute("/ws", echo),
    ],
    middleware=[Middleware(SaysWhoAnswered)],
    lifespan=lifespan,
)
