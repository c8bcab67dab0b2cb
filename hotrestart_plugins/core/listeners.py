"""Registered listeners, and the paths that this process owns."""

from __future__ import annotations

import contextlib
import fcntl
import os


class OwnedPath:
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


class RegisteredListener:
    """One registered listener. Owns a duplicate of the descriptor that was registered."""

    def __init__(self, fd: int, path: str | None) -> None:
        """`path`: the file of a Unix listener. Raises OSError if `fd` is not open."""
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        self.owned_path: OwnedPath | None = None
        if path is not None:
            with contextlib.suppress(OSError):
                self.owned_path = OwnedPath(path)

    def close(self) -> None:
        """Close the duplicate."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
