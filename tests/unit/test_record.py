"""The record of a takeover: both sides write it, whoever else locks what."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from hotrestart_plugins.core.record import Record
from tests.support.processes import Processes

pytestmark = pytest.mark.usefixtures("no_leak")

STARTED = 1_700_000_000_000_000  # a takeover id


def record(directory: Path, side: str = "new") -> Record:
    return Record(directory, STARTED, 7, side, logging.getLogger("hotrestart"))


def content(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("handover-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_lock_on_the_directory_does_no_harm(meet: Path, caplog: pytest.LogCaptureFixture) -> None:
    """systemd-tmpfiles spares a directory on which somebody holds a lock, shared or not."""
    for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):
        fd = os.open(meet, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, kind)
        record(meet).note("started")
        os.close(fd)
    assert not caplog.records
    assert [step["step"] for step in content(meet)["steps"]] == ["started", "started"]


def test_a_lock_that_is_not_freed(meet: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A note is lost then, with one line, and nothing else."""
    record(meet).note("started")
    with (meet / "record.lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        record(meet).note("ready")
    (line,) = caplog.messages
    assert line.startswith(f"Could not write the takeover record {record(meet).path}: ")
    assert [step["step"] for step in content(meet)["steps"]] == ["started"]


@pytest.mark.parametrize(
    "begun",
    [
        '{"outcome": "under way", "parent": {"pid": 1}, "child": {"pid": 7}, "steps": []}',
        '{"outcome": 5, "old": [], "steps": {}}',
        "[]",
        '{"outcome": "un',
    ],
)
def test_another_release_has_begun_it(
    meet: Path, caplog: pytest.LogCaptureFixture, begun: str
) -> None:
    """What is not in today's form is left out, and the notes of today are not lost."""
    record(meet).path.write_text(begun)
    record(meet, "old").note("drained", outcome="taken over", given=["a"])
    assert not caplog.records
    found = content(meet)
    assert (found["outcome"], found["old"]["given"], found["new"]) == (
        "taken over",
        ["a"],
        {"pid": 7},
    )
    assert [step["step"] for step in found["steps"]] == ["drained"]


PARENT = """
import logging, sys
from pathlib import Path
from hotrestart_plugins.core.record import Record
directory, started = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
for _ in range(20):
    Record(directory, started, 7, "old", logging.getLogger("hotrestart")).note("parent's")
"""


def test_both_sides_at_once(processes: Processes, meet: Path) -> None:
    """No step of either side is lost."""
    parent = processes.python(PARENT, str(meet), str(STARTED))
    assert parent.line() == "ready"
    for _ in range(20):
        record(meet).note("child's")
    assert parent.wait() == 0, parent.log
    steps = [step["step"] for step in content(meet)["steps"]]
    assert (steps.count("parent's"), steps.count("child's")) == (20, 20)


def test_an_overtaken_child(meet: Path) -> None:
    """Its parent sees only that it ended; the outcome stays."""
    record(meet).note(outcome="overtaken")
    record(meet, "old").note(outcome="failed", reason="it ended")
    assert content(meet)["outcome"] == "overtaken"
