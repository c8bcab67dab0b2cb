"""The locks in the hot-restart directory: tickets, turns, claims, the instances that stand by.

They are POSIX record locks. The kernel frees them when their process dies, a forked worker never
holds one, and F_GETLK tells which process holds one.

In the file ``lock``, byte 0 is held by the instance whose turn it is to take over. Byte 1 is held
for a moment by an instance that looks who has the parent socket's name, and claims it or takes it
back. Byte 2 is shared by those that serve, which are two until the old one hears that it is
replaced. Each later byte is held by one that stands by: it is ready to take the name back, for a
rollback. An instance that stands by since a later time has a later byte.

In the file ``tickets``, an instance holds the byte whose number is its ticket from its start until
it can no longer serve, so the newest instance has the highest ticket. Byte 0 is held while a ticket
is taken.
The content is the ticket that was taken last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hotrestart_plugins.errors import Busy

_FLOCK = struct.Struct("@hhqqi")  # struct flock, fcntl(2): type, whence, start, len, pid
_TURN = 0  # the byte of the turn
_CLAIM = 1  # the byte of a claim
_SERVES = 2  # the byte of those that serve
_FIRST_STANDBY = 3  # those who stand by have this byte and the later ones
_CLAIM_TIME = 0.5  # seconds that a claim is good for: it takes a millisecond
_NEXT_TRY = 0.001  # seconds between two looks whether somebody's claim has ended
_MAX_DIGITS = 18  # of a ticket: the number of a byte has 63 bits
POLL_INTERVAL = 0.02  # seconds between two tries: POSIX locks have no wait with a deadline


class _Lock(NamedTuple):
    """A lock of another process."""

    pid: int
    """0 if the process cannot be seen from this pid namespace."""
    end: int
    """The byte after it."""


class _LockFile:
    """A lock file's one descriptor in this process, shared by every instance that meets there.

    POSIX locks never conflict within a process, and closing any descriptor of the file frees them
    all: fcntl(2). So there is one descriptor, closed by the last user, and what this process holds
    is kept in `held`.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.users = 0
        self.serving = 0
        """How many instances in this process serve."""
        self.held: set[int] = set()
        """The bytes that this process holds, of those that several instances in it may want."""
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

    def lock(self, byte: int) -> bool:
        """Lock one byte, without waiting; False if another process holds it."""
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True

    def share(self, byte: int) -> None:
        """Lock one byte, beside others that share it; raises OSError if that cannot be."""
        fcntl.lockf(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, byte)

    def unlock(self, byte: int) -> None:
        """Free one byte."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, byte)

    def holder(self, start: int, length: int = 0) -> _Lock | None:
        """A lock of another process from `start` on, in `length` bytes; 0: to the end of all.

        Any of them, not always the first.
        """
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        kind, _, at, size, pid = _FLOCK.unpack(fcntl.fcntl(self.fd, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else _Lock(pid, at + size)

    def last(self, start: int) -> _Lock | None:
        """The last lock of another process from `start` on."""
        last = None
        while (found := self.holder(start)) is not None:
            last, start = found, found.end
        return last

    def close(self) -> None:
        self.users -= 1
        if not self.users:
            del _lock_files[self.key]
            os.close(self.fd)
            self.fd = -1


_lock_files: dict[tuple[int, int], _LockFile] = {}


class ClaimExpired(Exception):
    """This process was too slow: others no longer reckon with its claim. Look again."""


class Claim:
    """The right to decide by the parent socket's name, and to change it, until `expires`."""

    def __init__(self) -> None:
        self.expires = time.monotonic() + _CLAIM_TIME
        """Monotonic seconds, which pass for a stopped process too."""

    def check(self) -> None:
        """Raise ClaimExpired if the claim is too old to act on."""
        if time.monotonic() >= self.expires:
            raise ClaimExpired


class Ticket:
    """This instance's place in the order of starts. Owns a share in the file's one descriptor."""

    def __init__(self, path: Path, seconds: float) -> None:
        """Take the next ticket, waiting `seconds` at most for others that take theirs.

        `path`: the file of the tickets. Raises Busy, or OSError if the file cannot be used.
        """
        self._file = _LockFile.of(path)
        try:
            self.number = self._take(path, time.monotonic() + seconds)
        except BaseException:
            self._file.close()
            raise

    def _take(self, path: Path, deadline: float) -> int:
        file = self._file
        while not file.lock(0):
            if time.monotonic() >= deadline:
                holder = file.holder(0, 1)
                pid = holder.pid if holder is not None else 0
                raise Busy(
                    f"pid {pid} is taking a ticket in {path.parent} and was not done in time: "
                    "start again when it is"
                )
            time.sleep(POLL_INTERVAL)
        try:
            # Above the living ones, too: the file may have been emptied.
            living = file.last(1)
            number = max(_counter(file.fd), living.end - 1 if living else 0, *file.held, 0) + 1
            file.lock(number)
            file.held.add(number)
            with contextlib.suppress(OSError):  # a full disk: the living ones still count
                os.ftruncate(file.fd, os.pwrite(file.fd, b"%d\n" % number, 0))
            return number
        finally:
            file.unlock(0)

    def newest(self) -> int | None:
        """The pid of the newest living instance, if it was started after this one; else None.

        0 for a process of another pid namespace.
        """
        found = self._file.last(self.number + 1)
        ours = max(self._file.held, default=0)
        if ours >= (found.end if found is not None else self.number + 1):
            return os.getpid()
        return found.pid if found is not None else None

    def close(self) -> None:
        """Give the ticket back. In a forked child too: the other process's stays."""
        if self._file.fd >= 0 and self.number in self._file.held:
            self._file.held.discard(self.number)
            self._file.unlock(self.number)
            self._file.close()


