"""The handover of one `DrainingServer` in this process, turn by turn of its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvicorn

from demo_app.deploys import DEADLINE
from hotrestart_plugins.handover import frames, sender
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from hotrestart_plugins.uvicorn.draining_server import DrainingServer
from tests.support.raw import Connection, request


@pytest.mark.descriptors
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_those_that_wait_for_their_turn_are_served(
    meet: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    """A new instance that takes nothing in holds up the batches under way, and no others."""
    monkeypatch.setattr(sender, "_ACK_TIMEOUT", 600.0)  # it is not over before the test is
    run_here(loop, meet, _held_up)


def test_what_is_accepted_in_the_turn_of_the_pause_moves(meet: Path) -> None:
    """uvloop's server has accepted it, and its protocol does not know yet."""
    run_here("uvloop", meet, _same_turn)


def run_here(
    loop: str, meet: Path, test: Callable[[DrainingServer, int, HandoverTarget], Awaitable[None]]
) -> None:
    """Have `test` done with a server in this process, the port of it, and a target."""
    config = uvicorn.Config("demo_app.app:app", port=0, loop=loop, lifespan="off", log_config=None)
    factory = config.get_loop_factory()
    assert factory is not None

    async def serve() -> None:
        server = DrainingServer(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        port = server.servers[0].sockets[0].getsockname()[1]
        await test(server, port, HandoverTarget(meet, os.getpid(), Side.NEW))
        server.drain_on_stop = False
        await server.shutdown()

    running = factory()
    try:
        running.run_until_complete(asyncio.wait_for(serve(), DEADLINE))
    finally:
        running.close()


async def _held_up(server: DrainingServer, port: int, target: HandoverTarget) -> None:
    with contextlib.closing(frames.listen(frames.path_of(target, 1))) as puppet:
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        for reader, writer in clients:
            writer.write(request())
            await reader.readuntil(b"}")
        await server.pause(target)
        channel, _ = puppet.accept()
        for _, writer in clients:
            writer.write(request())
        answers = [asyncio.ensure_future(reader.readuntil(b"}")) for reader, _ in clients]
        # Four batches of 64 are under way; none of the answers says that the connection closes.
        for answered in itertools.islice(asyncio.as_completed(answers), 300 - 4 * 64):
            assert b"connection: close" not in await answered
        assert sum(answer.done() for answer in answers) == 300 - 4 * 64
        channel.close()
        for answer in await asyncio.gather(*answers):
            assert answer.startswith(b"HTTP/1.1 200")
        await server.resume()
        for _, writer in clients:
            writer.close()


async def _same_turn(server: DrainingServer, port: int, target: HandoverTarget) -> None:
    with contextlib.closing(frames.listen(frames.path_of(target, 1))) as puppet:
        with Connection(f"127.0.0.1:{port}"):
            await asyncio.sleep(0)  # it is accepted
            await server.pause(target)
            channel, _ = puppet.accept()
            channel.setblocking(False)
            with channel:
                found = frames.receive(channel)
                assert found is not None
                for arrival in found[1]:
                    arrival.sock.close()
        assert len(found[1]) == 1


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_drain_waits_for_what_is_arriving(meet: Path, loop: str) -> None:
    """It was acknowledged, so the older instance has let it go; nobody else would answer it."""
    run_here(loop, meet, _arriving)


async def _arriving(server: DrainingServer, _port: int, place: HandoverTarget) -> None:
    path = frames.path_of(place, os.getpid())
    server.receive(place)
    await server.pause()
    client, ours = socket.socketpair()
    with client, ours, frames.connect(path) as channel:
        client.sendall(request())
        frames.send(channel, 1, [(ours.fileno(), frames.ConnectionState.FRESH)])
        acknowledged = asyncio.get_running_loop().create_future()

        def look() -> None:
            """In the very turn: a task would come to it when the connection is made."""
            asyncio.get_running_loop().remove_reader(channel.fileno())
            step = server.drain(DEADLINE)
            with contextlib.closing(step), contextlib.suppress(StopIteration):
                step.send(None)
                acknowledged.set_result("drains on")
                return
            acknowledged.set_result("has drained")

        asyncio.get_running_loop().add_reader(channel.fileno(), look)
        assert await acknowledged == "drains on"
        ours.close()
        assert await server.drain(DEADLINE)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_is_given_back_stays(meet: Path, loop: str) -> None:
    """A server that has handed over and now receives sends nothing back to where it comes from,
    also while it has yet to accept again; what was not acknowledged by then is its own."""
    run_here(loop, meet, _given_back)


async def _given_back(server: DrainingServer, port: int, to_new: HandoverTarget) -> None:
    to_old = to_new._replace(side=Side.OLD)
    with contextlib.closing(frames.listen(frames.path_of(to_new, 1))) as puppet:
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        idle_writer.write(request())
        await idle_reader.readuntil(b"}")
        await server.pause(to_new)
        channel, _ = puppet.accept()
        with channel:
            server.receive(to_old)
            client, ours = socket.socketpair()
            with ours, frames.connect(frames.path_of(to_old, os.getpid())) as back:
                frames.send(back, 1, [(ours.fileno(), frames.ConnectionState.IDLE)])
                reader, writer = await asyncio.open_connection(sock=client)
                writer.write(request())
                await reader.readuntil(b"}")
            await server.resume()
            for stream in (writer, idle_writer):
                stream.write(request())
            for answer in (reader, idle_reader):
                assert b"connection: close" not in await answer.readuntil(b"}")
            channel.setblocking(False)
            offered = frames.receive(channel)
            assert offered is not None
            for arrival in offered.connections:  # it was offered before, and not acknowledged
                arrival.sock.close()
            assert frames.receive(channel) is None
        for stream in (writer, idle_writer):
            stream.close()
