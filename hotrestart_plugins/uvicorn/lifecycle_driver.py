"""From ready to exit: an instance that answers, is replaced, and serves again if that fails."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Protocol

from hotrestart_plugins.core.hot_restart import ChildExitAction, HotRestart, Role
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.settings import Settings

logger = logging.getLogger("uvicorn.error")

_POLL_INTERVAL = 0.25  # seconds between two looks at a child of which there is no pidfd


class Serving(Protocol):
    """Who serves: one process, or a supervisor with its workers."""

    stats: DrainStats
    """What the last drain did."""

    async def pause(self, target: HandoverTarget | None = None) -> None:
        """Accept nothing from now on; connections may go to the `target`. Waits for nobody."""

    async def all_paused(self) -> bool:
        """Wait until nobody accepts any more; False if the drain's time is over first."""

    async def resume(self) -> None:
        """Accept again."""

    async def drain(self, seconds: float) -> bool:
        """Wait until what was accepted is finished; False if that took longer."""

    def shut_down(self) -> None:
        """End, with status 0."""


class LifecycleDriver:
    """Has the running loop wait for what a ready `HotRestart` must hear, and acts on it."""

    def __init__(
        self, hot: HotRestart, directory: Path, settings: Settings, serving: Serving
    ) -> None:
        """`hot` is ready, meets in `directory`, and stays the caller's to close, after `stop`."""
        self._hot = hot
        self._directory = directory
        self._settings = settings
        self._serving = serving
        self._loop = asyncio.get_running_loop()
        self._watched: list[int] = []
        self._polling: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self._after = ChildExitAction.NOTHING
        self._leaving: asyncio.Task[None] | None = None
        self._watch()

    def _watch(self) -> None:
        """Wait for the parent socket and for the child's end. Both change with each event."""
        fd = self._hot.fileno()
        if fd >= 0:
            self._loop.add_reader(fd, self._on_request)
            self._watched.append(fd)
        child = self._hot.child
        if child is not None and child.fileno() >= 0:
            self._loop.add_reader(child.fileno(), self._child_ended)
            self._watched.append(child.fileno())
        elif child is not None:
            self._polling = self._loop.call_later(_POLL_INTERVAL, self._poll_child)

    def _poll_child(self) -> None:
        child = self._hot.child
        if child is not None and child.alive:
            self._polling = self._loop.call_later(_POLL_INTERVAL, self._poll_child)
        else:
            self._child_ended()

    def _unwatch(self) -> None:
        for fd in self._watched:
            self._loop.remove_reader(fd)
        self._watched.clear()
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None

    def stop(self) -> None:
        """Wait for nothing any more; call it on the loop, before the `HotRestart` is closed."""
        self._unwatch()
        if self._leaving is not None:
            self._leaving.cancel()

    def _on_request(self) -> None:
        self._unwatch()
        self._hot.handle()
        self._watch()
        if self._hot.role is Role.REPLACED and self._leaving is None:
            self._ended.clear()
            self._leaving = self._loop.create_task(self._replaced())

    def _child_ended(self) -> None:
        self._unwatch()
        record = self._record()
        self._after = self._hot.child_ended()
        if self._after is ChildExitAction.NOTHING:
            record.note(outcome="failed", reason="the child ended before it had taken over")
        self._watch()
        self._ended.set()

    def _record(self) -> Record:
        child = self._hot.child
        takeover_id, pid = (child.takeover_id, child.pid) if child is not None else (0, 0)
        return Record(self._directory, takeover_id, pid, "parent", logger)

    def _stats(self) -> dict[str, int]:
        return self._serving.stats.as_record()

    async def _drain(self, deadline: float, record: Record, given: list[str]) -> None:
        if await self._serving.all_paused():
            logger.info("Stopped accepting; draining")
            record.note("stopped accepting", given=given)
        await self._serving.drain(max(0.0, deadline - self._loop.time()))

    def _drained(self, drain: asyncio.Future[None], record: Record) -> None:
        error = drain.exception()
        if error is not None:  # it leaves all the same, and cuts off what is open
            logger.error("The drain has failed", exc_info=error)
        record.note("drained", tally=self._stats())

    async def _replaced(self) -> None:
        try:
            await self._drain_and_exit()
        except Exception:
            # It must not go on accepting beside the new one, nor end what it has accepted.
            logger.exception("Cannot make way as it should: this instance drains and leaves")
            self._hot.stand_down()
            self._serving.shut_down()

    async def _drain_and_exit(self) -> None:
        """Drain, stand by through the rollback window, and go; or serve again."""
        now = self._loop.time()
        window = now + self._settings.rollback_window
        record = self._record()
        child = self._hot.child
        target = None
        if child is not None and not self._settings.no_handover:
            target = HandoverTarget(self._directory, child.takeover_id, Side.NEW)
        given = sorted(child.given) if child is not None else []
        await self._serving.pause(target)
        drain = asyncio.ensure_future(
            self._drain(now + self._settings.drain_timeout, record, given)
        )
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({drain, ended}, return_when=asyncio.FIRST_COMPLETED)
            if drain.done():
                self._drained(drain, record)
            if not ended.done():
                await asyncio.wait({ended}, timeout=max(0.0, window - self._loop.time()))
            if ended.done() and self._after is ChildExitAction.RESUME:
                drain.cancel()
                await self._serving.resume()
                self._leaving = None
                logger.warning("Accepting again")
                record.note("accepting again", outcome="rolled back", tally=self._stats())
                return
            if not drain.done():
                await asyncio.wait({drain})
                self._drained(drain, record)
        finally:
            drain.cancel()
            ended.cancel()
        self._hot.stand_down()
        logger.info("Drained: %s; leaving", self._serving.stats)
        self._serving.shut_down()
