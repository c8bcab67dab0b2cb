"""What this package uses of gunicorn's worker classes, and access to it for any of them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from hotrestart_plugins.core.events import Logger
from hotrestart_plugins.gunicorn._compat import interfaces
from hotrestart_plugins.gunicorn._compat.interfaces import Config
from hotrestart_plugins.gunicorn._compat.table import Feature, Name, missing

_WORKER = "gunicorn.workers.base.Worker"
_THREADS = "gunicorn.workers.gthread.ThreadWorker"
_THREAD_CONNECTION = "gunicorn.workers.gthread.TConn"
_GEVENT = "gunicorn.workers.ggevent.GeventWorker"
_TORNADO = "gunicorn.workers.gtornado.TornadoWorker"
_TORNADO_SERVER = "tornado.httpserver.HTTPServer"
_ASGI = "gunicorn.workers.gasgi.ASGIWorker"
_CONNECTION = "gunicorn.asgi.protocol.ASGIProtocol"
_WEBSOCKET = "gunicorn.asgi.websocket.WebSocketProtocol"

_ANY_WORKER = (
    Name(_WORKER, "notify", Feature.HOT_RESTART),
    Name(_WORKER, "init_signals", Feature.STOP_WHILE_STARTING),
)
_LOSES_MASTER = (Name(_WORKER, "ppid", Feature.LOSE_MASTER),)
_WSGI_WORKER = (
    Name("gunicorn.http", "get_parser", Feature.PROBE, "24.0"),
    Name("gunicorn.http.wsgi", "create", Feature.PROBE),
)
_ANNOUNCES_CLOSE = (Name("gunicorn.http.message.Message", "must_close", Feature.CLOSE, "22.0"),)


def _uvicorn_worker(module: str) -> tuple[Name, ...]:
    return (
        *_ANY_WORKER,
        Name(module, "Server", Feature.PAUSE),
        Name(f"{module}.UvicornWorker", "config", Feature.PAUSE),
        Name("gunicorn.sock.BaseSocket", "sock", Feature.PAUSE),
    )


BY_CLASS: Mapping[str, tuple[Name, ...]] = {
    "gunicorn.workers.sync.SyncWorker": (
        *_ANY_WORKER,
        *_WSGI_WORKER,
        Name(_WORKER, "PIPE", Feature.PAUSE),
        Name(_WORKER, "wait_fds", Feature.PAUSE),
    ),
    _THREADS: (
        *_ANY_WORKER,
        *_WSGI_WORKER,
        *_ANNOUNCES_CLOSE,
        Name(_THREADS, "worker_connections", Feature.PAUSE),
        Name(_THREADS, "nr_conns", Feature.PAUSE),
        Name(_THREADS, "poller", Feature.PAUSE),
        Name(_THREADS, "method_queue", Feature.PAUSE, "24.0"),
        Name("gunicorn.workers.gthread.PollableMethodQueue", "defer", Feature.PAUSE, "24.0"),
        Name(_THREADS, "wait_for_and_dispatch_events", Feature.PAUSE, "24.0"),
        Name(_THREADS, "murder_keepalived", Feature.PAUSE),
        Name(_THREADS, "handle_exit", Feature.PAUSE),
        Name(_THREADS, "_cap_keepalive", Feature.CLOSE, "27.0"),
        Name(_THREADS, "is_parent_alive", Feature.LOSE_MASTER),
        Name(_THREADS, "accept", Feature.LOSE_MASTER),
        Name(_THREADS, "_accepting", Feature.LOSE_MASTER, "24.0"),
        Name(_THREADS, "set_accept_enabled", Feature.PAUSE, "24.0"),
        Name(_THREADS, "finish_request", Feature.HANDOVER),
        Name(_THREADS, "keepalived_conns", Feature.HANDOVER, "24.0"),
        Name(_THREADS, "pending_conns", Feature.HANDOVER, "25.1"),
        Name(_THREADS, "on_client_socket_readable", Feature.HANDOVER, "21.2"),
        Name(_THREADS, "on_pending_socket_readable", Feature.HANDOVER, "25.1"),
        Name("gunicorn.workers.gthread", "TConn", Feature.HANDOVER),
        Name(_THREAD_CONNECTION, "sock", Feature.HANDOVER),
        Name(_THREAD_CONNECTION, "initialized", Feature.HANDOVER, "21.2"),
        Name(_THREAD_CONNECTION, "set_timeout", Feature.HANDOVER),
    ),
    _GEVENT: (
        *_ANY_WORKER,
        *_WSGI_WORKER,
        *_ANNOUNCES_CLOSE,
        *_LOSES_MASTER,
        Name(_WORKER, "PIPE", Feature.PAUSE),
        Name(_GEVENT, "server_class", Feature.PAUSE),
        Name("gunicorn.workers.ggevent", "StreamServer", Feature.PAUSE),
    ),
    _TORNADO: (
        *_ANY_WORKER,
        *_WSGI_WORKER,
        *_LOSES_MASTER,
        Name(_WORKER, "PIPE", Feature.PAUSE),
        Name(_TORNADO, "ioloop", Feature.PAUSE),
        Name(_TORNADO, "server", Feature.PAUSE),
        Name("tornado.tcpserver.TCPServer", "_handlers", Feature.PAUSE),
        Name("tornado.tcpserver.TCPServer", "_sockets", Feature.PAUSE),
        Name(_TORNADO_SERVER, "_connections", Feature.PAUSE),
        Name(_TORNADO_SERVER, "conn_params", Feature.CLOSE),
    ),
    _ASGI: (
        *_ANY_WORKER,
        Name("gunicorn.asgi.parser.CallbackRequest", "must_close", Feature.CLOSE),
        Name(_ASGI, "loop", Feature.PAUSE),
        Name(_ASGI, "servers", Feature.PAUSE),
        Name(_ASGI, "nr_conns", Feature.PAUSE),
        Name(_ASGI, "asgi", Feature.PAUSE),
        Name(_ASGI, "_shutdown", Feature.PAUSE),
        Name("gunicorn.sock.BaseSocket", "sock", Feature.PAUSE),
        Name(_ASGI, "_get_ssl_context", Feature.PAUSE),
        Name("gunicorn.workers.gasgi", "ASGIProtocol", Feature.PAUSE),
        Name("gunicorn.asgi.protocol", "ASGIProtocol", Feature.PAUSE),
        Name(_ASGI, "_serve", Feature.PROBE),
        Name("gunicorn.asgi.lifespan", "LifespanManager", Feature.PROBE),
        Name("gunicorn.asgi.lifespan", "LifespanStartupFailed", Feature.PROBE, "27.0"),
        Name(_CONNECTION, "transport", Feature.HANDOVER),
        Name(_CONNECTION, "reader", Feature.HANDOVER),
        Name(_CONNECTION, "req_count", Feature.HANDOVER),
        Name(_CONNECTION, "_closed", Feature.HANDOVER),
        Name(_CONNECTION, "_request_ready", Feature.HANDOVER, "26.0"),
        Name(_CONNECTION, "_awaiting_request", Feature.HANDOVER, "27.0"),
        Name(_CONNECTION, "_finishing_calls", Feature.HANDOVER, "27.0"),
        Name(_CONNECTION, "_reading_paused", Feature.HANDOVER, "25.3"),
        Name(_CONNECTION, "_resume_reading", Feature.HANDOVER, "25.3"),
        Name(_CONNECTION, "_feed_callback_parser", Feature.HANDOVER, "26.0"),
        Name(_CONNECTION, "_keepalive_handle", Feature.HANDOVER, "25.3"),
        Name(_CONNECTION, "_arm_keepalive_timer", Feature.HANDOVER, "25.3"),
        Name(_CONNECTION, "_cancel_keepalive_timer", Feature.HANDOVER, "25.3"),
        Name(_CONNECTION, "_start_http1", Feature.HANDOVER, "27.0"),
        Name(_CONNECTION, "_h2c_buffer", Feature.HANDOVER, "27.0"),
        Name(_CONNECTION, "_h2c_cancel_timer", Feature.HANDOVER, "27.0"),
        Name(_CONNECTION, "_h2c_undecided_timeout", Feature.HANDOVER, "27.0"),
        Name(_CONNECTION, "_websocket", Feature.END_LONG_CONNECTIONS),
        Name(_CONNECTION, "_close_transport", Feature.END_LONG_CONNECTIONS),
        Name(_WEBSOCKET, "accepted", Feature.END_LONG_CONNECTIONS),
        Name(_WEBSOCKET, "closed", Feature.END_LONG_CONNECTIONS),
        Name(_WEBSOCKET, "_send_close", Feature.END_LONG_CONNECTIONS),
        Name("gunicorn.asgi.protocol.BodyReceiver", "protocol", Feature.END_LONG_CONNECTIONS),
    ),
    "uvicorn_worker._workers.UvicornWorker": _uvicorn_worker("uvicorn_worker._workers"),
    "uvicorn.workers.UvicornWorker": _uvicorn_worker("uvicorn.workers"),
}
"""What `hotrestart_plugins.gunicorn.adapters` uses of each worker class."""

NAMES = tuple(dict.fromkeys(name for names in BY_CLASS.values() for name in names))
"""All of that, each row once."""


def known_class(worker_class: type) -> str:
    """The dotted path of the known class that it is, or is derived from; '' for any other."""
    paths = (f"{base.__module__}.{base.__qualname__}" for base in worker_class.__mro__)
    return next((path for path in paths if path in BY_CLASS), "")


@functools.cache
def missing_in(worker_class: type) -> Mapping[Feature, Sequence[Name]]:
    """What a known worker class lacks, by what needs it; nothing for a class that is not known.

    Looked up once: workers inherit what the master has found.
    """
    return missing(BY_CLASS.get(known_class(worker_class), ()))


class GunicornWorker(interfaces.Worker, Protocol):
    """What is used of a worker of any class."""

    alive: bool
    sockets: list[Any]
    wsgi: Any
    ppid: int
    PIPE: Sequence[int]
    notify: Callable[[], None]
    init_signals: Callable[[], None]


WorkerT = TypeVar("WorkerT", bound=GunicornWorker)


class Worker(Generic[WorkerT]):
    """A worker, with a plain name for everything that is used of it."""

    def __init__(self, worker: WorkerT) -> None:
        self.raw = worker
        """The worker itself: for what every worker class documents."""

    @property
    def cfg(self) -> Config:
        """Its settings."""
        return self.raw.cfg

    @property
    def log(self) -> Logger:
        """Its logger."""
        return self.raw.log

    @property
    def alive(self) -> bool:
        """Whether it has not been told to end. Setting it to False makes the worker's loop end."""
        return self.raw.alive

    @alive.setter
    def alive(self, alive: bool) -> None:
        self.raw.alive = alive

    @property
    def listeners(self) -> list[Any]:
        """The socket objects of gunicorn; gevent's sockets in a gevent worker."""
        return self.raw.sockets

    @property
    def app(self) -> Any:
        """The WSGI app, of a class that serves one."""
        return self.raw.wsgi

    @property
    def signal_pipe(self) -> int:
        """The descriptor of the pipe into which Python writes the number of each signal."""
        return self.raw.PIPE[0]

    def on_first_heartbeat(self, callback: Callable[[], None]) -> None:
        """Call `callback` after the first heartbeat, which comes once the worker can serve."""
        worker = self.raw

        def notify() -> None:
            del worker.notify
            worker.notify()
            callback()

        worker.notify = notify

    def before_each_heartbeat(self, callback: Callable[[], None]) -> None:
        """Call `callback` right before each heartbeat from now on."""
        worker = self.raw
        beat = worker.notify

        def notify() -> None:
            callback()
            beat()

        worker.notify = notify

    def around_signals(self, around: Callable[[Callable[[], None]], None]) -> None:
        """Call `around` with gunicorn's `init_signals` when the worker sets its handlers."""
        self.raw.init_signals = functools.partial(around, self.raw.init_signals)

    def accept_new_parent(self) -> None:
        """Keep gunicorn from noticing that the master has ended: it would end at once."""
        self.raw.ppid = os.getppid()