def _counter(fd: int) -> int:
    """The ticket that was taken last; 0 if the file does not say."""
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() and len(text) <= _MAX_DIGITS else 0


class DirectoryLocks:
    """This instance's locks in one directory. Owns a share in the lock file's one descriptor."""

    def __init__(self, path: Path) -> None:
        """`path`: the lock file. Raises OSError if it cannot be opened."""
        self._directory = path.parent
        self._path = path
        self._file = _LockFile.of(path)
        self._closed = False
        self._has_turn = False
        self._has_claim = False
        self._serves = False
        self._standby_byte = 0  # 0: this instance does not stand by

    def are_current(self) -> bool:
        """Whether others still look for the locks in this file; else the directory was removed."""
        try:
            found = os.lstat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (found.st_dev, found.st_ino) == self._file.key

    def take_turn(
        self,
        seconds: float,
        waiting: Callable[[int], None] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for this instance's turn to take over, `seconds` at most; raises Busy.

        `waiting` is told once whose turn it is, where this one has to wait. `check` is called at
        each look, also at the last one: what it raises ends the wait.
        """
        deadline = time.monotonic() + seconds
        while True:
            holder = self._try_turn()
            check()
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
        if _TURN in self._file.held:
            return os.getpid()
        if not self._file.lock(_TURN):
            found = self._file.holder(_TURN, 1)
            return found.pid if found is not None else 0
        self._file.held.add(_TURN)
        self._has_turn = True
        return None

    def end_turn(self) -> None:
        """Let the next one take over."""
        if self._has_turn:
            self._has_turn = False
            self._file.held.discard(_TURN)
            self._file.unlock(_TURN)

    @contextlib.contextmanager
    def claim(self, seconds: float | None = None) -> Iterator[Claim]:
        """Let no other instance look at the parent socket's name and change it meanwhile.

        Waits `seconds` for another's claim to end; None: until that is too old to be acted on.
        Raises Busy. Do nothing in this context that takes long.
        """
        self._take_claim(2 * _CLAIM_TIME if seconds is None else seconds)
        try:
            yield Claim()
        finally:
            self._end_claim()

    def _take_claim(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while _CLAIM in self._file.held or not self._file.lock(_CLAIM):
            if time.monotonic() >= deadline:
                found = self._file.holder(_CLAIM, 1)
                pid = found.pid if found is not None else os.getpid()
                raise Busy(
                    f"pid {pid} is about to claim a name in {self._directory} and was not done "
                    f"within {seconds:g} s: it is stopped or hangs; look at it, then start again"
                )
            time.sleep(_NEXT_TRY)
        self._file.held.add(_CLAIM)
        self._has_claim = True

    def _end_claim(self) -> None:
        if self._has_claim:
            self._has_claim = False
            self._file.held.discard(_CLAIM)
            self._file.unlock(_CLAIM)

    def serve(self) -> None:
        """Tell those that stand by that this instance serves, also if its name is lost."""
        if not self._serves:
            self._serves = True
            self._file.serving += 1
            with contextlib.suppress(OSError):  # there are too many locks: the name tells as much
                self._file.share(_SERVES)

    def stop_serving(self) -> None:
        """No longer."""
        if self._serves:
            self._serves = False
            self._file.serving -= 1
            if not self._file.serving:
                self._file.unlock(_SERVES)

    def another_serves(self) -> bool:
        """Whether another instance serves, in this process or in another one."""
        in_this_process = self._file.serving > int(self._serves)
        return in_this_process or self._file.holder(_SERVES, 1) is not None

    def stand_by(self) -> None:
        """Tell who finds the parent socket dead that this process will take it back."""
        if self._standby_byte:
            return
        byte = 0
        while not byte or not self._file.lock(byte):  # another may have taken the byte meanwhile
            last = self._file.last(_FIRST_STANDBY)
            byte = last.end if last is not None else _FIRST_STANDBY
        self._standby_byte = byte

    def stand_down(self) -> None:
        """No longer: whoever finds the parent socket dead is on its own."""
        if self._standby_byte:
            self._file.unlock(self._standby_byte)
            self._standby_byte = 0

    def standing_by(self) -> int | None:
        """The pid of another process that will take back a dead parent socket, or None.

        0 for one of another pid namespace.
        """
        found = self._file.holder(_FIRST_STANDBY)
        return found.pid if found is not None else None

    def newer_stands_by(self) -> bool:
        """Whether one stands by who was replaced after this instance."""
        return self._file.holder(max(self._standby_byte + 1, _FIRST_STANDBY)) is not None

    def close(self) -> None:
        """Free this instance's locks, and close the lock file if no other here uses it.

        In a forked child too: it holds none of them, and the other process's stay.
        """
        if not self._closed:
            self._closed = True
            self.end_turn()
            self._end_claim()
            self.stop_serving()
            self.stand_down()
            self._file.close()
