"""A Starlette app that imports nothing of ours, for what a start costs.

The demo's app would bring our code into the plain server, too.
"""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def who(_request: Request) -> JSONResponse:
    """Who answered."""
    return JSONResponse({"pid": os.getpid()}, headers={"X-Served-By": str(os.getpid())})


app = Starlette(routes=[Route("/", who)])
