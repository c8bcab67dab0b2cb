"""The listeners that an instance hands on, and the paths that it made."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable

from hotrestart_plugins.core.address import Address
from hotrestart_plugins.errors import ConfigurationError


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


class ListenerRegistry:
    """What one instance has registered, by its name on the wire. Owns a duplicate of each.

    A Unix listener's path belongs to the last instance that has the listener. Whether another
    instance has it, or will need it, is known to the side of the takeover that this instance is
    on: `close` and `drop` are given that as `shared`.
    """

    def __init__(self) -> None:
        self.inherited: dict[str, Address] = {}
        """The addresses whose listeners came from the parent."""
        self._listeners: dict[str, RegisteredListener] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The addresses that are registered, in their order."""
        return tuple(self._listeners)

    def fd(self, name: str) -> int:
        """The descriptor of a listener, which stays the registry's; -1 if there is none."""
        listener = self._listeners.get(name)
        return -1 if listener is None else listener.fd

    def register(self, name: str, fd: int, path: str | None) -> None:
        """Keep a duplicate of `fd` under `name`; `path`: the file of a Unix listener, else None.

        Raises ConfigurationError if `fd` cannot be duplicated.
        """
        try:
            listener = RegisteredListener(fd, path)
        except OSError as error:
            raise ConfigurationError(
                f"descriptor {fd} cannot be kept for {name}: {error.strerror}"
            ) from error
        self.forget(name)
        self._listeners[name] = listener

    def disclaim_path(self, name: str) -> None:
        """Leave the path of this listener to whoever made it."""
        self._listeners[name].owned_path = None

    def forget(self, name: str) -> None:
        """Close the duplicate; the path stays."""
        listener = self._listeners.pop(name, None)
        if listener is not None:
            listener.close()

    def drop(self, name: str, shared: Callable[[str], bool]) -> None:
        """Close the duplicate, and unlink the path if it is not `shared`."""
        listener = self._listeners.get(name)
        if listener is not None and listener.owned_path is not None and not shared(name):
            listener.owned_path.release()
        self.forget(name)

    def close(self, shared: Callable[[str], bool]) -> None:
        """`drop` each."""
        for name in self.names:
            self.drop(name, shared)

    def disown(self) -> None:
        """In a forked child: close the copies; the paths are the other process's."""
        for name in self.names:
            self.forget(name)
