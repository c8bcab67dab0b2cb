"""A `DrainingServer` on strings: a message comes in, it does as told, and answers with ``ok``.

    python driven_server.py LINE LISTENER LOOP PARSER

LINE and LISTENER are descriptors: a SOCK_SEQPACKET socket, and what to serve on. A message is JSON:
the name of a method below, and the target, if there is one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path

import uvicorn

from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.uvicorn.draining_server import DrainingServer
from tests.support.processes import DEADLINE


class DrivenServer(DrainingServer):
    def __init__(self, config: uvicorn.Config, line: socket.socket) -> None:
        super().__init__(config)
        self.line = line
        self.tasks: list[asyncio.Task[object]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tasks.append(asyncio.create_task(self.obey()))

    async def obey(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.line, b"ok")
        while message := await loop.sock_recv(self.line, 4096):
            name, *target = json.loads(message)
            await getattr(self, f"do_{name}")(*map(parse, target))
            await loop.sock_sendall(self.line, b"ok")
        self.should_exit = True

    async def do_receive(self, target: HandoverTarget) -> None:
        self.receive(target)

    async def do_pause(self, target: HandoverTarget) -> None:
        await self.pause(target)
        self.tasks.append(asyncio.create_task(self.drain(DEADLINE)))

    async def do_resume(self) -> None:
        self.tasks.pop().cancel()
        await self.resume()

    async def do_end(self) -> None:
        self.should_exit = True


def parse(target: list[str]) -> HandoverTarget:
    directory, takeover_id, side = target
    return HandoverTarget(Path(directory), int(takeover_id), Side(side))


def main() -> None:
    line, listener = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    line.setblocking(False)
    loop, parser = sys.argv[3:]
    config = uvicorn.Config(
        "demo_app.app:app", loop=loop, http=parser, timeout_keep_alive=60, access_log=False
    )
    DrivenServer(config, line).run(sockets=[listener])


if __name__ == "__main__":
    main()
