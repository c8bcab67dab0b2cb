"""The inside of uvicorn's command."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import click

# Not by `from uvicorn import main`: the package hides its module behind its command.
_main: Any = importlib.import_module("uvicorn.main")


def command() -> click.Command:
    """Return uvicorn's own command."""
    found: click.Command = _main.main
    return found


@contextlib.contextmanager
def run_replaced_by(run: Callable[..., None]) -> Iterator[None]:
    """Have uvicorn's command call `run` with what it has made of its options."""
    original = _main.run
    _main.run = run
    try:
        yield
    finally:
        _main.run = original
