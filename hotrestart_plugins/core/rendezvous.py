"""The meeting directory: where two instances find each other, and how they keep order there.

::

    volo_hot_restart_parent.sock   whoever serves answers here; claimed by rename, never unbound
    volo_hot_restart_child.sock    whoever takes over asks from here, one at a time
    lock                           byte 0: who takes over; 1: who claims the parent's name;
                                   2: who serves; each later byte: one who stands by
    tickets                        each byte: a living instance; later starts have later bytes
    record.lock                    held while the record of a takeover is written
    new.PID                        a parent socket on its way to its name
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from hotrestart_plugins.core.address import MAX_UNIX_PATH, Address
from hotrestart_plugins.core.datagram import Endpoint
from hotrestart_plugins.core.listeners import OwnedPath
from hotrestart_plugins.core.locks import POLL_INTERVAL, DirectoryLocks, Ticket
from hotrestart_plugins.errors import Busy, RendezvousError, TakeoverError

PARENT_SOCKET = "volo_hot_restart_parent.sock"  # Volo 0.12.3, HOT_RESTART_PARENT_ADDR
CHILD_SOCKET = "volo_hot_restart_child.sock"  # Volo 0.12.3, HOT_RESTART_CHILD_ADDR
LOCK = "lock"
TICKETS = "tickets"
_ASIDE = "new."
_KEPT = ".old"

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


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


class RendezvousDirectory:
    """One meeting directory, checked. Owns this process's `locks` in it."""

    def __init__(self, directory: Path) -> None:
        """Make the directory if it is missing, check it, open the lock file.

        Raises RendezvousError if it cannot be made, used or trusted.
        """
        self.directory = Path(os.path.abspath(directory))
        self.parent_path = str(self.directory / PARENT_SOCKET)
        self.child_path = str(self.directory / CHILD_SOCKET)
        size = len(os.fsencode(self.parent_path))
        if size > MAX_UNIX_PATH:
            raise RendezvousError(
                f"{self.directory} is too long a path: {PARENT_SOCKET} in it makes {size} bytes, "
                f"{MAX_UNIX_PATH} fit: pass a shorter --hot-restart-dir"
            )
        try:
            _make(self.directory)
            for level in _levels(self.directory):
                _check(level)
            self.locks = DirectoryLocks(self.directory / LOCK)
        except OSError as error:
            raise RendezvousError(
                f"{self.directory} cannot be used to meet in: {error.strerror}: "
                "pass another --hot-restart-dir"
            ) from error

    def take_ticket(self, seconds: float) -> Ticket:
        """Take the next ticket, which the caller owns; wait `seconds` at most for others.

        Raises Busy, or OSError if the file of the tickets cannot be used.
        """
        return Ticket(self.directory / TICKETS, seconds)

    # -- names ---------------------------------------------------------------------------------

    def connect_to_parent(self, endpoint: Endpoint) -> bool:
        """Connect to whoever serves; False if nobody does."""
        try:
            endpoint.connect(self.parent_path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as error:
            raise RendezvousError(
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

    def succeeded(self) -> bool:
        """Whether somebody answers, or one stands by who was replaced after this instance."""
        return self.parent_answers() or self.locks.newer_stands_by()

    def bind_child(
        self, seconds: float, check: Callable[[], None] = lambda: None
    ) -> tuple[Endpoint, OwnedPath]:
        """The child's endpoint, at its name. Only under the lock; the caller owns the endpoint.

        A name left behind by a killed process is cleared. One that a living process holds is a
        child that knows no lock (Volo): it may finish within `seconds`, else Busy. `check` is
        called at each look: what it raises ends the wait.
        """
        self.check_locks()
        deadline = time.monotonic() + seconds
        for left in self.directory.glob(_ASIDE + "*"):
            # One that is held may be on its way: an instance that takes its name back has no lock.
            if left.suffix == _KEPT or not self._is_held(str(left)):
                left.unlink(missing_ok=True)
        while self._is_held(self.child_path):
            check()
            if time.monotonic() >= deadline:
                raise Busy(
                    f"another instance holds {self.child_path} and was not done within "
                    f"{seconds:g} s: start again when it is"
                )
            time.sleep(POLL_INTERVAL)
        Path(self.child_path).unlink(missing_ok=True)
        endpoint = Endpoint()
        try:
            endpoint.bind(self.child_path)
            return endpoint, OwnedPath(self.child_path)
        except BaseException:
            endpoint.close()
            raise

    def check_locks(self) -> None:
        """Raise TakeoverError if the locks of this instance keep nobody from these names."""
        if not self.locks.are_current():
            raise TakeoverError(
                f"{self.directory} was removed after this instance had found it: start again"
            )

    def child_takeover_id(self) -> int:
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

    def claim_parent(
        self, then: Callable[[], None], check: Callable[[], None] = lambda: None
    ) -> tuple[Endpoint, OwnedPath]:
        """Become who answers: bind aside, rename over, call `then`; the caller owns the endpoint.

        At each instant the name leads to the old socket or to the new one. `check` is called just
        before the name changes, and just after. If it or `then` raises, the old socket has its
        name, unless yet another one has it by then. Raises TakeoverError if the directory is
        another one than that of this instance's locks.
        """
        aside = str(self.directory / f"{_ASIDE}{os.getpid()}")
        kept = aside + _KEPT
        self.check_locks()
        endpoint = Endpoint()
        try:
            for left in (aside, kept):
                Path(left).unlink(missing_ok=True)
            endpoint.bind(aside)
            owned = OwnedPath(aside, self.parent_path)
            check()
            with contextlib.suppress(FileNotFoundError):
                os.link(self.parent_path, kept)
            os.rename(aside, self.parent_path)
            try:
                check()
                then()
            except BaseException:
                if not os.path.lexists(kept):
                    owned.release()
                elif owned.holds():
                    os.rename(kept, self.parent_path)
                raise
            Path(kept).unlink(missing_ok=True)
        except BaseException:
            endpoint.close()
            for left in (aside, kept):
                Path(left).unlink(missing_ok=True)
            raise
        return endpoint, owned

    def close(self) -> None:
        """Free this instance's locks; in a forked child too, see `DirectoryLocks.close`."""
        self.locks.close()


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
    """Raise RendezvousError unless the directory is one, and ours alone to write in."""
    elsewhere = "or pass another --hot-restart-dir"
    found = os.lstat(directory)
    if stat.S_ISLNK(found.st_mode):
        raise RendezvousError(
            f"{directory} is a symbolic link to {os.readlink(directory)}: name the directory "
            f"itself, {elsewhere}"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise RendezvousError(f"{directory} is no directory: remove it, {elsewhere}")
    if found.st_uid != os.geteuid():
        raise RendezvousError(
            f"{directory} belongs to uid {found.st_uid}, this process runs as uid "
            f"{os.geteuid()}: chown it, {elsewhere}"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise RendezvousError(
            f"{directory} is writable by others (mode {stat.S_IMODE(found.st_mode):04o}): "
            f"chmod 700 it, {elsewhere}"
        )
