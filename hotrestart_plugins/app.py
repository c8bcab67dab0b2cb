"""What an app may ask of the instance that it runs in: whether it is being replaced.

In a handler that streams for long, async or plain::

    from hotrestart_plugins.app import drain

    while not drain.is_set(): ...           # plain code, any thread
    await drain.begun()                     # async code
    drain.call_when_begun(callback)         # either

A server that never drains costs nothing: nobody looks at this but the app.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class DrainSignal:
    """Set in a process from when it stops accepting until it ends, or accepts again.

    Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def is_set(self) -> bool:
        """Whether this process drains: it accepts nothing new, and will end."""
        return self._event.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Block until it drains, `seconds` at most (None: for ever); whether it does."""
        return self._event.wait(seconds)

    async def begun(self) -> None:
        """Return when it drains."""
        import asyncio  # noqa: PLC0415 (plain workers have no use for it, and start without)

        loop = asyncio.get_running_loop()
        begun: asyncio.Future[None] = loop.create_future()

        def arrive() -> None:
            if not begun.done():
                begun.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(arrive)

        self.call_when_begun(wake)
        try:
            await begun
        finally:
            self.forget(wake)

    def call_when_begun(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when it drains; now, if it does. It must not block."""
        with self._lock:
            if not self._event.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Do not call it any more."""
        with self._lock, contextlib.suppress(ValueError):
            self._callbacks.remove(callback)

    def set(self) -> None:
        """The server's: this process drains."""
        with self._lock:
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def clear(self) -> None:
        """The server's: it accepts again, after a rollback."""
        self._event.clear()


drain = DrainSignal()
"""This process's."""
