"""The ready timeout of a process: nothing else ends an import that hangs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType

from hotrestart_plugins.errors import NotReady
from hotrestart_plugins.uvicorn._compat.server import RUNNER_MODULE


class StartupWatchdog:
    """Ends this process if it is not disarmed in time. A thread, since the main one may hang."""

    def __init__(self, give_up: Callable[[str | None], int]) -> None:
        """`give_up` gets the place at which the main thread hangs, and returns the exit status.

        The place is None if the event loop waits, and the app with it.
        """
        self._give_up = give_up
        self._main = threading.main_thread().ident or 0
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def arm(self, seconds: float) -> None:
        """End the process after `seconds`."""
        self._timer = threading.Timer(seconds, self._on_timeout)
        self._timer.daemon = True
        self._timer.start()

    def disarm(self) -> None:
        """Leave the process alone: it is ready, or exits. Waits if it is being ended already."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _on_timeout(self) -> None:
        with self._lock:
            if self._timer is None:
                return
            frame = sys._current_frames().get(self._main)  # noqa: SLF001 (where it hangs)
            status = NotReady.status
            try:
                status = self._give_up(_place(frame) if frame else None)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:  # a full disk or a closed pipe must not keep it from ending
                os._exit(status)


def _place(frame: FrameType) -> str | None:
    """Return file and line; None if the event loop waits. uvloop's frame is that of its runner."""
    module = str(frame.f_globals.get("__name__"))
    if module.partition(".")[0] in ("asyncio", "selectors") or module == RUNNER_MODULE:
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
