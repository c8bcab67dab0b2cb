"""Between the arbiter and its workers: a pipe for their reports, shared memory for the command.

Both are made before the first fork, and inherited. A worker of another uid can use both, where it
could not send a signal.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import struct
from dataclasses import astuple, fields
from typing import NamedTuple

from hotrestart_plugins.draining.stats import DrainStats

# event, pid, the fields of the statistics; shorter than PIPE_BUF, so written whole or not at all
_RECORD = struct.Struct(f"=ci{len(fields(DrainStats))}I")
_READ = _RECORD.size * 512
_COMMAND = struct.Struct("=?Q")
"""Whether to pause; the takeover id of the new instance that receives connections."""


class WorkerEvent(enum.Enum):
    """What a worker reports of itself."""

    READY = b"r"
    """It has loaded the app and entered its loop."""
    PAUSED = b"p"
    """It accepts nothing any more."""
    RESUMED = b"a"
    """It has followed the command to accept again; with the statistics of its drain."""
    ENDS = b"e"
    """It was paused and ends; with the statistics of its drain."""


class WorkerMessage(NamedTuple):
    """A worker's report."""

    what: WorkerEvent
    pid: int
    stats: DrainStats


class WorkerPipe:
    """Owns both ends of the pipe, in a worker only the one for writing; and the shared memory."""

    def __init__(self) -> None:
        """In the master, before it forks a worker. Raises OSError."""
        self.master_pid = os.getpid()
        """The process that made it."""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Also in processes that gunicorn forks without calling a hook, those of its dirty arbiter.
        os.register_at_fork(after_in_child=self._forked)
        self._command = mmap.mmap(-1, _COMMAND.size)  # anonymous and shared

    def fileno(self) -> int:
        """The descriptor that becomes readable when a worker reports. It stays the pipe's."""
        return self._read

    @property
    def paused(self) -> bool:
        """Whether workers must not accept."""
        return bool(_COMMAND.unpack(self._command[:])[0])

    @property
    def takeover_id(self) -> int:
        """The takeover id of the new instance whose workers receive connections; 0 for none."""
        return int(_COMMAND.unpack(self._command[:])[1])

    def set_command(self, *, paused: bool, takeover_id: int = 0) -> None:
        """Set what workers have to do, from their next look on. Called in the master."""
        self._command[:] = _COMMAND.pack(paused, takeover_id)

    def reports(self) -> list[WorkerMessage]:
        """What the workers have reported since the last call. Called in the master."""
        messages: list[WorkerMessage] = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._read, _READ):
                for event, pid, *counts in _RECORD.iter_unpack(data):
                    messages.append(WorkerMessage(WorkerEvent(event), pid, DrainStats(*counts)))
        return messages

    @property
    def lifeline(self) -> int:
        """A worker's end of the pipe: select(2) finds it ready when nobody can read the other."""
        return self._write

    def _forked(self) -> None:
        """In a forked process: only the master keeps the end for reading."""
        if self._read >= 0:
            os.close(self._read)
            self._read = -1

    def report(self, what: WorkerEvent, stats: DrainStats | None = None) -> None:
        """Report to the master. Called in a worker; does nothing if the master has ended."""
        counts = astuple(stats or DrainStats())
        with contextlib.suppress(OSError):
            os.write(self._write, _RECORD.pack(what.value, os.getpid(), *counts))

    def close(self) -> None:
        """Close what is open."""
        for fd in (self._read, self._write):
            if fd >= 0:
                os.close(fd)
        self._read = self._write = -1
