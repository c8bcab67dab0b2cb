"""The interface of the adapters, and which worker class has which."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Protocol

from hotrestart_plugins.draining.stats import DrainStats

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent

_KINDS = {
    "gunicorn.workers.sync.SyncWorker": "sync",
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gunicorn.workers.ggevent.GeventWorker": "gevent",
    "gunicorn.workers.gtornado.TornadoWorker": "tornado",
    "gunicorn.workers.gasgi.ASGIWorker": "asgi",
    "uvicorn_worker._workers.UvicornWorker": "uvicorn",
    "uvicorn.workers.UvicornWorker": "uvicorn",
}

_ADAPTERS = {
    "sync": ("sync", "SyncAdapter"),
    "gthread": ("gthread", "GthreadAdapter"),
    "gevent": ("gevent", "GeventAdapter"),
    "tornado": ("tornado", "TornadoAdapter"),
    "asgi": ("asgi", "AsgiAdapter"),
    "uvicorn": ("uvicorn_worker", "UvicornWorkerAdapter"),
}
WITH_EVENT_LOOP = ("asgi", "uvicorn")


def worker_kind(worker_class: type) -> str:
    """Which of the known worker classes it is, or is derived from; '' for any other."""
    names = (f"{one.__module__}.{one.__qualname__}" for one in worker_class.__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), "")


def replace_where_defined(
    worker_class: type, name: str, original: object, replacement: object
) -> None:
    """In the modules that define the worker class, whose methods look the name up there."""
    for one in worker_class.__mro__:
        module = sys.modules.get(one.__module__)
        if getattr(module, name, None) is original:
            setattr(module, name, replacement)


class WorkerAdapter(Protocol):
    """What lets connections into one worker; made with the worker and its `WorkerAgent`.

    Calls come in the worker's main thread.
    """

    def ready(self) -> None:
        """The worker has entered its loop."""

    def pause(self) -> None:
        """Accept nothing from now on; call back when that is so."""

    def resume(self) -> None:
        """Accept again; call back when that is so."""

    def stats(self) -> DrainStats:
        """What has become, since the last pause, of what was open then."""


def create_adapter(kind: str, worker: Any, agent: WorkerAgent) -> WorkerAdapter | None:
    """The adapter of a worker whose class is of that `worker_kind`; None for ''."""
    if not kind:
        return None
    # Imported where it is needed: a worker of one class has no use for another's libraries.
    module, name = _ADAPTERS[kind]
    adapter_class = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    adapter: WorkerAdapter = adapter_class(worker, agent)
    return adapter
