"""What a handover needs from a server: its connections, and its event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from hotrestart_plugins.handover.frames import ConnectionState

ConnectionT_contra = TypeVar("ConnectionT_contra", contravariant=True)


class ConnectionAdapter(Protocol[ConnectionT_contra]):
    """How a `ConnectionSender` handles the connections of one kind of server."""

    def state(self, connection: ConnectionT_contra) -> ConnectionState | None:
        """Return the state of a connection that is between two messages; None if it must stay."""

    def on_response(self, connection: ConnectionT_contra, answered: Callable[[], None]) -> None:
        """Arrange that `answered` is called after each answer, unless the server does so itself."""

    def suspend(self, connection: ConnectionT_contra, state: ConnectionState) -> None:
        """Stop reading the connection, and stop its keep-alive timer."""

    def resume(self, connection: ConnectionT_contra, state: ConnectionState) -> None:
        """Undo `suspend`."""

    def fileno(self, connection: ConnectionT_contra) -> int:
        """Return the descriptor of the connection's socket; it stays the server's."""

    def discard(self, connection: ConnectionT_contra) -> None:
        """Close this process's copy of a connection that the other process has."""

    def is_closing(self, connection: ConnectionT_contra) -> bool:
        """Return whether the connection was closed while it was suspended."""


class Timer(Protocol):
    """A call that is scheduled."""

    def cancel(self) -> None:
        """Do not make the call."""


class EventLoop(Protocol):
    """What a handover needs from an event loop. asyncio's loops have it."""

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> object:
        """Call `callback` whenever `fd` is readable."""

    def remove_reader(self, fd: int, /) -> object:
        """Stop watching `fd`."""

    def call_soon(self, callback: Callable[[], object], /) -> Timer:
        """Call `callback` in the next turn of the loop."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Timer:
        """Call `callback` after `delay` seconds."""
