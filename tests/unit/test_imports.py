"""Imports run downwards only, and importing the package costs no server."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import hotrestart_plugins

PACKAGE = Path(hotrestart_plugins.__file__).parent
NAME = "hotrestart_plugins"

GROUND = {"errors", "settings"}
ALLOWED = {
    "": {"core", *GROUND},  # what `import hotrestart_plugins` gives
    "errors": set(),
    "settings": {"errors"},
    "core": GROUND,
    "app": GROUND,
    "starlette": {"app", *GROUND},
    "gunicorn_conf": {"gunicorn", *GROUND},
}
"""What each file and folder at the top may import of this package, beside itself."""

BELOW = {"core", "handover", "draining", "lifecycle", "app", *GROUND}
for folder in ("handover", "draining", "lifecycle"):
    ALLOWED[folder] = {"core", *GROUND}
for server in ("uvicorn", "gunicorn"):
    ALLOWED[server] = BELOW

EXCEPTIONS = {
    # It runs uvicorn's server inside a worker of gunicorn's.
    "gunicorn/adapters/uvicorn_worker.py": {"uvicorn.draining_server"},
}
"""What a single file may import besides."""

FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room(path: Path) -> str:
    """The file or folder at the top that a file is in; '' for the package's own `__init__`."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def names_imported(path: Path) -> set[str]:
    """Every dotted name that a file imports, at the top or anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours_imported(path: Path) -> set[str]:
    """What a file imports of this package: names behind `hotrestart_plugins.`."""
    parts = [name.split(".") for name in names_imported(path)]
    return {".".join(rest) for first, *rest in parts if first == NAME}


def is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_run_downwards(path: Path) -> None:
    """A folder imports only what is below it; the servers never import one another."""
    here = room(path)
    assert here in ALLOWED, f"{here} is new: say here what it may import"
    exceptions = EXCEPTIONS.get(relative(path), set())
    for name in ours_imported(path):
        there = name.split(".")[0]
        allowed = there in {here, *ALLOWED[here]} or any(is_in(name, one) for one in exceptions)
        assert allowed, f"{relative(path)} imports {name}"


def test_no_file_below_the_servers_imports_itself() -> None:
    """Not through others either: what imports what has an order, from the ground up."""
    modules = {relative(path).removesuffix(".py").replace("/", "."): path for path in FILES}
    graph = {
        module: {other for name in ours_imported(path) for other in modules if is_in(name, other)}
        for module, path in modules.items()
        if room(path) not in {"uvicorn", "gunicorn", "gunicorn_conf"}
    }
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)


def test_every_exception_is_needed() -> None:
    """No exception outlives the import that it was made for."""
    for file, modules in EXCEPTIONS.items():
        names = ours_imported(PACKAGE / file)
        assert all(any(is_in(name, module) for name in names) for module in modules), file


def test_the_core_imports_the_standard_library_alone() -> None:
    """Nothing in the core, or in what it imports, needs anything installed."""
    for path in FILES:
        if room(path) not in {"", "core", "app", *GROUND}:
            continue
        for name in names_imported(path):
            first = name.split(".")[0]
            assert first == NAME or first in sys.stdlib_module_names, f"{path}: {name}"


def test_messages_know_no_socket() -> None:
    """The messages are bytes: their file imports nothing that could move them."""
    names = names_imported(PACKAGE / "core/messages.py")
    assert not {name.split(".")[0] for name in names} & {"socket", "_socket"}


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
