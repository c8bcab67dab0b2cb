"""Whether an installed package has a name of its own that this package uses.

A release of a server may rename what it never documented. Each server's table of such names is
compared with the installed release at the start, by the functions here.

Nothing is imported for a look: a module that is not loaded is judged by its compiled code. Some
modules must not be loaded yet (asyncio, before gevent patches it), some cannot be (a parser that is
not installed).
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, FunctionType


class Absent:
    """What `find` returns for a module that is not there, which has no names to look for."""


class Unreadable:
    """What `find` returns for code that this user may not read; it is believed to be complete."""


def find(owner: str) -> object:
    """Return what a dotted path names: a module, a class or a list, or its code if not loaded.

    None if its module does not have it; `Absent` if there is no such module, `Unreadable` if it
    cannot be read.
    """
    parts = owner.split(".")
    for length in range(len(parts), 0, -1):
        found: object = sys.modules.get(".".join(parts[:length]))
        if found is not None:
            for part in parts[length:]:
                found = getattr(found, part, None)
            return _code_of(owner) if found is None else found
    return _code_of(owner)


def has(owner: object, attribute: str) -> bool:
    """Whether what `find` returned has the attribute.

    A class has it if it defines it, or if a method of it, or of a base class, assigns it to
    ``self``; a list (gunicorn's settings) if one of its elements has that name.
    """
    if owner is Unreadable:
        return True
    if isinstance(owner, CodeType):
        return _assigns(owner, attribute)
    if isinstance(owner, list):
        return any(element.name == attribute for element in owner)
    if hasattr(owner, attribute):
        return True
    return isinstance(owner, type) and any(
        isinstance(function, FunctionType) and _assigns(function.__code__, attribute)
        for base in owner.__mro__
        for function in vars(base).values()
    )


@functools.cache
def _code_of(owner: str) -> CodeType | type[Absent | Unreadable] | None:
    """The compiled code of a module or of a class in it. The module is not run."""
    try:
        return _read(owner)
    except OSError:  # gunicorn's workers can run as another user
        return Unreadable


def _read(owner: str) -> CodeType | type[Absent] | None:
    parts = owner.split(".")
    spec: ModuleSpec | None = None
    path: list[str] | None = None
    rest = parts
    while rest:
        found = PathFinder.find_spec(".".join(parts[: len(parts) - len(rest) + 1]), path)
        if found is None:
            break
        spec, path, rest = found, found.submodule_search_locations, rest[1:]
        if path is None:  # a module: what follows is in it
            break
    if spec is None or (path is not None and len(rest) > 1):
        return Absent
    get_code = getattr(spec.loader, "get_code", None)
    code: CodeType | None = None if get_code is None else get_code(spec.name)
    for part in rest:
        if code is not None:
            code = next((inner for inner in _inner(code) if inner.co_name == part), None)
    return code


def _assigns(code: CodeType, name: str) -> bool:
    """Whether the code, or a function in it, defines the name or assigns it to ``self``."""
    if name in code.co_names and name in _assigned(code):
        return True
    return any(_assigns(inner, name) for inner in _inner(code))


@functools.cache
def _assigned(code: CodeType) -> frozenset[str]:
    """What the code itself defines, or assigns to ``self``."""
    names: set[str] = set()
    loaded: object = None
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME" or (step.opname == "STORE_ATTR" and loaded == "self"):
            names.add(step.argval)
        if step.opname != "EXTENDED_ARG":
            # Later Pythons load two variables at once; the object is the last of them.
            is_pair = isinstance(step.argval, tuple) and step.argval
            loaded = step.argval[-1] if is_pair else step.argval
    return frozenset(names)


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
