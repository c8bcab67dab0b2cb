"""What the handover needs to know of a server: its connections, and its event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from hotrestart_plugins.handover.frames import ConnectionState


class ConnectionAdapter(Protocol):
    """How one server's connections are dealt with."""

    def state(self, connection: Any) -> ConnectionState | None:
        """What it waits for, if it stands between two messages; None: it must stay."""

    def on_response(self, connection: Any, answered: Callable[[], None]) -> None:
        """Have `answered` called behind each answer from now on, if nobody else sees to that."""

    def suspend(self, connection: Any, state: ConnectionState) -> None:
        """Read nothing from it, and let it be closed by no timer."""

    def resume(self, connection: Any, state: ConnectionState) -> None:
        """Read it again, after `suspend`."""

    def fileno(self, connection: Any) -> int:
        """The descriptor of its socket."""

    def discard(self, connection: Any) -> None:
        """It is another's: close the copy."""

    def is_closing(self, connection: Any) -> bool:
        """Whether it was closed while it was held."""


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None:
        """Do not call."""


class EventLoop(Protocol):
    """What is needed of an event loop; asyncio's have it."""

    def add_reader(self, fd: int, callback: Callable[..., object], /, *args: Any) -> object:
        """Call whenever `fd` is readable."""

    def remove_reader(self, fd: int, /) -> object:
        """No longer."""

    def call_soon(self, callback: Callable[..., object], /, *args: Any) -> Timer:
        """Call in the next turn."""

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any) -> Timer:
        """Call after `delay` seconds."""
