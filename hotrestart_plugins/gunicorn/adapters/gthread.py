"""The adapter of gunicorn's gthread worker, whose main thread accepts, and keeps what is idle."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from hotrestart_plugins.app import drain
from hotrestart_plugins.core import events
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn._compat.gthread import (
    GthreadWorker,
    RawThreadWorker,
    ThreadConnection,
)
from hotrestart_plugins.gunicorn._compat.table import Feature
from hotrestart_plugins.gunicorn.adapters.base import (
    DrainCounter,
    LastRequests,
    State,
    WorkerAdapter,
)
from hotrestart_plugins.gunicorn.adapters.close_hook import (
    CloseHook,
    may_hand_over,
    resume_accepting,
    stop_accepting,
)
from hotrestart_plugins.gunicorn.adapters.gthread_loop import GthreadEventLoop
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent
from hotrestart_plugins.handover.frames import (
    ConnectionState,
    HandoverTarget,
    ReceivedConnection,
)
from hotrestart_plugins.handover.receiver import ConnectionReceiver
from hotrestart_plugins.handover.sender import ConnectionSender

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent

_POLL_INTERVAL = 0.1  # seconds between two looks at what is still open


class GthreadAdapter(WorkerAdapter):
    """Lets connections in, and hands over those that wait for a request."""

    def __init__(self, worker: RawThreadWorker, agent: WorkerAgent) -> None:
        super().__init__(agent)
        self._worker = GthreadWorker(worker)
        self._close_hook = CloseHook(self._worker)
        self._loop = GthreadEventLoop(self._worker)
        self._connections = GthreadConnectionAdapter(self._worker)
        self._counter = DrainCounter()
        self._sender: ConnectionSender[ThreadConnection] | None = None
        self._receiver: ConnectionReceiver | None = None
        self._last_requests: LastRequests | None = None
        self._can_hand_over = may_hand_over(worker.cfg) and not agent.lacks(Feature.HANDOVER)
        signal.signal(signal.SIGTERM, self._terminate)
        signal.siginterrupt(signal.SIGTERM, False)

    def _terminate(self, _number: int, _frame: FrameType | None) -> None:
        """Stop. A stop after a pause may take what is left of the drain.

        While connections are handed over, gunicorn is told later: it would close them after their
        next answer.
        """
        if self._worker.leaves_listeners_alone:
            self._loop.call_soon(self._worker.close_listeners)
        if self._sender is None or not self._sender.active:
            self._stop()
        elif self._last_requests is None:
            self._last_requests = LastRequests(
                lambda: self._worker.open_connections, self._agent.seconds_left
            )
            self._loop.call_soon(self._stop_after, self._last_requests)

    def _stop_after(self, last_requests: LastRequests) -> None:
        if last_requests.over:
            self._stop()
        else:
            self._loop.call_later(_POLL_INTERVAL, self._stop_after, last_requests)

    def _stop(self) -> None:
        self._worker.cfg.set("graceful_timeout", self._agent.seconds_left)
        self._worker.stop()

    def ready(self) -> None:
        """Receive what the old instance's workers hand over, and notice the master's end."""
        if not self._agent.lacks(Feature.LOSE_MASTER):
            self._loop.add_reader(self._agent.lifeline, self._master_ended)
            self._worker.ask_before_leaving(self._has_master)
        if self._agent.own_target is not None and self._can_hand_over:
            self._receiver = ConnectionReceiver.open(
                self._agent.own_target,
                self._adopt,
                loop=self._loop,
                journal=self._agent.journal,
            )

    def _adopt(self, received: ReceivedConnection) -> None:
        connection = self._connections.adopt(received)
        if connection is not None and self._sender is not None:
            self._sender.add(connection)  # this instance was replaced meanwhile, too

    def _has_master(self) -> bool:
        """Answer gunicorn, which would leave its loop at once, with yes, and stop if it is no."""
        if self._agent.has_lost_master:
            self._master_ended()
        return True

    def _master_ended(self) -> None:
        """The master was killed: accept what waits, and close the listeners before the drain.

        gunicorn would notice within a second, and keep the listeners, which it does not accept on
        any more, until the last connection has ended.
        """
        if self._state is State.LEAVING:
            return
        self._state = State.LEAVING
        self._loop.remove_reader(self._agent.lifeline)
        self._agent.journal.emit(events.MASTER_ENDED, worker=self._worker.raw)
        self._worker.accept_waiting()
        self._worker.close_listeners()
        self._stop()

    def pause(self) -> None:
        """Stop accepting, and offer what waits for a request to the new instance."""
        stop_accepting(self._worker.listeners)
        self._counter.begin(self._worker.open_connections)
        target = self._agent.handover_target if self._can_hand_over else None
        self._close_hook.begin(close=target is None)
        self._worker.leave_listeners_alone()
        self._loop.call_soon(self._paused, target)

    def _paused(self, target: HandoverTarget | None) -> None:
        """In the loop: not in the midst of whatever the signal has interrupted."""
        drain.set()
        if target is not None:
            self._sender = ConnectionSender(
                target,
                self._connections,
                loop=self._loop,
                on_failure=self._close_hook.announce,
                journal=self._agent.journal,
            )
            self._worker.after_each_request(self._on_response)
            if self._sender.active:
                self._sender.offer_all(self._worker.waiting())
            else:
                self._close_hook.announce()
        self._enter(State.PAUSED)
        self._agent.done(WorkerEvent.PAUSED)

    def _enter(self, state: State) -> None:
        if self._state is not State.LEAVING:
            self._state = state

    def _on_response(self, connection: ThreadConnection) -> None:
        """It waits for its next request, or still for its first: a thread has waited for that."""
        if self._sender is not None and self._worker.just_queued(connection):
            self._loop.call_soon(self._sender.on_answer, connection)

    def resume(self) -> None:
        """Accept again."""
        resume_accepting(self._worker.listeners)
        self._worker.wait_on_listeners()
        self._loop.call_soon(self._resumed)

    def _resumed(self) -> None:
        drain.clear()
        if self._sender is not None:
            self._worker.stop_after_each_request()
            self._sender.close()
        self._enter(State.ACCEPTING)
        self._agent.done(WorkerEvent.RESUMED)
        self._sender = None
        self._close_hook.end()

    def stats(self) -> DrainStats:
        """By the number of connections, and of answers: only its first leaves one open."""
        return self._counter.stats(
            self._worker.open_connections,
            self._close_hook.answers,
            handed_over=len(self._sender.handed_over) if self._sender is not None else 0,
            idle=0 if self._agent.lacks(Feature.HANDOVER) else len(self._worker.waiting()),
            ends=not self._worker.alive,
        )


class GthreadConnectionAdapter:
    """The worker's connections that wait for a request, as a handover needs them."""

    def __init__(self, worker: GthreadWorker) -> None:
        self._worker = worker

    def state(self, connection: ThreadConnection) -> ConnectionState | None:
        """What it waits for; None if it must stay."""
        return self._worker.state_of(connection)

    def on_response(self, connection: ThreadConnection, answered: Callable[[], None]) -> None:
        """Do nothing: `GthreadAdapter` sees each connection that has answered."""

    def fileno(self, connection: ThreadConnection) -> int:
        """The descriptor of its socket, which stays the connection's; -1 if it is closed."""
        return self._worker.fileno(connection)

    def suspend(self, connection: ThreadConnection, state: ConnectionState) -> None:
        """Read nothing from it, and keep it whatever its deadline."""
        self._worker.suspend(connection, state)

    def resume(self, connection: ThreadConnection, state: ConnectionState) -> None:
        """Wait for its request again."""
        self._worker.wait_for_request(connection, state)

    def discard(self, connection: ThreadConnection) -> None:
        """Close this process's copy."""
        self._worker.forget(connection)

    def is_closing(self, connection: ThreadConnection) -> bool:
        """Whether it was closed while it was suspended."""
        return self._worker.fileno(connection) < 0

    def adopt(self, received: ReceivedConnection) -> ThreadConnection | None:
        """Make a connection of what the old instance has sent; None if its client has gone.

        Owns the socket.
        """
        sock, state = received
        try:
            return self._worker.adopt(sock, state)
        except OSError:
            sock.close()
            return None
