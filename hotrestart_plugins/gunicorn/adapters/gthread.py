"""The adapter of gunicorn's gthread worker, whose main thread accepts and keeps idle connections.

That thread runs a loop of its own: select, call what the selector says, look at deadlines. What is
done here to connections happens between the calls and the deadlines, since a connection that leaves
the selector in the midst of the calls may have its own still to come.
"""

from __future__ import annotations

import functools
import os
import select
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from gunicorn.workers.gthread import TConn

from hotrestart_plugins.app import drain
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn.adapters.close_hook import (
    CloseHook,
    resume_accepting,
    stop_accepting,
    uses_proxy_protocol,
)
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent
from hotrestart_plugins.handover.frames import ConnectionState, ReceivedConnection
from hotrestart_plugins.handover.receiver import ConnectionReceiver
from hotrestart_plugins.handover.sender import ConnectionSender

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent

_POLL_INTERVAL = 0.1  # seconds between two looks at what is still open
_EVERY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104  # not to bind to
_NO_CONNECTIONS = -1  # less than any number of connections that a gthread worker can have


class GthreadAdapter:
    """Lets connections in, and moves those that wait for a request."""

    def __init__(self, worker: Any, agent: WorkerAgent) -> None:
        self._worker = worker
        self._agent = agent
        self._limit = worker.worker_connections
        self._close_hook = CloseHook(worker)
        self._loop = GthreadEventLoop(worker)
        self._parked = GthreadConnectionAdapter(worker)
        self._sender: ConnectionSender | None = None
        self._receiver: ConnectionReceiver | None = None
        self._open = 0
        self._stop_by = 0.0
        self._is_orphan = False
        self._can_hand_over = not worker.cfg.is_ssl and not uses_proxy_protocol(worker.cfg)
        self._finish = worker.finish_request
        signal.signal(signal.SIGTERM, self._terminate)
        signal.siginterrupt(signal.SIGTERM, False)

    def _terminate(self, _number: int, _frame: FrameType | None) -> None:
        """As gunicorn's; a stop after a pause has what is left of the drain.

        While connections move, gunicorn hears of it later: it would close them after their answer.
        """
        if self._worker.worker_connections == _NO_CONNECTIONS:
            self._loop.call_soon(self._close_listeners)
        if self._sender is None or not self._sender.active:
            self._stop()
        elif not self._stop_by:
            self._stop_by = time.monotonic() + self._agent.seconds_left / 2
            self._loop.call_soon(self._stop_when_moved)

    def _stop_when_moved(self) -> None:
        if self._worker.nr_conns and time.monotonic() < self._stop_by:
            self._loop.call_later(_POLL_INTERVAL, self._stop_when_moved)
        else:
            self._stop()

    def _stop(self) -> None:
        self._worker.cfg.set("graceful_timeout", self._agent.seconds_left)
        self._worker.handle_exit(signal.SIGTERM, None)

    def ready(self) -> None:
        """Take in what the old instance's workers hand over; and hear of the master's end."""
        self._loop.add_reader(self._agent.lifeline, self._orphaned)
        self._worker.is_parent_alive = self._has_parent
        if self._agent.receiver_path is not None and self._can_hand_over:
            self._receiver = ConnectionReceiver.open(
                self._agent.receiver_path, self._adopt, loop=self._loop, logger=self._worker.log
            )

    def _adopt(self, received: Sequence[ReceivedConnection]) -> None:
        for connection in self._parked.adopt(received):
            if self._sender is not None:  # this instance was replaced meanwhile, too
                self._sender.add(connection)

    def _has_parent(self) -> bool:
        """As gunicorn's, which would leave its loop at once; without a parent this one stops."""
        if os.getppid() != self._worker.ppid:
            self._orphaned()
        return True

    def _orphaned(self) -> None:
        """The master was killed: accept what waits, and give the addresses up before the drain.

        gunicorn would notice within a second, and keep the listeners, which it does not accept on
        any more, until the last connection has ended.
        """
        if self._is_orphan:
            return
        self._is_orphan = True
        worker = self._worker
        self._loop.remove_reader(self._agent.lifeline)
        worker.log.info("Parent changed, shutting down: %s", worker)
        for one in worker.sockets:
            for _ in range(worker.cfg.backlog):
                if not (worker._accepting and select.select([one], [], [], 0)[0]):  # noqa: SLF001
                    break
                worker.accept(one)
        self._close_listeners()
        self._stop()

    def _close_listeners(self) -> None:
        """Let no client wait for this worker, which accepts nothing any more."""
        self._worker.set_accept_enabled(False)
        for listener in self._worker.sockets:
            listener.close()

    def pause(self) -> None:
        """Have the loop find that it has too many connections, and leave the listeners alone."""
        stop_accepting(self._worker.sockets)
        self._open = self._worker.nr_conns
        target = self._agent.handover_target if self._can_hand_over else None
        self._close_hook.begin(close=target is None)
        # gunicorn's stop would close what waits for its next request after two seconds.
        self._worker._cap_keepalive = _nothing  # noqa: SLF001
        self._set_limit(_NO_CONNECTIONS, functools.partial(self._begun, target))

    def _begun(self, target: Any) -> None:
        """In the loop: not in the midst of whatever the signal has interrupted."""
        drain.set()
        if target is not None:
            self._sender = ConnectionSender(
                target,
                self._parked,
                loop=self._loop,
                on_failure=self._close_hook.announce,
                logger=self._worker.log,
            )
            self._worker.finish_request = self._finished
            if self._sender.active:
                self._sender.offer_all(self._parked.all())
            else:
                self._close_hook.announce()
        self._agent.done(WorkerEvent.PAUSED)

    def _finished(self, connection: Any, future: Any) -> None:
        self._finish(connection, future)
        # It waits for its next request, or still for its first: a thread had waited for that.
        for queue in (self._worker.keepalived_conns, self._worker.pending_conns):
            if self._sender is not None and queue and queue[-1] is connection:
                self._loop.call_soon(self._sender.on_answer, connection)

    def resume(self) -> None:
        """The same the other way round."""
        resume_accepting(self._worker.sockets)
        del self._worker._cap_keepalive  # noqa: SLF001
        self._set_limit(self._limit, self._ended)

    def _ended(self) -> None:
        drain.clear()
        if self._sender is not None:
            del self._worker.finish_request
            self._sender.close()
        self._agent.done(WorkerEvent.RESUMED)
        self._sender = None
        self._close_hook.end()

    def _set_limit(self, limit: int, then: Callable[[], None]) -> None:
        self._worker.worker_connections = limit
        # Wakes the loop, which looks at the limit before anything else.
        self._loop.call_soon(then)

    def stats(self) -> DrainStats:
        """By the number of connections, and of answers: each but the first of one closes it."""
        left, answers = self._worker.nr_conns, self._close_hook.answers
        handed_over = len(self._sender.handed_over) if self._sender is not None else 0
        stats = DrainStats.by_numbers(self._open, left, answers, handed_over)
        if not self._worker.alive:
            parked = len(self._worker.keepalived_conns) + len(self._worker.pending_conns)
            stats.aborted_idle, stats.aborted_requests = parked, max(0, left - parked)
        return stats


