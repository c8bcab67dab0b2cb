"""The catalogue of events: each is said with its own fields, and nothing is said past it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hotrestart_plugins
from hotrestart_plugins.core import events
from hotrestart_plugins.core.events import CATALOGUE, Event, Logger
from hotrestart_plugins.core.journal import Journal

PACKAGE = Path(hotrestart_plugins.__file__).parent
NOT_FIELDS = {"traceback", "facts"}  # parameters of `emit` itself


def emits() -> Iterator[tuple[str, str, set[str]]]:
    """Every call of `emit` in the package: where, which event, with which keywords."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr != "emit" or not node.args:
                continue
            event = node.args[0]
            where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            assert isinstance(event, ast.Attribute), f"{where}: name the event"
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            if ast.unparse(event.value) == "self":  # one that was given, which has no fields
                assert keywords <= NOT_FIELDS, where
                continue
            assert ast.unparse(event.value) == "events", f"{where}: name the event"
            yield where, event.attr, keywords


def test_names_are_unique_and_fit_for_programs() -> None:
    names = [event.name for event in CATALOGUE]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name) for name in names)
    assert all(getattr(events, event.name.upper()) is event for event in CATALOGUE)


def test_every_level_is_one_of_a_logger() -> None:
    levels = {name for name in vars(Logger) if not name.startswith("_")}
    assert {event.level for event in CATALOGUE} <= levels | {""}


def test_every_event_is_said_with_its_fields() -> None:
    """A field that is missing would fail just when something has happened."""
    for where, name, keywords in emits():
        event: Event = getattr(events, name)
        assert keywords - NOT_FIELDS == event.fields, f"{where}: {name}"


def test_a_value_cannot_forge_a_line() -> None:
    text = events.TAKEOVER_FAILED.text(reason="a\nb\x1b[31m", pid=3)
    assert text.isprintable()
    assert "pid 3" in text


def test_an_event_is_written_once_at_its_level() -> None:
    class Lines:
        def __init__(self) -> None:
            self.written: list[tuple[str, str]] = []

        def __getattr__(self, level: str) -> Any:
            return lambda text, *args, **_: self.written.append((level, text % args))

    lines: Any = Lines()
    Journal(lines).emit(events.TOOK_OVER, pid=7)
    assert lines.written == [("info", events.TOOK_OVER.text(pid=7))]


def test_a_missing_field_is_a_fault_of_the_caller() -> None:
    with pytest.raises(KeyError):
        events.TOOK_OVER.text()
