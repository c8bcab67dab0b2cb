"""A worker whose master was killed: it ends, but finishes what it has begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hotrestart_plugins.core import events
from hotrestart_plugins.gunicorn._compat.workers import Worker

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent


def exit_when_orphaned(worker: Worker[Any], agent: WorkerAgent, leave: Callable[[], None]) -> None:
    """Call `leave` once if the master dies, instead of ending at once as gunicorn does.

    For the classes in which gunicorn looks for its master just after the heartbeat.
    """
    has_left = False

    def look() -> None:
        nonlocal has_left
        if not agent.has_lost_master:
            return
        worker.accept_new_parent()
        if not has_left:
            has_left = True
            agent.journal.emit(events.MASTER_ENDED, worker=worker.raw)
            leave()

    worker.before_each_heartbeat(look)
