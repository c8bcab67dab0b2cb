"""gunicorn's gevent workers, which make a server of gevent's for each listener."""

from __future__ import annotations

from typing import Any, Protocol

from gevent.baseserver import BaseServer
from gevent.server import StreamServer

from hotrestart_plugins.gunicorn._compat.workers import (
    GunicornWorker,
    Worker,
    replace_where_defined,
)


class RawGeventWorker(GunicornWorker, Protocol):
    """What is used of gunicorn's own object."""

    server_class: type[Any] | None


class GeventWorker(Worker[RawGeventWorker]):
    """A gevent worker, with a plain name for everything that is used of it."""

    @property
    def server_class(self) -> type[Any] | None:
        """The class of the servers that it will make; None: one that is not gevent's."""
        server_class = self.raw.server_class or StreamServer
        return server_class if issubclass(server_class, BaseServer) else None

    def use_server_class(self, server_class: type[Any]) -> None:
        """Have it make servers of that class."""
        if self.raw.server_class is None:
            replace_where_defined(type(self.raw), "StreamServer", StreamServer, server_class)
        else:
            self.raw.server_class = server_class
