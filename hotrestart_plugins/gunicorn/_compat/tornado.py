"""gunicorn's tornado worker, and the server of tornado's that it makes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol, cast

from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop

from hotrestart_plugins.gunicorn._compat.workers import GunicornWorker, Worker


class RawTornadoWorker(GunicornWorker, Protocol):
    """What is used of gunicorn's own object."""

    ioloop: IOLoop
    server: object


class _ConnectionParameters(Protocol):
    no_keep_alive: bool


class _Server(Protocol):
    _connections: Collection[object]
    _handlers: dict[int, Callable[[], None]]
    _sockets: dict[int, object]
    conn_params: _ConnectionParameters

    def add_sockets(self, sockets: Any) -> None: ...


class TornadoWorker(Worker[RawTornadoWorker]):
    """A tornado worker, with a plain name for everything that is used of it."""

    @property
    def loop(self) -> IOLoop:
        """Its loop; from the first heartbeat on."""
        return self.raw.ioloop

    @property
    def server(self) -> TornadoServer | None:
        """Its server, if it is tornado's; from the first heartbeat on.

        A class derived from gunicorn's may have another server, or none.
        """
        server = vars(self.raw).get("server")
        return TornadoServer(cast("_Server", server)) if isinstance(server, HTTPServer) else None


class TornadoServer:
    """An HTTP server of tornado's, with a plain name for everything that is used of it."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._keeps_alive = True

    @property
    def open_connections(self) -> int:
        """The number of connections that are open."""
        return len(self._server._connections)  # noqa: SLF001

    def remove_listeners(self) -> None:
        """Stop accepting. Does what `HTTPServer.stop` does, but leaves the listeners open."""
        server = self._server
        for remove in server._handlers.values():  # noqa: SLF001
            remove()
        server._handlers.clear()  # noqa: SLF001
        server._sockets.clear()  # noqa: SLF001

    def add_listeners(self, listeners: list[Any]) -> None:
        """Accept on these."""
        self._server.add_sockets(listeners)

    def announce_close(self) -> None:
        """Answer each further request with ``Connection: close``."""
        parameters = self._server.conn_params  # all connections share them
        self._keeps_alive = not parameters.no_keep_alive
        parameters.no_keep_alive = True

    def keep_alive(self) -> None:
        """Undo `announce_close`."""
        self._server.conn_params.no_keep_alive = not self._keeps_alive
