"""Names of uvicorn's own, what needs each, and whether the installed uvicorn has them.

Nothing is imported for a look: a module that needs a parser which is not installed is judged by its
compiled code, like every other one.
"""

from __future__ import annotations

import dis
import enum
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import NamedTuple

_EMPTY = compile("", "", "exec")


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

    A class has an attribute if it defines it, or if one of its methods assigns it to an object.
    Its base classes are not looked at: no class in the table inherits from one of uvicorn's. A
    module that is missing as a whole is one of an optional protocol, which nobody speaks then.
    """
    found: dict[Feature, list[Name]] = {}
    for name in names:
        code = _code_of(name.owner)
        if code is not None and not _assigns(code, name.attribute):
            found.setdefault(name.feature, []).append(name)
    return found


def _assigns(code: CodeType, name: str) -> bool:
    """Whether the code, or a function in it, defines the name or assigns it to an object."""
    if name in code.co_names and any(
        step.argval == name and step.opname in ("STORE_ATTR", "STORE_NAME")
        for step in dis.get_instructions(code)
    ):
        return True
    return any(_assigns(inner, name) for inner in _inner(code))


@functools.cache
def _code_of(owner: str) -> CodeType | None:
    """Return the compiled code of a module, or of a class in it; None if there is no such module.

    A class that the module lacks has no names: the code is empty.
    """
    parent, _, last = owner.rpartition(".")
    code = _code_of_module(owner)
    if code is not None:
        return code
    code = _code_of_module(parent)
    if code is None:
        return None
    return next((inner for inner in _inner(code) if inner.co_name == last), _EMPTY)


def _code_of_module(name: str) -> CodeType | None:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    get_code = getattr(spec.loader, "get_code", None) if spec is not None else None
    return None if get_code is None else get_code(name)


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
