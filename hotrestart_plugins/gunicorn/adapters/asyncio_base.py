"""What the adapters of workers with an asyncio loop share: they follow the command in the loop.

The command comes by a signal, and may change while the last one is still being followed.
"""

from __future__ import annotations

import abc
import asyncio
from typing import TYPE_CHECKING

from hotrestart_plugins.gunicorn.worker_ipc import WorkerEvent

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent


class AsyncioAdapter(abc.ABC):
    """Pauses and resumes in a task of its own, one after the other."""

    def __init__(self, agent: WorkerAgent) -> None:
        self._agent = agent
        self._wanted = self._told = False
        self._changing: asyncio.Task[None] | None = None

    def pause(self) -> None:
        """From a signal handler: what follows is the loop's."""
        self._want(paused=True)

    def resume(self) -> None:
        """The same."""
        self._want(paused=False)

    def _want(self, *, paused: bool) -> None:
        self._wanted = paused
        loop = self._event_loop()
        if loop is not None:
            loop.call_soon_threadsafe(self._change)

    def _change(self) -> None:
        if self._changing is None or self._changing.done():
            self._changing = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while self._wanted != self._told:
            self._told = self._wanted
            if self._told:
                await self._pause()
                self._agent.done(WorkerEvent.PAUSED)
            else:
                if self._stays():
                    await self._resume()
                self._agent.done(WorkerEvent.RESUMED)

    # -- each adapter's own --------------------------------------------------------------------

    @abc.abstractmethod
    def _event_loop(self) -> asyncio.AbstractEventLoop | None:
        """The worker's loop; None: it does not run yet."""

    @abc.abstractmethod
    def _stays(self) -> bool:
        """Whether the worker is not about to end: then it is to accept nothing any more."""

    @abc.abstractmethod
    async def _pause(self) -> None:
        """Stop accepting, and offer what is open to the successor; once is enough."""

    @abc.abstractmethod
    async def _resume(self) -> None:
        """Accept again."""
