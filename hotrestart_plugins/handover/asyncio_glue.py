"""What any asyncio server needs for a handover: stop accepting, offer connections, adopt them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Collection, Iterable
from typing import Generic, TypeVar

from hotrestart_plugins.handover.frames import ConnectionState, ReceivedConnection
from hotrestart_plugins.handover.sender import ConnectionSender

ConnectionT = TypeVar("ConnectionT")
ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)

_CONNECT_TIMEOUT = 5.0  # seconds; it takes a few turns of the loop


def duplicate_listeners(listeners: Iterable[socket.socket]) -> list[socket.socket]:
    """Return a duplicate of each listener, which the caller owns; all or none. Raises OSError.

    Make them while there is room for a descriptor: there may be none when they are needed, to
    accept on again after `stop_accepting`.
    """
    with contextlib.ExitStack() as stack:
        # uvloop's own sockets are not of the class socket.socket.
        duplicates = [
            stack.enter_context(socket.socket(fileno=os.dup(listener.fileno())))
            for listener in listeners
        ]
        stack.pop_all()
    for duplicate in duplicates:
        duplicate.setblocking(False)
    return duplicates


async def stop_accepting(servers: Iterable[asyncio.AbstractServer], fds: Iterable[int]) -> None:
    """Close the servers, and with them the listeners' descriptors `fds`; lose no connection.

    `Server.close()` loses a connection whose accept is done and whose transport is not yet made
    (cpython#109564): asyncio stops accepting first, and what has begun finishes. uvloop has the
    transport by then, and tells the protocol in the next turn. After this, each connection is
    known to its protocol.
    """
    loop = asyncio.get_running_loop()
    if isinstance(loop, asyncio.SelectorEventLoop):
        for fd in fds:
            loop.remove_reader(fd)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    for server in servers:
        server.close()
    await asyncio.sleep(0)


async def offer_all(
    sender: ConnectionSender[ConnectionT], connections: Collection[ConnectionT]
) -> bool:
    """Offer each open connection, and wait until the first are sent; False if nobody receives.

    `connections` may change meanwhile: those that have ended are passed over.
    """
    if not sender.active:
        return False
    sender.offer_all(connections)
    await asyncio.sleep(0)  # the first are sent
    while not sender.all_offered:  # noqa: ASYNC110 (a few turns at most)
        await asyncio.sleep(0)
    return True


class ConnectionAdopter(Generic[ProtocolT]):
    """Makes asyncio connections of the sockets that were received."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], ProtocolT],
        on_adopted: Callable[[ProtocolT, ConnectionState], None],
    ) -> None:
        """`on_adopted` is called with the protocol of each connection, and what it waits for."""
        self._loop = loop
        self._factory = protocol_factory
        self._on_adopted = on_adopted
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """How many sockets were received that are no connections yet."""
        return len(self._tasks)

    async def settled(self) -> None:
        """Wait until all sockets that were received are connections: a few turns of the loop."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CONNECT_TIMEOUT)

    def adopt(self, received: ReceivedConnection) -> None:
        """Make a connection of the socket, which the adopter owns from here on."""
        task = self._loop.create_task(self._connect(received))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, received: ReceivedConnection) -> None:
        try:
            _, protocol = await self._loop.connect_accepted_socket(self._factory, received.sock)
        except (OSError, ValueError):  # its client has gone; it never was a connection
            received.sock.close()
            return
        self._on_adopted(protocol, received.state)
