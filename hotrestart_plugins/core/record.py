"""The handover record: what one takeover did, in one JSON file in the meeting directory.

Each side writes what it knows, as it happens, so that the record outlives the death of either::

    {"outcome": "taken over",
     "parent": {"pid": 10, "given": ["127.0.0.1:8000"], "tally": {...}},
     "child": {"pid": 20, "inherited": ["127.0.0.1:8000"], "bound": []},
     "steps": [{"time": 1700000000.1, "by": "child", "step": "started"}, ...]}

``handover-TIME.json``: TIME is that at which the child began, in UTC, to the microsecond. A pid may
come again, and is not seen by a parent of another pid namespace: it is 0, or what the other calls
itself.

``outcome`` is 'under way', 'taken over', 'failed' (then a side has a ``reason``), 'overtaken' or
'rolled back'.
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

from hotrestart_plugins.core.events import OVERTAKEN, RECORD_FAILED, Logger, write

KEPT = 8
"""Records that are kept; older ones are removed."""

_PREFIX = "handover-"
_LOCK = "record.lock"
_LOCK_TIMEOUT = 1.0  # seconds to wait for the other side, which writes for less than a millisecond


class Record:
    """One takeover's record. Owns no descriptor between two calls."""

    def __init__(
        self, directory: Path, takeover_id: int, child_pid: int, side: str, logger: Logger
    ) -> None:
        """`takeover_id`: the child's, see `RendezvousDirectory.child_takeover_id`.

        `side`: 'parent' or 'child', which one this process is.
        """
        seconds, rest = divmod(takeover_id, 1_000_000)
        when = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
        self.path = directory / f"{_PREFIX}{when}.{rest:06d}Z.json"
        self._side = side
        self._child_pid = child_pid
        self._log = logger

    def note(self, step: str = "", *, outcome: str = "", **facts: object) -> None:
        """Add a step, an outcome, what this side knows. Never raises."""
        try:
            with _locked(self.path.parent):
                self._write(step, outcome, facts)
        except (OSError, ValueError) as error:
            write(self._log, RECORD_FAILED, path=self.path, error=error)

    def _write(self, step: str, outcome: str, facts: dict[str, object]) -> None:
        record = self._read()
        # The parent of an overtaken child sees only that it ended.
        if record["outcome"] != OVERTAKEN.outcome:
            record["outcome"] = outcome or record["outcome"]
        record[self._side] |= {"pid": os.getpid(), **facts}
        if step:
            record["steps"].append({"time": time.time(), "by": self._side, "step": step})
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
    for path in sorted(directory.glob(f"{_PREFIX}*.json"))[:-KEPT]:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep the other side from writing at the same time.

    The lock is that of a file, because others lock the directory itself: systemd-tmpfiles spares
    a directory on which somebody holds a lock.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(directory / _LOCK, flags, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT
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
