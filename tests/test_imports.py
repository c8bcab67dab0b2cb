"""Imports run downwards only, and importing the package costs no server."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hotrestart_plugins

PACKAGE = Path(hotrestart_plugins.__file__).parent
NAME = "hotrestart_plugins"

FLOORS = [
    {"errors", "settings"},
    {"core"},
    {"__init__"},
    {"app", "handover", "draining", "lifecycle"},
    {"starlette", "uvicorn"},
    {"gunicorn"},
    {"gunicorn_conf"},
]

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, at the top or anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == NAME:
                is_room = rest and any(rest[0] in floor for floor in FLOORS)
                found.add(rest[0] if rest and is_room else "__init__")
    return found


def floor(name: str) -> int:
    found = [number for number, rooms in enumerate(FLOORS) if name in rooms]
    assert found, f"{name} is new: say here on which floor it stands"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    """A room imports only rooms below it; the servers and the command never one another."""
    here = room(path)
    if here == "settings":
        assert imported(path) == {"errors"}
        return
    for there in imported(path) - {here}:
        assert floor(there) < floor(here), f"{here} imports {there}"


def test_the_core_imports_the_standard_library_alone() -> None:
    """No room of the core needs anything installed."""
    for path in FILES:
        if floor(room(path)) > floor("core"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                first = name.split(".")[0]
                assert first == NAME or first in sys.stdlib_module_names, f"{path}: {name}"


def test_messages_know_no_socket() -> None:
    """The messages are bytes: their room imports nothing that could move them."""
    assert "socket" not in (PACKAGE / "core/messages.py").read_text().split("import", 1)[1].split()


def test_importing_the_package_imports_no_server() -> None:
    """`import hotrestart_plugins` loads no uvicorn, gunicorn, asyncio or gevent."""
    code = "import sys, hotrestart_plugins; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"uvicorn", "gunicorn", "asyncio", "gevent", "socketserver", "ssl"}


def test_every_public_name_is_there() -> None:
    """`__all__` names what exists, each once."""
    names = hotrestart_plugins.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(hotrestart_plugins, name) for name in names)
