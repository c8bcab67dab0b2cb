"""Between the arbiter and its workers: a pipe for their reports, a byte for what they shall do.

Made before the first fork, and inherited. A worker of another uid can use both, where it could
send no signal.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import struct

_RECORD = struct.Struct("=ci")  # what, pid; shorter than PIPE_BUF, so written whole or not at all
_READ = _RECORD.size * 512


class Report(enum.Enum):
    """What a worker says of itself."""

    READY = b"r"  # it has loaded the app and entered its loop
    PAUSED = b"p"  # it accepts nothing any more
    RESUMED = b"a"  # it accepts again


class Channel:
    """Owns both ends of the pipe, in a worker only the one for writing; and the shared byte."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._flag = mmap.mmap(-1, 1)  # anonymous and shared

    def fileno(self) -> int:
        """The descriptor that becomes readable when a worker reports."""
        return self._read

    @property
    def paused(self) -> bool:
        """Whether workers shall not accept."""
        return self._flag[0] != 0

    @paused.setter
    def paused(self, value: bool) -> None:
        self._flag[0] = int(value)

    def reports(self) -> list[tuple[Report, int]]:
        """What the workers have reported since, with their pids."""
        found: list[tuple[Report, int]] = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._read, _READ):
                found += [(Report(what), pid) for what, pid in _RECORD.iter_unpack(data)]
        return found

    def forked(self) -> None:
        """In a worker: close the arbiter's end."""
        if self._read >= 0:
            os.close(self._read)
            self._read = -1

    def report(self, what: Report) -> None:
        """From a worker. If the arbiter is gone, nobody needs to know."""
        with contextlib.suppress(OSError):
            os.write(self._write, _RECORD.pack(what.value, os.getpid()))

    def close(self) -> None:
        """Close what is open."""
        for fd in (self._read, self._write):
            if fd >= 0:
                os.close(fd)
        self._read = self._write = -1
