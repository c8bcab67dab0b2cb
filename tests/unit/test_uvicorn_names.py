"""What is uvicorn's own is named in uvicorn/_compat/ and nowhere else."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from hotrestart_plugins.uvicorn._compat.names import NAMES, features_off
from hotrestart_plugins.uvicorn._compat.table import Feature, Name, missing

FOLDER = Path(importlib.import_module("hotrestart_plugins.uvicorn").__file__ or "").parent
FILES = [*sorted(FOLDER.glob("*.py")), FOLDER.parent / "gunicorn/adapters/uvicorn_worker.py"]
OTHERS_HAVE_IT = {
    "startup": "methods of our own that uvicorn calls, and their `super()`",
    "shutdown": "the same",
    "start": "threads have it",
    "server": "our own, of a worker process",
    "should_exit": "a documented name of Server; Multiprocess has it, too",
    "started": "the same",
    "load": "none of uvicorn's",
    "transport": "asyncio's",
    "timeout_keep_alive": "a documented setting of Config; each connection has it, too",
    "flush": "files have it",
    "processes": "our own function for it",
    "state": "our lifecycle's",
    "Process": "our own name for it",
    "handle_exit": "a method of ours that uvicorn calls, and its `super()`",
    "limit_max_requests": "the same",
    "on_tick": "the same",
    "capture_signals": "the same",
    "init_processes": "the same",
    "terminate_all": "the same",
    "join_all": "the same",
    "keep_subprocess_alive": "the same",
    "handle_signals": "the same",
}


def attributes(path: Path) -> set[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    return {(node.attr, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_file_names_what_is_uvicorns_own(path: Path) -> None:
    names = {name.attribute for name in NAMES} - OTHERS_HAVE_IT.keys()
    found = {(attribute, line) for attribute, line in attributes(path) if attribute in names}
    assert not found


def test_no_exception_is_out_of_date() -> None:
    assert OTHERS_HAVE_IT.keys() <= {name.attribute for name in NAMES}


def test_this_uvicorn_has_every_name() -> None:
    assert not features_off()


def test_a_name_that_is_gone_is_found_missing() -> None:
    """Of a module, of a class, and of its instances; a module that is missing misses nothing."""
    names = [
        Name("uvicorn.supervisors.multiprocess", "Gone", Feature.SUPERVISOR),
        Name("uvicorn.server.Server", "gone", Feature.HOT_RESTART),
        Name("uvicorn.server.Gone", "gone", Feature.STATISTICS),
        Name("uvicorn.protocols.gone.Gone", "gone", Feature.WEBSOCKETS),
    ]
    assert missing(names) == {name.feature: [name] for name in names[:3]}
    assert str(names[1]) == "Server.gone"


def test_every_feature_needs_a_name() -> None:
    assert {name.feature for name in NAMES} == set(Feature)
