"""The interface of the adapters, which worker class has which, and what several of them share."""

from __future__ import annotations

import abc
import enum
import importlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.gunicorn._compat import table
from hotrestart_plugins.gunicorn._compat.table import Feature, Name
from hotrestart_plugins.gunicorn._compat.workers import GunicornWorker, known_class, missing_in

if TYPE_CHECKING:
    from hotrestart_plugins.gunicorn.worker_agent import WorkerAgent


class State(enum.Enum):
    """What one worker does."""

    ACCEPTING = "accepting"
    PAUSED = "paused"
    """It accepts nothing, and can accept again."""
    LEAVING = "leaving"
    """It accepts nothing, finishes what is open, and ends."""


class WorkerAdapter(abc.ABC):
    """Controls one worker: lets connections in or not. Made in the worker, before its loop runs.

    gunicorn's signal handlers run in the worker's main thread, and so do `pause` and `resume`.
    """

    def __init__(self, agent: WorkerAgent) -> None:
        self._agent = agent
        self._state = State.ACCEPTING

    @abc.abstractmethod
    def ready(self) -> None:
        """The worker has entered its loop."""

    @abc.abstractmethod
    def pause(self) -> None:
        """Stop accepting; report `WorkerEvent.PAUSED` to the agent when that is so."""

    @abc.abstractmethod
    def resume(self) -> None:
        """Accept again; report `WorkerEvent.RESUMED` to the agent when that is so.

        A worker that is leaving accepts nothing, and reports all the same that it has understood.
        """

    @abc.abstractmethod
    def stats(self) -> DrainStats:
        """What has become of the connections that were open when the last pause began."""


class _Registered(NamedTuple):
    module: str
    name: str
    has_event_loop: bool = False
    """Whether the app can be asked something only inside the worker's event loop."""


_ADAPTERS = {
    "gunicorn.workers.sync.SyncWorker": _Registered("sync", "SyncAdapter"),
    "gunicorn.workers.gthread.ThreadWorker": _Registered("gthread", "GthreadAdapter"),
    "gunicorn.workers.ggevent.GeventWorker": _Registered("gevent", "GeventAdapter"),
    "gunicorn.workers.gtornado.TornadoWorker": _Registered("tornado", "TornadoAdapter"),
    "gunicorn.workers.gasgi.ASGIWorker": _Registered("asgi", "AsgiAdapter", True),
    "uvicorn_worker._workers.UvicornWorker": _Registered(
        "uvicorn_worker", "UvicornWorkerAdapter", True
    ),
    "uvicorn.workers.UvicornWorker": _Registered("uvicorn_worker", "UvicornWorkerAdapter", True),
}


def worker_kind(worker_class: type) -> str:
    """The known worker class that it is, or is derived from, if that can be paused; else ''."""
    return "" if Feature.PAUSE in missing_in(worker_class) else known_class(worker_class)


def has_event_loop(worker_class: type) -> bool:
    """Whether the app of such a worker can be asked something only inside its event loop."""
    known = known_class(worker_class)
    return bool(known) and _ADAPTERS[known].has_event_loop


def create_adapter(worker: GunicornWorker, agent: WorkerAgent) -> WorkerAdapter | None:
    """The adapter of a worker; None if its class is not known, or cannot be paused."""
    kind = worker_kind(type(worker))
    if not kind:
        return None
    # Imported where it is needed: a worker of one class has no use for another's libraries.
    registered = _ADAPTERS[kind]
    module = importlib.import_module(f"{__package__}.{registered.module}")
    adapter_class: Callable[[object, WorkerAgent], WorkerAdapter] = getattr(module, registered.name)
    return adapter_class(worker, agent)


_WITHOUT_ADAPTER = {
    Feature.HOT_RESTART,
    Feature.STOP_WHILE_STARTING,
    Feature.PAUSE,
    Feature.PROBE,
}
"""What workers do that have no adapter."""

_said: set[type] = set()


def say_what_is_missing(worker_class: type, journal: Journal, *, has_probe: bool) -> bool:
    """Log what gunicorn lacks for this class, one line for each feature; once for each class.

    Returns whether hot restart works without it. Called in the master.
    """
    if worker_class not in _said:
        _said.add(worker_class)
        table.say(_switched_off(worker_class, has_probe=has_probe), journal)
    return Feature.HOT_RESTART not in missing_in(worker_class)


def _switched_off(worker_class: type, *, has_probe: bool) -> dict[Feature, Sequence[Name]]:
    """The features that a user misses, with the names that they need."""
    lacking = dict(missing_in(worker_class))
    if Feature.PAUSE in lacking:
        lacking = {feature: lacking[feature] for feature in _WITHOUT_ADAPTER & lacking.keys()}
        if has_event_loop(worker_class):
            lacking.setdefault(Feature.PROBE, lacking[Feature.PAUSE])
    if not has_probe:
        lacking.pop(Feature.PROBE, None)
    return lacking


class DrainCounter:
    """Counts what becomes of connections, where only their number is known."""

    def __init__(self) -> None:
        self._open = 0

    def begin(self, open_connections: int) -> None:
        """Count from here on."""
        self._open = open_connections

    def ended(self, open_connections: int) -> int:
        """How many have ended, now that this many are open."""
        return max(0, self._open - open_connections)

    def stats(
        self,
        open_connections: int,
        answers: int,
        *,
        handed_over: int = 0,
        idle: int = 0,
        ends: bool,
    ) -> DrainStats:
        """What has become of those that were open: `answers` were given since.

        `ends`: the worker closes now what is still open; `idle` of them have no request.
        """
        stats = DrainStats.by_numbers(self._open, open_connections, answers, handed_over)
        if ends:
            stats.aborted_idle = idle
            stats.aborted_requests = max(0, open_connections - idle)
        return stats


class LastRequests:
    """Lets idle connections wait for one more request before a worker ends.

    gunicorn closes them as soon as it is told to end, and a client may have just sent a request.
    The answer to it says that the connection closes. Half of the time to end is for that; the rest
    is for the requests that are in flight then.
    """

    def __init__(self, open_connections: Callable[[], int], seconds: float) -> None:
        """`seconds`: that the worker has to end."""
        self._open_connections = open_connections
        self._latest = time.monotonic() + seconds / 2

    @property
    def over(self) -> bool:
        """Whether no connection is left, or the time has passed."""
        return not self._open_connections() or time.monotonic() >= self._latest
