"""gunicorn's own names stand in the tables of `_compat`, and nowhere else."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import hotrestart_plugins
from hotrestart_plugins.gunicorn._compat import arbiter, workers
from hotrestart_plugins.gunicorn._compat.table import Feature, Name, missing

PACKAGE = Path(hotrestart_plugins.__file__).parent
FOLDER = PACKAGE / "gunicorn"
FILES = [
    PACKAGE / "gunicorn_conf.py",
    *sorted(FOLDER.glob("*.py")),
]
OBJECTS = {"server", "cfg", "config"}
"""What the master's files call gunicorn's objects, with or without an underscore."""


def test_the_installed_gunicorn_has_every_name() -> None:
    assert missing(arbiter.NAMES) == {}


def test_no_row_stands_twice() -> None:
    rows = (*arbiter.NAMES, *workers.NAMES)
    names = [(name.owner, name.attribute, name.feature) for name in rows]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", arbiter.NAMES, ids=lambda name: name.attribute)
def test_a_name_that_is_gone_is_missed(name: Name) -> None:
    """The look at the installed gunicorn can fail: for this owner, with another name."""
    gone = name._replace(attribute=f"{name.attribute}_of_old")
    assert missing([gone]) == {name.feature: [gone]}


def test_every_feature_is_needed() -> None:
    needed = {name.feature for name in (*arbiter.NAMES, *workers.NAMES)}
    assert needed == set(Feature)


def test_the_look_imports_nothing() -> None:
    """asyncio must not be loaded before a gevent worker patches it."""
    code = (
        "import sys, gunicorn.arbiter\n"
        "from hotrestart_plugins.gunicorn._compat import arbiter, table\n"
        "assert not table.missing(arbiter.NAMES)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert not set(done.stdout.split()) & {"asyncio", "gunicorn.dirty", "gunicorn.ctl.server"}


def last_name(node: ast.expr) -> str:
    """What an object is called where an attribute of it is used: ``a.b.c`` is 'c'."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_file_uses_them(path: Path) -> None:
    """No import of gunicorn; no private name of another object; none of the tables' names."""
    tree = ast.parse(path.read_text())
    names = {name.attribute for name in itertools.chain(arbiter.NAMES, workers.NAMES)}
    documented = {"control_socket_disable", "dirty_workers", "dirty_apps", "pidfile", "proc_name"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "gunicorn" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.module.split(".")[0] != "gunicorn"
        elif isinstance(node, ast.Attribute):
            owner = last_name(node.value)
            where = f"{path.name}:{node.lineno}: {owner}.{node.attr}"
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                assert owner in {"self", "cls", "os", "sys"}, where
            if owner.lstrip("_") in OBJECTS:
                assert node.attr not in names - documented, where
