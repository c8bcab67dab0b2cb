"""What gunicorn's worker classes do not document is used in one place, and is there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import hotrestart_plugins.gunicorn
from hotrestart_plugins.gunicorn._compat.workers import BY_CLASS, missing_in
from hotrestart_plugins.gunicorn.adapters import base

HERE = Path(hotrestart_plugins.gunicorn.__file__).parent
FILES = [
    *sorted((HERE / "adapters").glob("*.py")),
    HERE / "worker_agent.py",
    HERE / "worker_ipc.py",
]
ATTRIBUTES = {name.attribute for names in BY_CLASS.values() for name in names}

OTHERS = {
    "loop": "the event loop of our AsgiWorker and TornadoWorker",
    "server": "the server of our TornadoWorker",
    "servers": "the servers of our AsgiWorker",
    "accept": "of a socket",
    "server_class": "of our GeventWorker",
}
"""Attributes that share a name with one of gunicorn's, and whose they are."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_private_names_are_used_in_compat_only(path: Path) -> None:
    """No attribute of the table, and no private one of a foreign object."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        place = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        private = node.attr.startswith("_") and not node.attr.endswith("__")
        # A class inside a function calls the adapter around it by that name.
        if private and ast.unparse(node.value) in ("self", "adapter"):
            continue
        assert not private, place
        assert node.attr in OTHERS or node.attr not in ATTRIBUTES, place


@pytest.mark.filterwarnings("ignore:The `uvicorn.workers` module:DeprecationWarning")
@pytest.mark.parametrize("path", BY_CLASS, ids=lambda path: path.rpartition(".")[2])
def test_the_installed_gunicorn_has_every_name(path: str) -> None:
    """Of each worker class."""
    module, _, name = path.rpartition(".")
    worker_class = getattr(importlib.import_module(module), name)
    assert missing_in(worker_class) == {}
    assert base.worker_kind(worker_class) == path


def test_every_known_class_has_an_adapter() -> None:
    assert set(base._ADAPTERS) == set(BY_CLASS)


def test_a_class_that_is_derived_from_a_known_one_is_treated_as_that() -> None:
    sync = importlib.import_module("gunicorn.workers.sync").SyncWorker
    derived = type("Derived", (sync,), {})
    assert base.worker_kind(derived) == "gunicorn.workers.sync.SyncWorker"
    assert base.worker_kind(dict) == ""


def test_what_gunicorn_stores_on_a_connections_class_is_where_gunicorn_reads_it() -> None:
    """It looks once whether its C parser is installed, and remembers the parser's class."""
    asgi = importlib.import_module("hotrestart_plugins.gunicorn._compat.asgi")
    gunicorns = importlib.import_module("gunicorn.asgi.protocol").ASGIProtocol
    before = set(vars(asgi.AsgiConnection))
    available = asgi.AsgiConnection._check_h1c_protocol_available()
    assert set(vars(asgi.AsgiConnection)) == before
    assert vars(gunicorns)["_h1c_available"] is available
