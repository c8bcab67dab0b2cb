"""gunicorn's gthread worker, whose main thread accepts and keeps the connections that wait.

That thread runs a loop of its own: it waits for readable descriptors, calls what belongs to each,
and closes the connections whose time is over.
"""

from __future__ import annotations

import functools
import select
import selectors
import signal
import socket
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from gunicorn.workers import gthread

from hotrestart_plugins.gunicorn._compat.workers import GunicornWorker, Worker
from hotrestart_plugins.handover.frames import ConnectionState

_EVERY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104  # not to bind to
_NO_CONNECTIONS = -1  # less than any number of connections that a gthread worker can have


class ThreadConnection(Protocol):
    """A connection of a gthread worker."""

    sock: socket.socket
    initialized: bool

    def set_timeout(self) -> None:
        """Close it when the keep-alive time is over, counted from now."""


class _Queue(Protocol):
    def defer(self, callback: Callable[..., object], *args: object) -> None: ...


class RawThreadWorker(GunicornWorker, Protocol):
    """What is used of gunicorn's own object."""

    worker_connections: int
    nr_conns: int
    keepalived_conns: deque[ThreadConnection]
    pending_conns: deque[ThreadConnection]
    poller: selectors.BaseSelector
    method_queue: _Queue
    wait_for_and_dispatch_events: Callable[..., object]
    murder_keepalived: Callable[..., object]
    finish_request: Callable[[ThreadConnection, Any], object]
    is_parent_alive: Callable[[], bool]
    _cap_keepalive: Callable[..., object]
    _accepting: bool

    def accept(self, listener: Any) -> None: ...

    def set_accept_enabled(self, enabled: bool) -> None: ...  # noqa: FBT001 (gunicorn's own)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None: ...

    def on_client_socket_readable(self, conn: ThreadConnection, client: socket.socket) -> None: ...

    def on_pending_socket_readable(self, conn: ThreadConnection, client: socket.socket) -> None: ...


