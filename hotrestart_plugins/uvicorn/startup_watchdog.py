"""The ready timeout of a process of its own: nothing else ends an import that hangs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType


class StartupWatchdog:
    """Ends this process if it is not disarmed in time. A thread, since the main one may hang."""

    def __init__(self, give_up: Callable[[str | None], int]) -> None:
        """`give_up` is told where the main thread hangs, and returns the exit status.

        None: in no code of its own; its loop waits, and so does what runs on it.
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
        """The process is ready, or ends by itself. Waits for the end where the time is over."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _on_timeout(self) -> None:
        with self._lock:
            if self._timer is None:
                return
            frame = sys._current_frames().get(self._main)  # noqa: SLF001 (where it hangs)
            status = self._give_up(_place(frame) if frame else None)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _place(frame: FrameType) -> str | None:
    """File and line; None for those in which a loop waits, uvloop's being the runner's."""
    module = str(frame.f_globals.get("__name__"))
    # uvicorn has a runner of its own for Pythons before 3.12.
    if module.partition(".")[0] in ("asyncio", "selectors") or module == "uvicorn._compat":
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
