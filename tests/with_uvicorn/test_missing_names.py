"""A uvicorn that has renamed something of its own: it serves and drains all the same.

Each test has a copy of uvicorn in which one name of the table is another one. It is another one in
uvicorn's own code, too, so that uvicorn works by itself.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command
from demo_app.load import LoadProcess, Mix
from hotrestart_plugins.uvicorn._compat.names import NAMES
from hotrestart_plugins.uvicorn._compat.table import Feature, Name
from tests.support.instances import QUICK, drained, successor
from tests.support.processes import can_connect, eventually
from tests.support.raw import ask

PACKAGE = Path(uvicorn.__file__).parent
QUICKLY = {
    ("Server", "startup"),
    ("Config", "encoded_headers"),
    ("H11Protocol", "cycle"),
    ("HttpToolsProtocol", "pipeline"),
    ("Multiprocess", "signal_queue"),
}
"""One for each way in which something is switched off; the others are for when there is time."""
SHARED = {
    "should_exit": "it is a documented name of Server",
    "start": "threads and processes have it",
    "load": "the module json has it",
    "state": "other packages' objects have it",
    "shutdown": "it is a word of the ASGI lifespan",
    "startup": "it is a word of the ASGI lifespan",
}
"""Attributes that others have too: these are renamed only in the files named below."""
FILES = {
    ("Server", "startup"): {"server.py": r"(?<=self\.)startup\b(?=\(s)|(?<=def )startup\b"},
    ("Server", "shutdown"): {"server.py": r"(?<=self\.)shutdown\b(?=\(s)|(?<=def )shutdown\b"},
    ("Server", "lifespan"): {"server.py": r"(?<=self\.)lifespan\b"},  # a module has that name
    ("Process", "server"): {
        "supervisors/multiprocess.py": r"(?<=self\.)server\b|(?<=def )server\b"
    },
    ("Process", "start"): {
        "supervisors/multiprocess.py": r"(?<=def )start\b|(?<=[^.]process\.)start\b(?=\(\))"
    },
    ("multiprocess", "Process"): {"supervisors/multiprocess.py": r"\bProcess\b"},
}


def rows() -> Iterator[object]:
    """One for each name, with all that needs it."""
    seen = set()
    for name in NAMES:
        owner = name.owner.rpartition(".")[2]
        key = (owner, name.attribute)
        if key in seen or (name.attribute in SHARED and key not in FILES):
            continue
        seen.add(key)
        marks = () if key in QUICKLY else (pytest.mark.long,)
        yield pytest.param(name, id=str(name), marks=marks)


def without(name: Name, directory: Path) -> None:
    """Put a uvicorn into the directory in which the name is another one."""
    shutil.copytree(PACKAGE, directory / "uvicorn", ignore=shutil.ignore_patterns("*.pyc"))
    owner, attribute = name.owner.rpartition(".")[2], name.attribute
    everywhere = rf"(?<=\.){attribute}\b|(?<=def ){attribute}\b"
    files = FILES.get((owner, attribute))
    for path in (directory / "uvicorn").rglob("*.py"):
        where = str(path.relative_to(directory / "uvicorn"))
        pattern = everywhere if files is None else files.get(where)
        if pattern is not None:
            path.write_text(re.sub(pattern, f"{attribute}_renamed", path.read_text()))


def said(instance: Instance, name: Name) -> list[str]:
    """The lines that say that the name is missing, perhaps with others that are called the same."""
    lines = instance.log.splitlines()
    return [line for line in lines if " has no " in line and re.search(rf"\b{name}\b", line)]


@pytest.mark.once
@pytest.mark.parametrize("name", [*rows()])
def test_a_name_that_is_gone(place: Deploys, address: str, tmp_path: Path, name: Name) -> None:
    """It is said once, with what happens instead; no request fails in a takeover."""
    without(name, tmp_path)
    off = {row.feature for row in NAMES if (row.owner, row.attribute) == name[:2]}
    parser = "httptools" if "httptools" in name.owner else "h11"
    server = "uvicorn4" if "supervisors" in name.owner else "uvicorn"
    args = command(server, address, "--http", parser, "--timeout-keep-alive", "60")
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    old = place.start(args, PYTHONPATH=search, **QUICK)
    old.wait_for(*UP)
    if off & {Feature.HOT_RESTART, Feature.SUPERVISOR}:
        eventually(lambda: can_connect(address), "a worker listens")
        assert old.owns(ask(address).pid)
        old.stop()
        assert len(said(old, name)) == 1, old.log
        assert "cannot be replaced" in old.log
        return
    with LoadProcess(address, Mix(one_shot=2, keep_alive=4)) as load:
        load.wait(answers=50)
        new = successor(place, old, args, PYTHONPATH=search)
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report
    for instance in (old, new):
        assert len(said(instance, name)) == 1, instance.log
        assert all(feature.value in instance.log for feature in off)
    assert "aborted" not in drained(old.log)
    assert TOOK_OVER in new.log
