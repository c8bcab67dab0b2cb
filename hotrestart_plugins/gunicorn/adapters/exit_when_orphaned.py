"""A worker whose master was killed: it goes, but cuts nothing off."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def exit_when_orphaned(worker: Any, leave: Callable[[], None]) -> None:
    """Have `leave` called once if the master dies, in the place of gunicorn's abrupt end.

    For the classes that look for it just after their heartbeat.
    """

    def notify() -> None:
        parent = os.getppid()
        if worker.ppid != parent:
            worker.log.info("Parent changed, shutting down: %s", worker)
            worker.ppid = parent
            leave()
        type(worker).notify(worker)

    worker.notify = notify
