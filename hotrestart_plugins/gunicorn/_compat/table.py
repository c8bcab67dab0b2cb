"""Names of gunicorn's own, what needs each, and whether the installed gunicorn has them.

Nothing is imported for a look: a module that is not loaded is judged by its compiled code.
gunicorn's control socket and its dirty arbiter import asyncio, which must not be loaded in the
master before a gevent worker patches it.
"""

from __future__ import annotations

import dis
import enum
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from types import CodeType, FunctionType
from typing import NamedTuple


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
    """The rows whose name the installed gunicorn does not have, by what needs them.

    An attribute that exists only on instances counts as there if a method of the class, or of a
    base class, assigns it.
    """
    found: dict[Feature, list[Name]] = {}
    for name in names:
        if not _has(_find(name.owner), name.attribute):
            found.setdefault(name.feature, []).append(name)
    return found


def _find(owner: str) -> object:
    """The owner itself if it is loaded, else its code; None if there is none."""
    parts = owner.split(".")
    for length in range(len(parts), 0, -1):
        found: object = sys.modules.get(".".join(parts[:length]))
        if found is not None:
            for part in parts[length:]:
                found = getattr(found, part, None)
            return _code_of(parts) if found is None else found
    return _code_of(parts)


def _code_of(parts: list[str]) -> CodeType | None:
    """The compiled code of a module or of a class in it. The module is not run."""
    path: list[str] | None = None
    code: CodeType | None = None
    for number in range(len(parts)):
        name = ".".join(parts[: number + 1])
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            break
        get_code = getattr(spec.loader, "get_code", None)
        code = None if get_code is None else get_code(name)
        path = spec.submodule_search_locations
        if path is None:
            number += 1  # noqa: PLW2901  # what follows is in this module
            break
    for part in parts[number:]:
        if code is not None:
            code = next((inner for inner in _inner(code) if inner.co_name == part), None)
    return code


def _has(owner: object, attribute: str) -> bool:
    if isinstance(owner, CodeType):
        return _assigns(owner, attribute)
    if isinstance(owner, list):  # gunicorn.config.KNOWN_SETTINGS
        return any(setting.name == attribute for setting in owner)
    if hasattr(owner, attribute):
        return True
    return isinstance(owner, type) and any(
        isinstance(function, FunctionType) and _assigns(function.__code__, attribute)
        for base in owner.__mro__
        for function in vars(base).values()
    )


def _assigns(code: CodeType, name: str) -> bool:
    """Whether the code, or a function in it, defines the name or assigns it to ``self``."""
    if name in code.co_names:
        loaded: object = None
        for step in dis.get_instructions(code):
            if step.opname == "STORE_NAME" and step.argval == name:
                return True
            if step.opname == "STORE_ATTR" and step.argval == name and loaded == "self":
                return True
            if step.opname != "EXTENDED_ARG":
                # Later Pythons load two variables at once; the object is the last of them.
                loaded = (
                    step.argval[-1]
                    if isinstance(step.argval, tuple) and step.argval
                    else step.argval
                )
    return any(_assigns(inner, name) for inner in _inner(code))


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
