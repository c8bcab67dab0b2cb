"""The locks in the hot-restart directory: whose turn it is to take over, and who stands by.

They are POSIX record locks on one file: byte 0 is held by who takes over, each later byte by one
who stands by. The kernel frees them when their process dies, a forked worker never holds one, and
F_GETLK tells whose they are. To stand by is to be ready to take the name back, for a rollback; who
does so later has a later byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hotrestart_plugins.errors import Busy

_FLOCK = struct.Struct("@hhqqi")  # struct flock, fcntl(2): type, whence, start, len, pid
POLL_INTERVAL = 0.02  # seconds between two tries: POSIX locks have no wait with a deadline


class _Lock(NamedTuple):
    """A lock of another process."""

    pid: int
    """0 if the process cannot be seen from this pid namespace."""
    end: int
    """The byte behind it."""


class _LockFile:
    """A lock file's one descriptor in this process, shared by every instance that meets there.

    POSIX locks never conflict within a process, and closing any descriptor of the file frees them
    all: fcntl(2). So there is one, closed by the last user, and `taken` is kept here.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.users = 0
        self.taken = False
        found = os.fstat(self.fd)
        self.key = (found.st_dev, found.st_ino)

    @classmethod
    def of(cls, path: Path) -> _LockFile:
        """The one of this process; raises OSError if it cannot be opened."""
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            known = _lock_files.get((found.st_dev, found.st_ino))
            if known is not None:
                known.users += 1
                return known
        made = cls(path)
        made.users = 1
        _lock_files[made.key] = made
        return made

    def close(self) -> None:
        self.users -= 1
        if not self.users:
            del _lock_files[self.key]
            os.close(self.fd)


_lock_files: dict[tuple[int, int], _LockFile] = {}


class DirectoryLocks:
    """This instance's locks in one directory. Owns a share in the lock file's one descriptor."""

    def __init__(self, path: Path) -> None:
        """`path`: the lock file. Raises OSError if it cannot be opened."""
        self._directory = path.parent
        self._file: _LockFile | None = _LockFile.of(path)
        self._fd = self._file.fd
        self._has_turn = False
        self._standby_byte = 0  # 0: this instance does not stand by

    def take_turn(self, seconds: float, waiting: Callable[[int], None] | None = None) -> None:
        """Wait for this instance's turn to take over, `seconds` at most; raises Busy.

        `waiting` is told once whose turn it is, where this one has to wait.
        """
        deadline = time.monotonic() + seconds
        while True:
            holder = self._try_turn()
            if holder is None:
                return
            if holder and waiting is not None:
                waiting(holder)
                waiting = None
            if time.monotonic() >= deadline:
                raise Busy(
                    f"pid {holder} is taking over in {self._directory} and was not done within "
                    f"{seconds:g} s: start again when it is"
                )
            time.sleep(POLL_INTERVAL)

    def _try_turn(self) -> int | None:
        """None if the lock is ours now, else the pid that holds it, or 0; see `standing_by`."""
        if self._file is None or self._file.taken:
            return os.getpid()
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            found = self._locked(0, 1)
            return found.pid if found is not None else 0
        self._file.taken = self._has_turn = True
        return None

    def end_turn(self) -> None:
        """Let the next one take over."""
        if self._file is not None and self._has_turn:
            self._file.taken = self._has_turn = False
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 0)

    def stand_by(self) -> None:
        """Tell who finds the parent socket dead that this process will take it back."""
        if self._standby_byte:
            return
        byte = 1
        while (found := self._locked(byte)) is not None:
            byte = found.end
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        self._standby_byte = byte

    def stand_down(self) -> None:
        """No longer: whoever finds the parent socket dead is on its own."""
        if self._standby_byte:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._standby_byte)
            self._standby_byte = 0

    def standing_by(self) -> int | None:
        """The pid of another process that will take back a dead parent socket, or None.

        0 for one of another pid namespace.
        """
        found = self._locked(1)
        return found.pid if found is not None else None

    def newer_stands_by(self) -> bool:
        """Whether one stands by who was replaced after this instance."""
        return self._locked(self._standby_byte + 1) is not None

    def _locked(self, start: int, length: int = 0) -> _Lock | None:
        """The first lock of another process from there on, in `length` bytes; 0: to the end."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        kind, _, at, size, pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else _Lock(pid, at + size)

    def close(self) -> None:
        """Free this instance's locks, and close the lock file if no other here uses it.

        In a forked child too: it holds none of them, and the other process's stay.
        """
        if self._file is not None:
            self.end_turn()
            self.stand_down()
            self._file.close()
            self._file = None
            self._fd = -1
