"""Stops gunicorn's dirty arbiter after the workers.

gunicorn stops it together with the workers, which still finish their requests: a request that needs
a dirty worker then fails or hangs.
"""

from __future__ import annotations

import signal
import time
from typing import Any

from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter
from hotrestart_plugins.gunicorn._compat.table import Feature, lacks

_GRACE = 2.0  # seconds for it to end if the workers have used up all of the time
_POLL_INTERVAL = 0.05  # seconds between two looks at whether it has


def outlives_workers(server: Arbiter) -> None:
    """Make the stop of this master spare the dirty arbiter until no worker is left."""
    if lacks(Feature.DIRTY_ARBITER):
        return
    # Not the instance's: this may have been called before.
    kind: Any = type(server)
    kill, reap = kind.kill_dirty_arbiter, kind.reap_dirty_arbiter
    spared = False

    def kill_dirty_arbiter(number: int) -> None:
        nonlocal spared
        if number == signal.SIGTERM and server.WORKERS:
            spared = True
            return
        if number == signal.SIGKILL and spared:
            # It was not asked to stop yet: its own workers and files would stay.
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
            arbiter._cleanup_sync()  # noqa: SLF001  # removes its files, which it can no longer do

    def reap_dirty_arbiter() -> None:
        nonlocal spared
        if spared and not server.WORKERS:
            spared = False
            kill(server, signal.SIGTERM)
        reap(server)

    server.kill_dirty_arbiter = kill_dirty_arbiter
    server.reap_dirty_arbiter = reap_dirty_arbiter