class GthreadConnectionAdapter:
    """The worker's connections that wait: for their first request, or for the next."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._listeners = [one.getsockname() for one in worker.sockets]

    def all(self) -> Collection[Any]:
        """Those that wait now."""
        return {*self._worker.keepalived_conns, *self._worker.pending_conns}

    def state(self, connection: Any) -> ConnectionState | None:
        """Gunicorn parks none that has read ahead into its next request."""
        if connection in self._worker.keepalived_conns:
            return ConnectionState.IDLE
        unread = connection in self._worker.pending_conns and not connection.initialized
        return ConnectionState.FRESH if unread else None

    def on_response(self, connection: Any, answered: Callable[[], None]) -> None:
        """The adapter sees each one that is parked."""

    def fileno(self, connection: Any) -> int:
        """Of its socket."""
        return int(connection.sock.fileno())

    def suspend(self, connection: Any, state: ConnectionState) -> None:
        """Take it out of the selector, and away from its deadline."""
        self._worker.poller.unregister(connection.sock)
        self._queue(state).remove(connection)

    def resume(self, connection: Any, state: ConnectionState) -> None:
        """Wait for its request again."""
        connection.set_timeout()
        self._queue(state).append(connection)
        then = "on_client" if state is ConnectionState.IDLE else "on_pending"
        callback = getattr(self._worker, f"{then}_socket_readable")
        self._worker.poller.register(
            connection.sock, selectors.EVENT_READ, functools.partial(callback, connection)
        )

    def _queue(self, state: ConnectionState) -> deque[Any]:
        worker = self._worker
        found: deque[Any] = (
            worker.keepalived_conns if state is ConnectionState.IDLE else worker.pending_conns
        )
        return found

    def discard(self, connection: Any) -> None:
        """It is another's: close the copy."""
        self._worker.nr_conns -= 1
        connection.sock.close()

    def is_closing(self, connection: Any) -> bool:
        """Whether it has been closed meanwhile."""
        return self.fileno(connection) < 0

    def adopt(self, received: Sequence[ReceivedConnection]) -> Iterator[Any]:
        """Connections of the old instance are this worker's."""
        for sock, state in received:
            try:
                connection = TConn(self._worker.cfg, sock, sock.getpeername(), self._server(sock))
            except OSError:  # its client has gone
                sock.close()
                continue
            self._worker.nr_conns += 1
            self.resume(connection, state)
            yield connection

    def _server(self, sock: socket.socket) -> Any:
        """What gunicorn has for the connection's own address: that of its listener."""
        own = sock.getsockname()
        if sock.family == socket.AF_UNIX or own in self._listeners:
            return own
        every = (_EVERY[sock.family], *own[1:])
        return every if every in self._listeners else own