def replace_where_defined(
    worker_class: type, name: str, original: object, replacement: object
) -> None:
    """Replace `name` in each module that defines the worker class or a base of it.

    A method of the class looks the name up in its own module.
    """
    for base in worker_class.__mro__:
        module = sys.modules.get(base.__module__)
        if module is not None and vars(module).get(name) is original:
            setattr(module, name, replacement)


class Request(Protocol):
    """A request that gunicorn has read."""

    must_close: bool


def close_after_response(request: Request) -> None:
    """Have gunicorn answer the request with ``Connection: close``."""
    request.must_close = True


def answer_status(worker: GunicornWorker, request: bytes) -> int:
    """The status with which the worker's WSGI app answers; its response is dropped."""
    import socket  # noqa: PLC0415 (gevent may patch it before this is needed)

    from gunicorn import http  # noqa: PLC0415 (the master has no use for them)
    from gunicorn.http import wsgi  # noqa: PLC0415

    server_side, client_side = socket.socketpair()
    with client_side, server_side:
        client_side.sendall(request)
        client, server = ("127.0.0.1", 0), worker.sockets[0].getsockname()
        parsed = next(http.get_parser(worker.cfg, server_side, client))
        response, environ = wsgi.create(parsed, server_side, client, server, worker.cfg)
        body = worker.wsgi(environ, response.start_response)
        try:
            for _ in body:
                pass
        finally:
            if hasattr(body, "close"):
                body.close()
        return int(response.status_code or 0)
