"""The handover record: what one takeover did, in one JSON file in the meeting directory.

Each side writes what it knows, as it happens, so that the record outlives the death of either::

    {"outcome": "taken over",
     "parent": {"pid": 10, "given": ["127.0.0.1:8000"], "tally": {...}},
     "child": {"pid": 20, "inherited": ["127.0.0.1:8000"], "bound": []},
     "steps": [{"time": 1700000000.1, "by": 20, "step": "started"}, ...]}

``outcome`` is 'under way', 'taken over', 'failed' (then a side has a ``reason``) or 'rolled back'.
Times are seconds since the epoch. A record that cannot be written is no reason to fail: a line in
the log says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hotrestart_plugins.peers import Logger

KEPT = 8
"""Records that are kept; older ones are removed."""

_PREFIX = "handover-"
_PATIENCE = 1.0  # seconds to wait for the other side, which writes for less than a millisecond


class Record:
    """One takeover's record, named after the child. Owns no descriptor between two calls."""

    def __init__(self, directory: Path, child_pid: int, side: str, logger: Logger) -> None:
        """`side`: 'parent' or 'child', which one this process is."""
        self.path = directory / f"{_PREFIX}{child_pid}.json"
        self._side = side
        self._child_pid = child_pid
        self._log = logger

    def begin(self) -> None:
        """The child's first word: whatever an older process of this pid left is not meant."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.note("started")

    def note(self, step: str = "", *, outcome: str = "", **facts: object) -> None:
        """Add a step, an outcome, what this side knows. Never raises."""
        try:
            with _locked(self.path.parent):
                self._write(step, outcome, facts)
        except (OSError, ValueError) as error:
            self._log.warning("The handover record %s cannot be written: %s", self.path, error)

    def _write(self, step: str, outcome: str, facts: dict[str, object]) -> None:
        record = self._read()
        record["outcome"] = outcome or record["outcome"]
        record[self._side] |= {"pid": os.getpid(), **facts}
        if step:
            record["steps"].append({"time": time.time(), "by": os.getpid(), "step": step})
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        aside.rename(self.path)
        _prune(self.path.parent)

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {
                "outcome": "under way",
                "parent": {},
                "child": {"pid": self._child_pid},
                "steps": [],
            }
        return found


def _prune(directory: Path) -> None:
    found = sorted(directory.glob(f"{_PREFIX}*.json"), key=lambda path: path.stat().st_mtime)
    for path in found[:-KEPT]:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep the other side from writing at the same time."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.001)
        yield
    finally:
        os.close(fd)
