"""The handover in any asyncio server: stop accepting, offer connections, adopt what comes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from hotrestart_plugins.handover.frames import ConnectionState, ReceivedConnection
from hotrestart_plugins.handover.sender import ConnectionSender


def duplicate_listeners(listeners: Iterable[socket.socket]) -> list[socket.socket]:
    """Of each one, the caller's; all or none. Raises OSError.

    They are made while there is room for a descriptor: there may be none when they are needed, to
    accept on again behind `stop_accepting`.
    """
    with contextlib.ExitStack() as made:
        # uvloop's own are no plain sockets.
        found = [
            made.enter_context(socket.socket(fileno=os.dup(one.fileno()))) for one in listeners
        ]
        made.pop_all()
    for one in found:
        one.setblocking(False)
    return found


async def stop_accepting(servers: Iterable[asyncio.AbstractServer], fds: Iterable[int]) -> None:
    """Close the servers, and with them the listeners' descriptors; lose nothing that they accepted.

    `Server.close()` loses a connection whose accept is done and whose transport is not yet made
    (cpython#109564): asyncio stops accepting first, and what is under way finishes. uvloop has the
    transport by then, and tells the protocol in the next turn: behind this, each one is known.
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


async def offer_all(sender: ConnectionSender, connections: Collection[Any]) -> bool:
    """Offer each that is open, and wait until the first are sent; False: there is nobody to take.

    `connections` is looked at as it is meanwhile, too: those that have ended are passed over.
    """
    if not sender.active:
        return False
    sender.offer_all(connections)
    await asyncio.sleep(0)  # the first are sent
    while not sender.all_offered:  # noqa: ASYNC110 (a few turns at most)
        await asyncio.sleep(0)
    return True


class ConnectionAdopter:
    """Makes asyncio's connections of the sockets that have come."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], asyncio.Protocol],
        on_adopted: Callable[[Any, ConnectionState], None],
    ) -> None:
        """`on_adopted` is called with the protocol of each connection, and what it waits for."""
        self._loop = loop
        self._factory = protocol_factory
        self._on_adopted = on_adopted
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """How many have come, and are no connections yet."""
        return len(self._tasks)

    async def settled(self) -> None:
        """Wait until all that have come are connections: a few turns of the loop."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def adopt(self, connections: Sequence[ReceivedConnection]) -> None:
        """Owns them from here on."""
        for connection in connections:
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, received: ReceivedConnection) -> None:
        try:
            _, protocol = await self._loop.connect_accepted_socket(self._factory, received.sock)
        except (OSError, ValueError):  # its client has gone; it never was a connection
            received.sock.close()
            return
        self._on_adopted(protocol, received.state)
