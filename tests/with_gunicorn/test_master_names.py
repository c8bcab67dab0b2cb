"""gunicorn without a name that we use: it serves, and says in one line what does not work."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import gunicorn as installed
import pytest

from demo_app.deploys import Deploys, Instance
from demo_app.load import LoadProcess, Mix
from hotrestart_plugins.gunicorn._compat.arbiter import NAMES
from hotrestart_plugins.gunicorn._compat.table import Feature, Name
from tests.support.gunicorns import QUICK, gunicorn, only_line, start, successor, up
from tests.support.raw import ask

OTHER = "renamed_in_this_copy"
QUICKLY_TESTED = {
    *("SIG_QUEUE", "_num_workers", "reap_workers", "spawn_worker", "kill_dirty_arbiter"),
    *("Pidfile", "_ready", "ssl_context"),
}
"""One name for each way of doing without; the others are tested when there is time."""

CLASSES = {
    "gunicorn.arbiter.Arbiter": (r"self|arbiter", ("arbiter.py", "ctl/*.py")),
    "gunicorn.ctl.server.ControlSocketServer": (r"self", ("ctl/server.py",)),
    "gunicorn.dirty.arbiter.DirtyArbiter": (r"self|dirty_arbiter", ("dirty/arbiter.py",)),
    "gunicorn.pidfile.Pidfile": (r"self|self\.pidfile|pidfile", ("pidfile.py", "arbiter.py")),
}
"""What gunicorn calls the objects of a class, and in which files."""


def cases() -> list[object]:
    """Each name that gunicorn itself can do without if it is called otherwise throughout."""
    return [
        pytest.param(
            name,
            id=f"{name.owner.rpartition('.')[2]}.{name.attribute}",
            marks=[] if name.attribute in QUICKLY_TESTED else [pytest.mark.long],
        )
        for name in NAMES
        if not name.composed
    ]


def copy_without(name: Name, folder: Path) -> None:
    """Copy the installed gunicorn, and call one thing otherwise wherever its own code does."""
    package = folder / "gunicorn"
    shutil.copytree(
        Path(installed.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    word = re.escape(name.attribute)
    objects, patterns = CLASSES.get(name.owner, ("", ("**/*.py",)))
    regex = re.compile(rf"\b{word}\b")
    if objects:
        regex = re.compile(rf"(?m)(?<![\w.])((?:{objects})\.|def |^    ){word}\b")
    renamed = 0
    for pattern in patterns:
        for path in package.glob(pattern):
            replacement = rf"\g<1>{OTHER}" if objects else OTHER
            code, count = regex.subn(replacement, path.read_text())
            path.write_text(code)
            renamed += count
    assert renamed


def says_what_is_missing(instance: Instance, name: Name) -> None:
    """One line: the name, the version, and what happens instead."""
    line = only_line(instance.log, name.feature.value)
    assert f"gunicorn {installed.__version__} has no " in line
    assert f"{name.owner}.{name.attribute}" in line


@pytest.mark.parametrize("name", cases())
def test_a_name_is_missing(place: Deploys, address: str, tmp_path: Path, name: Name) -> None:
    """No request fails, whatever is missing; what has drained ends with 0."""
    copy_without(name, tmp_path)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    env = {**QUICK, "PYTHONPATH": path}
    args = gunicorn("gthread", address, "--pid", str(tmp_path / "pid"))
    args[args.index("--no-control-socket")] = f"--control-socket={tmp_path / 'ctl'}"
    if name.feature is Feature.HOT_RESTART:
        alone = start(place, args, **env)
        alone.wait_for("Booting worker with pid", count=2)
        says_what_is_missing(alone, name)
        assert alone.owns(ask(address).pid)
        assert alone.stop() == 0, alone.log
        return
    old = up(place, args, **env)
    with LoadProcess(address, Mix(one_shot=2, keep_alive=4)) as load:
        load.wait(answers=50)
        new = successor(place, old, args, **env)
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report
    for instance in (old, new):
        says_what_is_missing(instance, name)
        assert "Traceback" not in instance.log, instance.log
        assert "Error in hotrestart_plugins" not in instance.log
    assert new.stop() == 0, new.log
