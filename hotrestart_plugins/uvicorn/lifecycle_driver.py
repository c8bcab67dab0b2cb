"""Tells the lifecycle of an instance what happens on its event loop, and does what follows.

One driver for one instance, whether that is a single server or a supervisor with its workers. It
begins when the instance is started, before there is a loop, and watches the parent socket and the
new instance from the moment at which this instance has taken over.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from hotrestart_plugins.core import events
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.hot_restart import ChildExitAction, HotRestart, Role
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.core.takeover_server import Child
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.errors import Overtaken
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.lifecycle.table import TIMEOUTS, Action, Event, Lifecycle
from hotrestart_plugins.uvicorn.takeover import Takeover

_POLL_INTERVAL = 0.25  # seconds between two looks at a new instance of which there is no pidfd
_FAULT_PAUSE = 0.1  # seconds without a callback after one that has failed: it may fail again


class Serving(Protocol):
    """What accepts and answers: one server, or a supervisor with its workers."""

    stats: DrainStats
    """What the last drain did."""

    def take_over(self) -> None:
        """Claim the parent socket's name, and tell the old instance to go.

        Raises HotRestartError or OSError if that fails; the old instance keeps serving then.
        """

    async def pause(self, target: HandoverTarget | None = None) -> None:
        """Stop accepting; connections may go to the `target`. Does not wait for the workers."""

    async def all_paused(self) -> bool:
        """Wait until every worker has stopped accepting; False if the drain timeout ends first."""

    async def resume(self) -> None:
        """Accept again."""

    async def drain(self, seconds: float) -> bool:
        """Wait until nothing is in flight; False if that takes longer than `seconds`."""

    def abort(self) -> None:
        """Close what is still open."""

    def close_listeners(self) -> None:
        """Close every copy of the listeners, after `pause`: this instance accepts no more."""

    def shut_down(self) -> None:
        """Shut the app down, and exit."""


class LifecycleDriver:
    """The life of one instance of uvicorn. It owns the watches and timers, not the takeover."""

    def __init__(self, takeover: Takeover, serving: Serving, journal: Journal) -> None:
        """`takeover` stays the caller's to close, after `stop`."""
        self.lifecycle = Lifecycle()
        self.failure: BaseException | None = None
        """Why this instance could not start, or could not take over."""
        self._takeover = takeover
        self._serving = serving
        self._journal = journal
        self._fence = Fence(journal)
        self._perform: Mapping[Action, Callable[[], None]] = {
            Action.BOOT: takeover.listen,
            Action.COMMIT: self._commit,
            Action.ACCEPT: self._watch,
            Action.STOP_ACCEPTING: self._stop_accepting,
            Action.DRAIN: self._start_drain,
            Action.ACCEPT_AGAIN: self._accept_again,
            Action.STAND_DOWN: self._stand_down,
            Action.FINISH_DRAINING: self._keep_draining,
            Action.ABORT: serving.abort,
            Action.EXIT: self._exit,
            Action.EXIT_FAILED: self._exit_failed,
        }
        self._durations = {Event.WINDOW_ENDED: takeover.settings.rollback_window}
        self._timers: dict[Event, asyncio.TimerHandle] = {}
        self._watched: list[int] = []
        self._next_look: asyncio.TimerHandle | None = None
        self._switch: asyncio.Task[None] | None = None
        """The last task that stops or starts to accept: they run one after another."""
        self._draining: asyncio.Task[None] | None = None

    # -- what the server reports ---------------------------------------------------------------

    def begin(self, sockets: Sequence[socket.socket] | None = None) -> list[socket.socket]:
        """Wait for this instance's turn, and return its listeners, which the caller owns.

        `sockets`: listeners that the caller has already; there is no takeover then. Raises
        HotRestartError and leaves nothing open; the running instance is undisturbed.
        """
        try:
            self._takeover.meet(sockets)
            self.report(Event.TURN_CAME)
        except BaseException as error:
            if isinstance(error, Exception):
                self.fail(error)
            self._takeover.close()
            raise
        return self._takeover.listeners

    def report(self, event: Event) -> None:
        """Enter the state that follows from `event`, and perform its actions.

        Each of them, whatever another one raises; that is raised then.
        """
        faults: list[Exception] = []
        for action in self.lifecycle.handle(event):
            try:
                self._perform[action]()
            except Exception as error:  # noqa: BLE001 (raised below)
                faults.append(error)
        self._set_timers()
        if faults:
            raise faults[0]

    def fail(self, error: BaseException, event: Event = Event.FAILED) -> None:
        """Say, once, why this instance could not start or take over; it exits."""
        if self.failure is None:
            self.failure = error
            self._takeover.failed(error)
        self.report(Event.NEWER_STARTED if isinstance(error, Overtaken) else event)

    def end(self) -> None:
        """The server has ended without having been told to, unless it is on its way out."""
        # Another instance serves in place of a replaced one: it has nothing to fail at.
        self.report(Event.STOP_ORDERED if self.lifecycle.replaced else Event.FAILED)

    async def drained(self) -> None:
        """Wait for the end of the drain, if there is one."""
        if self._draining is not None:
            await asyncio.wait({self._draining})

    def stop(self) -> None:
        """Watch nothing any more; call it on the loop, before the takeover is closed."""
        self._unwatch()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for task in (self._draining, self._switch):
            if task is not None:
                task.cancel()

    # -- what the loop reports -----------------------------------------------------------------

    def _set_timers(self) -> None:
        """Start the timers of this state, keep those that run, and stop the others."""
        due = TIMEOUTS[self.lifecycle.state] & self._durations.keys()
        for event in self._timers.keys() - due:
            self._timers.pop(event).cancel()
        for event in due - self._timers.keys():
            self._timers[event] = asyncio.get_running_loop().call_later(
                self._durations[event], self._on_timer, event
            )

    def _on_timer(self, event: Event) -> None:
        self._guarded(lambda: self.report(event))

    def _watch(self) -> None:
        """Wait for the parent socket and for the end of the new instance, if there are any."""
        hot = self._takeover.hot
        if hot is None:
            return
        faults = self._fence.faults
        with self._fence:
            self._watch_both(hot)
        if self._fence.faults != faults:  # the running instance must not become deaf
            self._unwatch()
            self._watch_later()

    def _watch_later(self) -> None:
        self._next_look = asyncio.get_running_loop().call_later(_FAULT_PAUSE, self._watch)

    def _watch_both(self, hot: HotRestart) -> None:
        loop = asyncio.get_running_loop()
        if hot.fileno() >= 0:
            self._add_reader(loop, hot.fileno(), self._on_request)
        child = hot.child
        if child is None or not self._cares_for_child(hot):
            return
        if child.fileno() >= 0:
            self._add_reader(loop, child.fileno(), self._on_child_end)
        else:
            self._next_look = loop.call_later(_POLL_INTERVAL, self._on_look)

    def _add_reader(
        self, loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], None]
    ) -> None:
        loop.add_reader(fd, callback)
        self._watched.append(fd)

    def _cares_for_child(self, hot: HotRestart) -> bool:
        """Whether anything follows from the end of the new instance."""
        return hot.role is not Role.REPLACED or self.lifecycle.can_serve_again

    def _unwatch(self) -> None:
        for fd in self._watched:
            asyncio.get_running_loop().remove_reader(fd)
        self._watched.clear()
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def _guarded(self, step: Callable[[], None]) -> None:
        """Call `step`; whatever it raises, go on watching. What to watch may have changed."""
        self._unwatch()
        faults = self._fence.faults
        with self._fence:
            step()
        if self._fence.faults == faults:
            self._fence.all_well()
            self._watch()
        else:
            self._watch_later()

    def _on_request(self) -> None:
        self._guarded(self._answer)

    def _answer(self) -> None:
        hot = self._takeover.hot
        if hot is None:
            return
        try:
            hot.handle()
        finally:  # it may have been told to go before it failed
            self._look_at_role(hot)

    def _look_at_role(self, hot: HotRestart) -> bool:
        """Whether this instance has just been told to go; that is reported then."""
        told = hot.role is Role.REPLACED and not self.lifecycle.replaced
        if told:
            self.report(Event.REPLACED)
        return told

    def _on_look(self) -> None:
        self._guarded(self._look)

    def _look(self) -> None:
        hot = self._takeover.hot
        if hot is not None and hot.child is not None and not hot.child.alive:
            self._child_ended()

    def _on_child_end(self) -> None:
        self._guarded(self._child_ended)

    def _child_ended(self) -> None:
        hot = self._takeover.hot
        if hot is None or not self._cares_for_child(hot):
            return
        child = hot.child
        action = hot.child_ended()
        if self._look_at_role(hot):
            return  # it had told this instance to go before its end: the next look decides
        if action is ChildExitAction.RESUME:
            self.report(Event.NEW_INSTANCE_CRASHED)
        elif action is ChildExitAction.LEAVE:
            self.report(Event.NEW_INSTANCE_LEFT)
        elif child is not hot.child:  # else another one asks, and the one before it has ended
            self._begin_record(child)
            self._journal.emit(
                events.TAKEOVER_GIVEN_UP,
                facts={"reason": "the new instance exited before it had taken over"},
            )

    def _begin_record(self, child: Child | None) -> None:
        """From here on, note what happens in the record of the takeover by `child`."""
        takeover_id, pid = (child.takeover_id, child.pid) if child is not None else (0, 0)
        self._journal.record = Record(
            self._takeover.directory, takeover_id, pid, "old", self._journal.logger
        )

    # -- what the lifecycle asks for -----------------------------------------------------------

    def _commit(self) -> None:
        try:
            self._serving.take_over()
        except Exception as error:  # noqa: BLE001 (said, and the status of this process)
            self.fail(error)
        else:
            self.report(Event.COMMITTED)

    def _stop_accepting(self) -> None:
        hot = self._takeover.hot
        child = hot.child if hot is not None else None
        target = None
        if child is not None and not self._takeover.settings.no_handover:
            target = HandoverTarget(self._takeover.directory, child.takeover_id, Side.NEW)
        self._switch_by(lambda: self._serving.pause(target))
        self._begin_record(child)

    def _switch_by(self, step: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run `step` in a task, after the step before it: neither is cut short."""
        self._switch = asyncio.get_running_loop().create_task(_after(self._switch, step))
        return self._switch

    def _start_drain(self) -> None:
        hot = self._takeover.hot
        given = sorted(hot.child.given) if hot is not None and hot.child is not None else []
        self._draining = asyncio.get_running_loop().create_task(
            self._drain(self._switch, given, self._takeover.settings.drain_timeout)
        )

    async def _drain(
        self, pausing: asyncio.Task[None] | None, given: list[str], seconds: float
    ) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        try:
            if pausing is not None:
                await asyncio.wait({pausing})
                pausing.result()
            paused = await self._serving.all_paused()
        except Exception as error:  # noqa: BLE001 (said; and this instance leaves)
            # It must not go on accepting beside the new instance, nor end what it has accepted.
            self._journal.emit(events.REPLACEMENT_FAILED, traceback=error)
            self._draining = None
            self.report(Event.STOP_ORDERED)
            self.report(Event.DRAINED)
            return
        if paused:
            self._journal.emit(events.STOPPED_ACCEPTING, facts={"given": given})
            self.report(Event.STOPPED_ACCEPTING)
        try:
            finished = await self._serving.drain(max(0.0, deadline - loop.time()))
        except Exception as error:  # noqa: BLE001 (what is open is cut off)
            self._journal.emit(events.DRAIN_FAILED, traceback=error)
            finished = False
        self._journal.emit(events.DRAIN_ENDED, facts={"drain": self._serving.stats.counts()})
        self.report(Event.DRAINED if paused and finished else Event.DRAIN_TIMED_OUT)

    def _accept_again(self) -> None:
        if self._draining is not None:
            self._draining.cancel()
            self._draining = None
        self._switch_by(self._resume)

    async def _resume(self) -> None:
        try:
            await self._serving.resume()
        except Exception as error:  # noqa: BLE001 (said; and this instance leaves)
            self._journal.emit(events.REPLACEMENT_FAILED, traceback=error)
            self.end()
            return
        self._journal.emit(events.ACCEPTING_AGAIN, facts={"drain": self._serving.stats.counts()})

    def _stand_down(self) -> None:
        self._switch_by(self._close_listeners)
        hot = self._takeover.hot
        if hot is not None:
            for name in hot.listeners:
                hot.drop(name)
            hot.stand_down()

    async def _close_listeners(self) -> None:
        self._serving.close_listeners()

    def _keep_draining(self) -> None:
        """Do nothing: the drain goes on by itself."""

    def _exit(self) -> None:
        if self._draining is not None:
            self._journal.emit(events.DRAINED, stats=self._serving.stats)
        self._serving.shut_down()

    def _exit_failed(self) -> None:
        self._unwatch()
        self._takeover.close(crashed=True)
        self._exit()


async def _after(before: asyncio.Task[None] | None, step: Callable[[], Awaitable[None]]) -> None:
    if before is not None:
        await asyncio.wait({before})
        if not before.cancelled():
            before.exception()  # it is told to whoever waits for it, and not once more by asyncio
    await step()