class GthreadWorker(Worker[RawThreadWorker]):
    """A gthread worker, with a plain name for everything that is used of it."""

    def __init__(self, worker: RawThreadWorker) -> None:
        super().__init__(worker)
        self._limit = worker.worker_connections
        self._listener_names = [listener.getsockname() for listener in worker.sockets]

    @property
    def open_connections(self) -> int:
        """The number of connections that are open."""
        return self.raw.nr_conns

    # -- its loop ------------------------------------------------------------------------------

    def around_each_turn(
        self,
        wait: Callable[[Callable[[float], object], float], object],
        before_deadlines: Callable[[], object],
    ) -> None:
        """Call `wait` in the place of the loop's wait, with that and the longest time to wait.

        Call `before_deadlines` after the calls of each turn, before connections are closed whose
        time is over.
        """
        worker = self.raw
        gunicorns_wait, look = worker.wait_for_and_dispatch_events, worker.murder_keepalived

        def wait_for_and_dispatch_events(timeout: float) -> None:
            wait(gunicorns_wait, timeout)

        def murder_keepalived(*args: Any, **kwargs: Any) -> None:
            before_deadlines()
            look(*args, **kwargs)

        worker.wait_for_and_dispatch_events = wait_for_and_dispatch_events
        worker.murder_keepalived = murder_keepalived

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Call back from the loop whenever `fd` is readable."""
        self.raw.poller.register(fd, selectors.EVENT_READ, lambda _: callback())

    def remove_reader(self, fd: int) -> None:
        """Undo `add_reader`."""
        self.raw.poller.unregister(fd)

    def wake(self) -> None:
        """Have the loop turn once more, from a signal handler or another thread."""
        self.raw.method_queue.defer(_nothing)

    # -- accepting -----------------------------------------------------------------------------

    def leave_listeners_alone(self) -> None:
        """Have the loop find, when it turns next, that it has too many connections to accept."""
        self.raw.worker_connections = _NO_CONNECTIONS
        # gunicorn's stop would close what waits for its next request after two seconds.
        self.raw._cap_keepalive = _nothing  # noqa: SLF001

    def wait_on_listeners(self) -> None:
        """Undo `leave_listeners_alone`."""
        self.raw.worker_connections = self._limit
        del self.raw._cap_keepalive  # noqa: SLF001

    @property
    def leaves_listeners_alone(self) -> bool:
        """Whether it accepts nothing, because of `leave_listeners_alone`."""
        return self.raw.worker_connections == _NO_CONNECTIONS

    def accept_waiting(self) -> None:
        """Accept the connections that wait now, unless it accepts nothing. From the loop."""
        worker = self.raw
        for listener in worker.sockets:
            for _ in range(worker.cfg.backlog):
                if not (worker._accepting and select.select([listener], [], [], 0)[0]):  # noqa: SLF001
                    break
                worker.accept(listener)

    def close_listeners(self) -> None:
        """Close the listeners: no client waits for this worker any more. From the loop."""
        self.raw.set_accept_enabled(False)
        for listener in self.raw.sockets:
            listener.close()

    # -- the end -------------------------------------------------------------------------------

    def stop(self) -> None:
        """Finish what is open within the graceful timeout, and end."""
        self.raw.handle_exit(signal.SIGTERM, None)

    def ask_before_leaving(self, has_master: Callable[[], bool]) -> None:
        """Ask `has_master` in each turn; gunicorn's own look ends the loop at once."""
        self.raw.is_parent_alive = has_master

    # -- connections that wait -----------------------------------------------------------------

    def waiting(self) -> set[ThreadConnection]:
        """The connections that wait for their first request, or for the next."""
        return {*self.raw.keepalived_conns, *self.raw.pending_conns}

    def state_of(self, connection: ThreadConnection) -> ConnectionState | None:
        """What the connection waits for; None if a thread serves it, or has begun to read.

        gunicorn keeps no connection waiting that has read ahead into its next request.
        """
        if connection in self.raw.keepalived_conns:
            return ConnectionState.IDLE
        unread = connection in self.raw.pending_conns and not connection.initialized
        return ConnectionState.FRESH if unread else None

    def just_queued(self, connection: ThreadConnection) -> bool:
        """Whether it is the last that began to wait."""
        queues = (self.raw.keepalived_conns, self.raw.pending_conns)
        return any(queue and queue[-1] is connection for queue in queues)

    def after_each_request(self, callback: Callable[[ThreadConnection], object]) -> None:
        """Call back from the loop after each request, when its connection waits or is closed."""
        worker = self.raw
        finish = worker.finish_request

        def finish_request(connection: ThreadConnection, future: Any) -> None:
            finish(connection, future)
            callback(connection)

        worker.finish_request = finish_request

    def stop_after_each_request(self) -> None:
        """Undo `after_each_request`."""
        del self.raw.finish_request

    def suspend(self, connection: ThreadConnection, state: ConnectionState) -> None:
        """Take it out of the loop, and keep it whatever its deadline."""
        self.raw.poller.unregister(connection.sock)
        self._queue(state).remove(connection)

    def wait_for_request(self, connection: ThreadConnection, state: ConnectionState) -> None:
        """Let it wait in the loop again, for as long as keep-alive lasts."""
        worker = self.raw
        connection.set_timeout()
        if state is ConnectionState.IDLE:
            on_readable = worker.on_client_socket_readable
        else:
            on_readable = worker.on_pending_socket_readable
        worker.poller.register(
            connection.sock, selectors.EVENT_READ, functools.partial(on_readable, connection)
        )
        self._queue(state).append(connection)

    def _queue(self, state: ConnectionState) -> deque[ThreadConnection]:
        idle = state is ConnectionState.IDLE
        return self.raw.keepalived_conns if idle else self.raw.pending_conns

    def fileno(self, connection: ThreadConnection) -> int:
        """The descriptor of its socket, which stays the connection's; -1 if it is closed."""
        return connection.sock.fileno()

    def forget(self, connection: ThreadConnection) -> None:
        """Close this process's copy of a suspended connection."""
        self.raw.nr_conns -= 1
        connection.sock.close()

    def adopt(self, sock: socket.socket, state: ConnectionState) -> ThreadConnection:
        """Make a connection of a socket, and let it wait in the loop. The worker owns it.

        Raises OSError, and leaves the socket to the caller, if its client has gone, or if the loop
        cannot wait for it.
        """
        connection: ThreadConnection = gthread.TConn(
            self.cfg, sock, sock.getpeername(), self._listener_name(sock)
        )
        self.wait_for_request(connection, state)
        self.raw.nr_conns += 1
        return connection

    def _listener_name(self, sock: socket.socket) -> Any:
        """What gunicorn has for the connection's own address: that of its listener."""
        own = sock.getsockname()
        if sock.family == socket.AF_UNIX or own in self._listener_names:
            return own
        every = (_EVERY[sock.family], *own[1:])
        return every if every in self._listener_names else own


def _nothing(*_: object) -> None:
    """Replace a call that must not happen, or just wake the loop."""
