"""Names of gunicorn's own, what needs each, and whether the installed gunicorn has them."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import gunicorn

from hotrestart_plugins.core import events, private_names
from hotrestart_plugins.core.journal import Journal


class Feature(enum.Enum):
    """What is switched off if a name is missing; the value says what happens instead."""

    HOT_RESTART = "hot restart is off; this instance serves, and cannot be replaced"
    ROLLBACK = "at a takeover the workers are stopped at once, and cannot serve again"
    PID_FILE = "no pid file is written"
    CONTROL_SOCKET = "gunicorn's control socket does not pass to the new instance"
    DIRTY_ARBITER = "the dirty arbiter is stopped together with the workers"
    OWN_DIRTY_ARBITER = "a new instance's dirty arbiter kills the one of this instance"
    CHANGE_ADDRESSES = "SIGHUP does not change the addresses"
    CHECK_TLS = "the certificate is not checked before a takeover"
    SYSTEMD = "systemd is not told which process is the main one"
    FAST_START = "a new instance starts its workers with gunicorn's pauses between them"
    STOP_WHILE_STARTING = "a worker that is still starting can miss a signal that stops it"
    STOP_WHOLLY = "a worker that fails to start while gunicorn stops can cut the stop short"
    PAUSE = "at a takeover its workers are stopped at once, and cannot serve again"
    HANDOVER = "connections are drained instead of handed over"
    CLOSE = "connections are closed without being told before"
    END_LONG_CONNECTIONS = "WebSockets and event streams are cut off when the drain ends"
    LOSE_MASTER = "workers end at once if the master is killed"
    PROBE = "the app is not asked before it serves (hotrestart_probe)"


class Name(NamedTuple):
    """One row: a name that belongs to gunicorn."""

    owner: str
    """The dotted path of the module, class or list of settings that has it."""
    attribute: str
    feature: Feature
    """What needs it; a name that two features need has two rows."""
    since: str = ""
    """The first release that has it; empty: every supported one."""
    composed: bool = False
    """Whether gunicorn puts the name together when it runs, as it does with ``handle_term``."""


_lacking: set[Feature] = set()


def lacks(feature: Feature) -> bool:
    """Whether `check` has found that the installed gunicorn lacks what the feature needs."""
    return feature in _lacking


def check(names: Iterable[Name]) -> dict[Feature, list[Name]]:
    """As `missing`, and `lacks` answers accordingly from now on."""
    found = missing(names)
    _lacking.update(found)
    return found


def missing(names: Iterable[Name]) -> dict[Feature, list[Name]]:
    """Return the rows whose name the installed gunicorn does not have, by what needs them."""
    found: dict[Feature, list[Name]] = {}
    for name in names:
        if not private_names.has(private_names.find(name.owner), name.attribute):
            found.setdefault(name.feature, []).append(name)
    return found


def say(lacking: Mapping[Feature, Sequence[Name]], journal: Journal) -> None:
    """Log each feature that is off in a line of its own, with the names that it needs."""
    for feature, names in lacking.items():
        journal.emit(
            events.NAMES_MISSING,
            server=f"gunicorn {gunicorn.__version__}",
            names=", ".join(f"{name.owner}.{name.attribute}" for name in names),
            instead=feature.value,
        )
