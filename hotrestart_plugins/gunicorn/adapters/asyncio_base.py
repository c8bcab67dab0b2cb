"""What the adapters of workers with an asyncio loop share: they follow the command in the loop.

The command comes by a signal, and may change while the last one is still being followed.
"""

from __future__ import annotations

import abc
import asyncio
from typing import TYPE_CHECKING

from hotrestart_plugins.gunicorn.adapters.base import State, WorkerAdapter
from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent


class AsyncioAdapter(WorkerAdapter):
    """Pauses and resumes in a task of its own, one after the other."""

    def __init__(self, agent: WorkerAgent) -> None:
        super().__init__(agent)
        self._ordered = self._followed = State.ACCEPTING
        self._following: asyncio.Task[None] | None = None

    def pause(self) -> None:
        """Stop accepting, in the loop. Called by a signal handler."""
        self._order(State.PAUSED)

    def resume(self) -> None:
        """Accept again, in the loop. Called by a signal handler."""
        self._order(State.ACCEPTING)

    def _order(self, state: State) -> None:
        self._ordered = state
        loop = self._event_loop()
        if loop is not None:
            loop.call_soon_threadsafe(self._follow_soon)

    def _follow_soon(self) -> None:
        if self._following is None or self._following.done():
            self._following = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while self._ordered is not self._followed:
            self._followed = self._ordered
            if self._followed is State.PAUSED:
                await self._pause()
                self._agent.done(WorkerEvent.PAUSED)
            else:
                if self._stays():
                    await self._resume()
                self._agent.done(WorkerEvent.RESUMED)

    # -- each adapter's own --------------------------------------------------------------------

    @abc.abstractmethod
    def _event_loop(self) -> asyncio.AbstractEventLoop | None:
        """The worker's loop; None if it does not run yet."""

    @abc.abstractmethod
    def _stays(self) -> bool:
        """Whether the worker is not about to end: such a one must not accept again."""

    @abc.abstractmethod
    async def _pause(self) -> None:
        """Stop accepting, and offer open connections to the new instance. May come twice."""

    @abc.abstractmethod
    async def _resume(self) -> None:
        """Accept again."""
