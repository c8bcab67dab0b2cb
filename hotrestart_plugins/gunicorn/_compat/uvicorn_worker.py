"""uvicorn's worker for gunicorn: the uvicorn-worker package's, or uvicorn's own."""

from __future__ import annotations

import socket
from typing import Any, Protocol, cast

import uvicorn

from hotrestart_plugins.gunicorn._compat.workers import (
    GunicornWorker,
    Worker,
    replace_where_defined,
)


class RawUvicornWorker(GunicornWorker, Protocol):
    """What is used of gunicorn's own object."""

    config: uvicorn.Config


class UvicornWorker(Worker[RawUvicornWorker]):
    """uvicorn's worker, with a plain name for everything that is used of it."""

    @property
    def uvicorn_config(self) -> uvicorn.Config:
        """The configuration with which it will make its server."""
        return self.raw.config

    def use_server_class(self, server_class: type[uvicorn.Server]) -> None:
        """Have it make a server of that class."""
        replace_where_defined(type(self.raw), "Server", uvicorn.Server, server_class)


def plain_socket(listener: Any) -> socket.socket:
    """The socket of one of gunicorn's listeners, which stays its owner."""
    return cast("socket.socket", listener.sock)
