"""gunicorn's dirty arbiter: the last to go.

gunicorn stops it together with the workers that finish their requests, which then fail, or hang,
if they need a dirty worker.
"""

from __future__ import annotations

import signal
import time
from typing import Any

_GRACE = 2.0  # seconds that it has where the workers have used up all of the time
_POLL_INTERVAL = 0.05  # seconds between two looks at it, then


def outlives_workers(server: Any) -> None:
    """Have this master's stop spare the dirty arbiter until no worker is left."""
    kill, reap = type(server).kill_dirty_arbiter, type(server).reap_dirty_arbiter
    spared = False

    def kill_dirty_arbiter(number: int) -> None:
        nonlocal spared
        if number == signal.SIGTERM and server.WORKERS:
            spared = True
            return
        if number == signal.SIGKILL and spared:
            # It has not been told to go yet, and its own workers and files would be left behind.
            spared = False
            kill(server, signal.SIGTERM)
            limit = time.monotonic() + _GRACE
            while server.dirty_arbiter_pid and time.monotonic() < limit:
                time.sleep(_POLL_INTERVAL)
                reap(server)
        arbiter, pid = server.dirty_arbiter, server.dirty_arbiter_pid
        kill(server, number)
        if number == signal.SIGKILL and arbiter is not None:
            arbiter.pid = pid
            arbiter._cleanup_sync()  # noqa: SLF001  # its files, which it cannot remove now

    def reap_dirty_arbiter() -> None:
        nonlocal spared
        if spared and not server.WORKERS:
            spared = False
            kill(server, signal.SIGTERM)
        reap(server)

    server.kill_dirty_arbiter = kill_dirty_arbiter
    server.reap_dirty_arbiter = reap_dirty_arbiter
