"""The takeover record: what one takeover did, in one JSON file in the hot-restart directory.

Each instance writes what it knows, when it happens, so that the record outlives both::

    {"outcome": "taken over",
     "old": {"pid": 10, "given": ["127.0.0.1:8000"], "drain": {...}},
     "new": {"pid": 20, "inherited": ["127.0.0.1:8000"], "bound": []},
     "steps": [{"time": 1700000000.1, "by": "new", "step": "started"}, ...]}

The file is ``handover-TIME.json``; TIME is when the new instance began, in UTC, to the microsecond.
A pid would not do as its name: it may come again, and across pid namespaces it is 0.

``outcome`` is 'under way', 'taken over', 'failed' (an instance has a ``reason`` then), 'overtaken'
or 'rolled back'. Times are seconds since the epoch. If a record cannot be written, a line in the
log says so, and the takeover goes on.
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
        self, directory: Path, takeover_id: int, new_pid: int, side: str, logger: Logger
    ) -> None:
        """`takeover_id`: of the new instance, see `RendezvousDirectory.child_takeover_id`.

        `side`: 'old' or 'new', which instance this process is.
        """
        seconds, rest = divmod(takeover_id, 1_000_000)
        when = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
        self.path = directory / f"{_PREFIX}{when}.{rest:06d}Z.json"
        self._side = side
        self._new_pid = new_pid
        self._log = logger

    def note(self, step: str = "", *, outcome: str = "", **facts: object) -> None:
        """Add a step, an outcome, what this side knows. Never raises."""
        try:
            with _locked(self.path.parent):
                self._write(step, outcome, facts)
        except Exception as error:  # noqa: BLE001 (a record is no reason for a takeover to fail)
            write(self._log, RECORD_FAILED, path=self.path, error=error)

    def _write(self, step: str, outcome: str, facts: dict[str, object]) -> None:
        record = self._read()
        # The old instance sees of one that was overtaken only that it exited.
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
        record: dict[str, Any] = {
            "outcome": "under way",
            "old": {},
            "new": {"pid": self._new_pid},
            "steps": [],
        }
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(self.path.read_text())
            # Another release of this package may have begun it, in another form.
            for key, empty in record.items() if isinstance(found, dict) else ():
                if isinstance(found.get(key), type(empty)):
                    record[key] = found[key]
        return record


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
