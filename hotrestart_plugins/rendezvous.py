"""The meeting directory: where two instances find each other, and how they keep order there.

::

    volo_hot_restart_parent.sock   whoever serves answers here; claimed by rename, never unbound
    volo_hot_restart_child.sock    whoever takes over asks from here, one at a time
    lock                           byte 0: who takes over; each later byte: one who stands by
    new.PID                        a parent socket on its way to its name

Locks are POSIX record locks: the kernel frees them when their process dies, a forked worker never
holds one, and F_GETLK tells whose they are. To stand by is to be ready to take the name back, for a
rollback; who does so later has a later byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hotrestart_plugins.address import MAX_UNIX_PATH, Address
from hotrestart_plugins.errors import Busy, MeetingPlaceError
from hotrestart_plugins.transport import Endpoint

PARENT_SOCKET = "volo_hot_restart_parent.sock"  # Volo 0.12.3, HOT_RESTART_PARENT_ADDR
CHILD_SOCKET = "volo_hot_restart_child.sock"  # Volo 0.12.3, HOT_RESTART_CHILD_ADDR
LOCK = "lock"
_ASIDE = "new."
_KEPT = ".old"

_FLOCK = struct.Struct("@hhqqi")  # struct flock, fcntl(2): type, whence, start, len, pid
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_LOCK_PAUSE = 0.02  # seconds between two tries: POSIX locks have no wait with a deadline


class _Lock(NamedTuple):
    """A lock of another process."""

    pid: int
    """0 if the process cannot be seen from this pid namespace."""
    end: int
    """The byte behind it."""


class _LockFile:
    """A lock file's one descriptor in this process, shared by every place that meets there.

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


def default_directory(first: Address) -> Path:
    """Where instances serving `first` meet: one place for a login shell and a service manager."""
    uid = os.geteuid()
    base = Path("/run/hotrestart") if uid == 0 else Path(f"/tmp/hotrestart-{uid}")
    name = urllib.parse.quote(first.name, safe="[]:@,+=~")
    room = MAX_UNIX_PATH - len(os.fsencode(base)) - len(PARENT_SOCKET) - 2
    if len(name) > room:
        import hashlib  # noqa: PLC0415  # loads OpenSSL, for this rare case

        digest = hashlib.sha256(os.fsencode(first.name)).hexdigest()[:16]
        name = f"{name[: room - len(digest) - 1]}-{digest}"
    return base / name


