"""What any asyncio server does to be replaced: accept nothing more, and offer what it has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Collection, Iterable
from typing import Any

from hotrestart_plugins.moving import Mover


def duplicates(listeners: Iterable[socket.socket]) -> list[socket.socket]:
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


async def offer_all(mover: Mover, connections: Collection[Any]) -> bool:
    """Offer each that is open, and wait until the first are sent; False: there is nobody to take.

    `connections` is looked at as it is meanwhile, too: those that have ended are passed over.
    """
    if not mover.active:
        return False
    mover.watch_all(connections)
    await asyncio.sleep(0)  # the first are sent
    while not mover.all_watched:  # noqa: ASYNC110 (a few turns at most)
        await asyncio.sleep(0)
    return True
