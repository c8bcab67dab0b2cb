"""A FastAPI app: with a lifespan, a dependency, a page, and a body that is checked."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Response
from pydantic import BaseModel, Field

started: list[int] = []


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    started.append(os.getpid())
    yield
    started.clear()


def says_who_answered(response: Response) -> None:
    """What the load client needs."""
    response.headers["X-Served-By"] = str(*started)


app = FastAPI(lifespan=lifespan, dependencies=[Depends(says_who_answered)])


class Greeting(BaseModel):
    """One field, which is needed."""

    name: Annotated[str, Field(max_length=50)]


@app.get("/")
async def who() -> dict[str, int]:
    return {"pid": os.getpid()}


@app.post("/greet")
def greet(greeting: Greeting) -> dict[str, str]:
    """In a thread, as FastAPI does with plain functions."""
    return {"said": f"Hello, {greeting.name}"}
