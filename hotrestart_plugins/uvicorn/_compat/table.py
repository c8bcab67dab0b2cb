"""Names of uvicorn's own, what needs each, and whether the installed uvicorn has them."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple

from hotrestart_plugins.core import private_names


class Feature(enum.Enum):
    """What is switched off if a name is missing; the value says what happens instead."""

    HOT_RESTART = "hot restart is off; this instance serves, and cannot be replaced"
    SUPERVISOR = "hot restart of several workers is off; they serve, and cannot be replaced"
    CONNECTION_HANDOVER = "connections are drained instead of handed over"
    ANNOUNCE_CLOSE = "a wrapper of the app announces the close; HTTP/2 is not told"
    EVENT_STREAMS = "event streams go on until the drain timeout"
    WEBSOCKETS = "WebSockets go on until the drain timeout"
    STATISTICS = "the drain does not count requests"
    REQUEST_LIMIT = "an instance that has reached --limit-max-requests cannot serve again"
    GUNICORN_WORKER = "gunicorn's worker_exit does not run for a uvicorn worker"
    QUICK_CTRL_C = "Ctrl-C waits for idle connections"


class Name(NamedTuple):
    """One row: a name that belongs to uvicorn."""

    owner: str
    """The dotted path of the module or class that has it."""
    attribute: str
    feature: Feature
    """What needs it."""
    since: str = ""
    """The first release that has it; empty: every supported one."""

    def __str__(self) -> str:
        return f"{self.owner.rpartition('.')[2]}.{self.attribute}"


def missing(names: Iterable[Name]) -> dict[Feature, list[Name]]:
    """Return the rows whose name the installed uvicorn does not have, by what needs them.

    A module that is missing as a whole is one of an optional protocol, which nobody speaks then.
    """
    found: dict[Feature, list[Name]] = {}
    for name in names:
        owner = private_names.find(name.owner)
        if owner is not private_names.Absent and not private_names.has(owner, name.attribute):
            found.setdefault(name.feature, []).append(name)
    return found