class MeetingPlace:
    """One meeting directory, checked, and this process's locks in it.

    Owns a share in the process's one descriptor of the lock file.
    """

    def __init__(self, directory: Path) -> None:
        """Make the directory if it is missing, check it, open the lock file.

        Raises MeetingPlaceError if it cannot be made, used or trusted.
        """
        self.directory = Path(os.path.abspath(directory))
        self.parent_path = str(self.directory / PARENT_SOCKET)
        self.child_path = str(self.directory / CHILD_SOCKET)
        size = len(os.fsencode(self.parent_path))
        if size > MAX_UNIX_PATH:
            raise MeetingPlaceError(
                f"{self.directory} is too long a path: {PARENT_SOCKET} in it makes {size} bytes, "
                f"{MAX_UNIX_PATH} fit: pass a shorter --hot-restart-dir"
            )
        try:
            _make(self.directory)
            for level in _levels(self.directory):
                _check(level)
            self._lock_file: _LockFile | None = _LockFile.of(self.directory / LOCK)
        except OSError as error:
            raise MeetingPlaceError(
                f"{self.directory} cannot be used to meet in: {error.strerror}: "
                "pass another --hot-restart-dir"
            ) from error
        self._lock_fd = self._lock_file.fd
        self._has_turn = False
        self._standby_byte = 0  # 0: this instance does not stand by

    # -- locks ---------------------------------------------------------------------------------

    def lock(self, seconds: float, waiting: Callable[[int], None] | None = None) -> None:
        """Wait for this instance's turn to take over, `seconds` at most; raises Busy.

        `waiting` is told once whose turn it is, where this one has to wait.
        """
        deadline = time.monotonic() + seconds
        while True:
            holder = self._try_lock()
            if holder is None:
                return
            if holder and waiting is not None:
                waiting(holder)
                waiting = None
            if time.monotonic() >= deadline:
                raise Busy(
                    f"pid {holder} is taking over in {self.directory} and was not done within "
                    f"{seconds:g} s: start again when it is"
                )
            time.sleep(_LOCK_PAUSE)

    def _try_lock(self) -> int | None:
        """None if the lock is ours now, else the pid that holds it, or 0; see `standing_by`."""
        if self._lock_file is None or self._lock_file.taken:
            return os.getpid()
        try:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            found = self._locked(0, 1)
            return found.pid if found is not None else 0
        self._lock_file.taken = self._has_turn = True
        return None

    def unlock(self) -> None:
        """Let the next one take over."""
        if self._lock_file is not None and self._has_turn:
            self._lock_file.taken = self._has_turn = False
            fcntl.lockf(self._lock_fd, fcntl.LOCK_UN, 1, 0)

    def stand_by(self) -> None:
        """Tell who finds the parent socket dead that this process will take it back."""
        if self._standby_byte:
            return
        byte = 1
        while (found := self._locked(byte)) is not None:
            byte = found.end
        fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        self._standby_byte = byte

    def stand_down(self) -> None:
        """No longer: whoever finds the parent socket dead is on its own."""
        if self._standby_byte:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_UN, 1, self._standby_byte)
            self._standby_byte = 0

    def standing_by(self) -> int | None:
        """The pid of another process that will take back a dead parent socket, or None.

        0 for one of another pid namespace.
        """
        found = self._locked(1)
        return found.pid if found is not None else None

    def succeeded(self) -> bool:
        """Whether somebody answers, or one stands by who was replaced after this instance."""
        return self.parent_answers() or self._locked(self._standby_byte + 1) is not None

    def _locked(self, start: int, length: int = 0) -> _Lock | None:
        """The first lock of another process from there on, in `length` bytes; 0: to the end."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        kind, _, at, size, pid = _FLOCK.unpack(fcntl.fcntl(self._lock_fd, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else _Lock(pid, at + size)

    # -- names ---------------------------------------------------------------------------------

    def connect_to_parent(self, endpoint: Endpoint) -> bool:
        """Connect to whoever serves; False if nobody does."""
        try:
            endpoint.connect(self.parent_path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as error:
            raise MeetingPlaceError(
                f"{self.parent_path} cannot be reached: {error.strerror}: remove it, or pass "
                "another --hot-restart-dir"
            ) from error
        return True

    def parent_answers(self) -> bool:
        """Whether some process holds the parent socket now."""
        probe = Endpoint()
        try:
            return self.connect_to_parent(probe)
        finally:
            probe.close()

    def bind_child(self, seconds: float) -> tuple[Endpoint, Claim]:
        """The child's endpoint, at its name. Only under the lock; the caller owns the endpoint.

        A name left behind by a killed process is cleared. One that a living process holds is a
        child that knows no lock (Volo): it may finish within `seconds`, else Busy.
        """
        deadline = time.monotonic() + seconds
        for left in self.directory.glob(_ASIDE + "*"):
            # One that is held may be on its way: an instance that takes its name back has no lock.
            if left.suffix == _KEPT or not self._is_held(str(left)):
                left.unlink(missing_ok=True)
        while self._is_held(self.child_path):
            if time.monotonic() >= deadline:
                raise Busy(
                    f"another instance holds {self.child_path} and was not done within "
                    f"{seconds:g} s: start again when it is"
                )
            time.sleep(_LOCK_PAUSE)
        Path(self.child_path).unlink(missing_ok=True)
        endpoint = Endpoint()
        try:
            endpoint.bind(self.child_path)
            return endpoint, Claim(self.child_path)
        except BaseException:
            endpoint.close()
            raise

    def child_birth(self) -> int:
        """When the socket at the child's name was made, in microseconds since the epoch; 0: none.

        Both sides can look, so it names a child, also where its pid is not seen. It is bound anew
        for each takeover, and stays until the end of that.
        """
        try:
            return os.lstat(self.child_path).st_mtime_ns // 1000
        except OSError:
            return 0

    def _is_held(self, path: str) -> bool:
        probe = Endpoint()
        try:
            probe.connect(path)
        except OSError as error:
            # EPERM: it lives, and is connected, as a child is, to another socket than this one.
            return error.errno == errno.EPERM
        else:
            return True
        finally:
            probe.close()

    def claim_parent(self, then: Callable[[], None]) -> tuple[Endpoint, Claim]:
        """Become who answers: bind aside, rename over, call `then`; the caller owns the endpoint.

        At each instant the name leads to the old socket or to the new one. If `then` raises, the
        old one gets its name back.
        """
        aside = str(self.directory / f"{_ASIDE}{os.getpid()}")
        kept = aside + _KEPT
        endpoint = Endpoint()
        try:
            for left in (aside, kept):
                Path(left).unlink(missing_ok=True)
            endpoint.bind(aside)
            with contextlib.suppress(FileNotFoundError):
                os.link(self.parent_path, kept)
            claim = Claim(aside, self.parent_path)
            os.rename(aside, self.parent_path)
            try:
                then()
            except BaseException:
                if os.path.lexists(kept):
                    os.rename(kept, self.parent_path)
                else:
                    claim.release()
                raise
            Path(kept).unlink(missing_ok=True)
        except BaseException:
            endpoint.close()
            for left in (aside, kept):
                Path(left).unlink(missing_ok=True)
            raise
        return endpoint, claim

    def close(self) -> None:
        """Free this instance's locks, and close the lock file if no other here uses it.

        In a forked child too: it holds none of them, and the other process's stay.
        """
        if self._lock_file is not None:
            self.unlock()
            self.stand_down()
            self._lock_file.close()
            self._lock_file = None
            self._lock_fd = -1


class Claim:
    """A path that this process made: it is unlinked only while it is still the same file."""

    def __init__(self, path: str, later: str | None = None) -> None:
        """Note which file `path` is now; `later` is the path that it will have."""
        self.path = later or path
        found = os.lstat(path)
        self._file = (found.st_dev, found.st_ino)

    def holds(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._file

    def release(self) -> None:
        """Unlink the path if it is still this file."""
        if self.holds():
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _levels(directory: Path) -> list[Path]:
    """What must be ours: the directory, and the directory of ours that holds the default ones."""
    holds_defaults = directory.parent.name in ("hotrestart", f"hotrestart-{os.geteuid()}")
    return [directory.parent, directory] if holds_defaults else [directory]


def _make(directory: Path) -> None:
    missing = [level for level in (*reversed(directory.parents), directory) if not level.exists()]
    for level in missing:
        with contextlib.suppress(FileExistsError):
            level.mkdir(0o700)


def _check(directory: Path) -> None:
    """Raise MeetingPlaceError unless the directory is one, and ours alone to write in."""
    elsewhere = "or pass another --hot-restart-dir"
    found = os.lstat(directory)
    if stat.S_ISLNK(found.st_mode):
        raise MeetingPlaceError(
            f"{directory} is a symbolic link to {os.readlink(directory)}: name the directory "
            f"itself, {elsewhere}"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise MeetingPlaceError(f"{directory} is no directory: remove it, {elsewhere}")
    if found.st_uid != os.geteuid():
        raise MeetingPlaceError(
            f"{directory} belongs to uid {found.st_uid}, this process runs as uid "
            f"{os.geteuid()}: chown it, {elsewhere}"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise MeetingPlaceError(
            f"{directory} is writable by others (mode {stat.S_IMODE(found.st_mode):04o}): "
            f"chmod 700 it, {elsewhere}"
        )
