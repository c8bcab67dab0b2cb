"""From a socket that has come to a connection of asyncio's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from hotrestart_plugins.connections import Arrival, Kind


class Intake:
    """Makes asyncio's connections of the sockets that have come."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], asyncio.Protocol],
        arrived: Callable[[Any, Kind], None],
    ) -> None:
        """`arrived` is called with the protocol of each connection, and what it waits for."""
        self._loop = loop
        self._factory = protocol_factory
        self._arrived = arrived
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """How many have come, and are no connections yet."""
        return len(self._tasks)

    async def settled(self) -> None:
        """Wait until all that have come are connections: a few turns of the loop."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def take_in(self, arrivals: Sequence[Arrival]) -> None:
        """Owns them from here on."""
        for one in arrivals:
            task = self._loop.create_task(self._connect(one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, arrival: Arrival) -> None:
        try:
            _, protocol = await self._loop.connect_accepted_socket(self._factory, arrival.sock)
        except (OSError, ValueError):  # its client has gone; it never was a connection
            arrival.sock.close()
            return
        self._arrived(protocol, arrival.kind)
