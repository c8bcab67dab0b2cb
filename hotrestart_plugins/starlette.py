"""For Starlette and what is built on it: streams that end with a drain, and a health check."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from hotrestart_plugins.app import drain

_T = TypeVar("_T")


async def until_drain(stream: AsyncIterable[_T], *, last: _T | None = None) -> AsyncIterator[_T]:
    """The items of `stream`, to its end or until this instance drains, whichever comes first.

    `last`, if not None, is sent when the drain ended it: an SSE ``retry:``, say. Closes `stream`.
    """
    iterator = stream.__aiter__()
    begun = asyncio.ensure_future(drain.begun())
    item: asyncio.Future[_T] | None = None
    try:
        while True:
            item = asyncio.ensure_future(iterator.__anext__())
            await asyncio.wait({item, begun}, return_when=asyncio.FIRST_COMPLETED)
            if not item.done():
                break
            try:
                yield item.result()
            except StopAsyncIteration:
                return
        if last is not None:
            yield last
    finally:
        begun.cancel()
        if item is not None and item.cancel():
            await asyncio.wait({item})
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()


async def health(_request: Request) -> Response:
    """An endpoint: 200 while this instance serves, 503 once it drains, so that proxies move on."""
    if drain.is_set():
        return PlainTextResponse("draining\n", 503, {"Retry-After": "1"})
    return PlainTextResponse("ok\n")