class GthreadEventLoop:
    """The `EventLoop` of a handover, made of the worker's own."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._due: deque[Timer] = deque()
        self._wait = worker.wait_for_and_dispatch_events
        worker.wait_for_and_dispatch_events = self._wait_until_due
        self._look = worker.murder_keepalived  # comes right after the calls
        worker.murder_keepalived = self._between

    def _wait_until_due(self, timeout: float) -> None:
        # Of a copy: a signal handler may add one meanwhile, which then wakes the loop.
        when = min((one.when for one in tuple(self._due) if one.callback is not None), default=None)
        if when is not None:
            timeout = min(timeout, max(0.0, when - time.monotonic()))
        self._wait(timeout)

    def _between(self, *args: Any, **kwargs: Any) -> None:
        for _ in range(len(self._due)):
            timer = self._due.popleft()
            if timer.when <= time.monotonic():
                timer.run()
            elif timer.callback is not None:
                self._due.append(timer)
        self._look(*args, **kwargs)

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        """As asyncio's."""
        then = functools.partial(callback, *args)
        self._worker.poller.register(fd, selectors.EVENT_READ, lambda _: self._soon(then))

    def _soon(self, then: Callable[[], object]) -> Timer:
        timer = Timer(0.0, then)
        self._due.append(timer)
        return timer

    def remove_reader(self, fd: int) -> None:
        """As asyncio's."""
        self._worker.poller.unregister(fd)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        """As asyncio's."""
        timer = self._soon(functools.partial(callback, *args))
        self._worker.method_queue.defer(_nothing)
        return timer

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        """As asyncio's; from the loop, which looks at it before it waits."""
        timer = Timer(time.monotonic() + delay, functools.partial(callback, *args))
        self._due.append(timer)
        return timer


class Timer:
    """A call to come."""

    def __init__(self, when: float, callback: Callable[[], object]) -> None:
        """`when`: in monotonic seconds."""
        self.when = when
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Do not call it."""
        self.callback = None

    def run(self) -> None:
        """Call it, unless it was cancelled."""
        if self.callback is not None:
            self.callback()


def _nothing(*_: object) -> None:
    """In the place of what must not happen, and to wake up for."""
