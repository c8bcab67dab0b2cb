"""What goes wrong in a handover stays in it: no event loop hears of it, and connections stay."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hotrestart_plugins.core import events, fence
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.handover import frames, sender
from hotrestart_plugins.handover.frames import (
    ConnectionState,
    HandoverTarget,
    ReceivedConnection,
    Side,
)
from hotrestart_plugins.handover.receiver import ConnectionReceiver
from hotrestart_plugins.handover.sender import ConnectionSender
from tests.support.processes import DEADLINE

LOG = logging.getLogger(__name__)
FAULT = "Error during the connection handover"
pytestmark = pytest.mark.usefixtures("no_leak")


class Connection:
    """One end of a pair of sockets, and whether it is read here."""

    def __init__(self) -> None:
        self.client, self.sock = socket.socketpair()
        self.read = True
        self.answered: Callable[[], None] | None = None

    def close(self) -> None:
        self.client.close()
        self.sock.close()


class Adapter:
    """An adapter of these; one method fails for one connection."""

    def __init__(self, fails: str = "", bad: Connection | None = None) -> None:
        self._fails = (fails, bad)

    def _called(self, name: str, connection: Connection) -> None:
        if (name, connection) == self._fails:
            raise ZeroDivisionError(name)

    def state(self, connection: Connection) -> ConnectionState | None:
        self._called("state", connection)
        return ConnectionState.IDLE if connection.read else None

    def on_response(self, connection: Connection, answered: Callable[[], None]) -> None:
        self._called("on_response", connection)
        connection.answered = answered

    def suspend(self, connection: Connection, _state: ConnectionState) -> None:
        connection.read = False
        self._called("suspend", connection)

    def resume(self, connection: Connection, _state: ConnectionState) -> None:
        connection.read = True
        self._called("resume", connection)

    def fileno(self, connection: Connection) -> int:
        self._called("fileno", connection)
        return connection.sock.fileno()

    def discard(self, connection: Connection) -> None:
        connection.sock.close()
        self._called("discard", connection)

    def is_closing(self, connection: Connection) -> bool:
        self._called("is_closing", connection)
        return connection.sock.fileno() < 0


def run(test: Callable[[], Awaitable[None]]) -> None:
    """With a loop that nothing may be raised into."""

    async def watched() -> None:
        raised: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: raised.append(context))
        await asyncio.wait_for(test(), DEADLINE)
        assert not raised

    asyncio.run(watched())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (what it looks at sets no event)
        await asyncio.sleep(0)


@pytest.fixture
def connections() -> Iterator[list[Connection]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Connection())) for _ in range(5)]


@pytest.fixture
def target(meet: Path) -> HandoverTarget:
    return HandoverTarget(meet, 1, Side.NEW)


def adopting(target: HandoverTarget, adopt: Callable[[ReceivedConnection], None]) -> Any:
    loop = asyncio.get_running_loop()
    return contextlib.closing(ConnectionReceiver(target, adopt, loop=loop, journal=Journal(LOG)))


def sending(
    target: HandoverTarget, adapter: Adapter, on_failure: Callable[[], None] = lambda: None
) -> ConnectionSender[Connection]:
    loop = asyncio.get_running_loop()
    return ConnectionSender(target, adapter, loop=loop, on_failure=on_failure, journal=Journal(LOG))


@pytest.mark.parametrize("name", ["state", "on_response", "suspend", "discard"])
def test_a_fault_with_one_connection_leaves_the_others_alone(
    target: HandoverTarget,
    connections: list[Connection],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """It stays here, and is read; or it was handed over, where only its copy makes trouble."""
    bad, *good = connections

    async def test() -> None:
        received: list[ReceivedConnection] = []
        with adopting(target, received.append):
            handover = sending(target, Adapter(name, bad))
            with contextlib.closing(handover):
                handover.offer_all(connections)
                await until(lambda: handover.handed_over >= set(good))
                await until(lambda: not handover.busy)
                assert handover.active
        for one in received:
            one.sock.close()
        assert handover.handed_over - set(good) == ({bad} if name == "discard" else set())

    run(test)
    assert bad.read is (name != "discard")
    assert [one.getMessage() for one in caplog.records] == [FAULT]


@pytest.mark.parametrize("name", ["fileno", "resume", "is_closing"])
def test_a_fault_that_holds_a_batch_up_ends_the_channel(
    target: HandoverTarget,
    connections: list[Connection],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """All connections stay, and are read here again; so do those that a second fault met."""
    bad, *good = connections
    failed: list[bool] = []

    async def test() -> None:
        listener = frames.listen(frames.path_of(target, 1))
        with listener:
            handover = sending(target, Adapter(name, bad), lambda: failed.append(True))
            handover.offer_all(connections)
            if name != "fileno":
                channel, _ = listener.accept()
                await until(lambda: not any(one.read for one in connections))
                channel.close()
            await until(lambda: not handover.active)

    run(test)
    assert failed == [True]
    assert all(one.read for one in good)
    assert FAULT in [one.getMessage() for one in caplog.records]


def test_an_answer_hears_of_no_fault(
    target: HandoverTarget, connections: list[Connection], caplog: pytest.LogCaptureFixture
) -> None:
    """The server calls it, in the midst of its own work."""
    bad, *_ = connections
    bad.read = False

    async def test() -> None:
        with adopting(target, lambda one: one.sock.close()):
            handover = sending(target, Adapter("suspend", bad))
            with contextlib.closing(handover):
                handover.add(bad)
                bad.read = True
                assert bad.answered is not None
                bad.answered()

    run(test)
    assert bad.read
    assert [one.getMessage() for one in caplog.records] == [FAULT]


def test_a_connection_that_cannot_be_adopted_is_closed(
    target: HandoverTarget, connections: list[Connection], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else has it any more; the others of the batch are adopted."""
    received: list[ReceivedConnection] = []
    first: list[ReceivedConnection] = []

    def adopt(connection: ReceivedConnection) -> None:
        if not first:
            first.append(connection)
            raise ZeroDivisionError
        received.append(connection)

    async def test() -> None:
        with adopting(target, adopt):
            handover = sending(target, Adapter())
            with contextlib.closing(handover):
                handover.offer_all(connections)
                await until(lambda: len(received) == len(connections) - 1)
        await until(lambda: len(handover.handed_over) == len(connections))

    run(test)
    assert connections[0].client.recv(1) == b""
    for one in received:
        one.sock.close()
    assert [one.getMessage() for one in caplog.records] == [FAULT]


def test_a_full_channel_is_waited_for_no_longer_than_an_acknowledgement(
    target: HandoverTarget,
    connections: list[Connection],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connections are served meanwhile, and after it."""
    monkeypatch.setattr(sender, "_ACK_TIMEOUT", 0.1)

    async def test() -> None:
        with frames.listen(frames.path_of(target, 1)):
            handover = sending(target, Adapter())
            (channel,) = (one._channel for one in handover._channels)
            with contextlib.suppress(BlockingIOError):
                while True:
                    channel.send(bytes(4096))
            handover.offer_all(connections)
            await until(lambda: not handover.active)

    run(test)
    assert all(one.read for one in connections)
    assert [one.getMessage() for one in caplog.records] == [
        (
            "Connection handover failed, connections stay here: "
            "[Errno 11] Resource temporarily unavailable"
        )
    ]


def test_an_acknowledgement_of_another_version_ends_the_channel(
    target: HandoverTarget, connections: list[Connection], caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        with frames.listen(frames.path_of(target, 1)) as listener:
            handover = sending(target, Adapter())
            handover.offer_all(connections)
            channel, _ = listener.accept()
            with channel:
                channel.send(bytes([frames.VERSION + 1, 1, 0, 0, 0]))
                await until(lambda: not handover.active)

    run(test)
    assert all(one.read for one in connections)
    assert [one.getMessage() for one in caplog.records] == [
        (
            "Connection handover failed, connections stay here: "
            "the other instance speaks version 2 of the handover, this one 1"
        )
    ]


def test_the_same_fault_over_and_over_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times, and then once a minute."""
    guarded = Fence(Journal(LOG), events.HANDOVER_FAULT)

    def fail(times: int) -> int:
        for _ in range(times):
            with guarded:
                raise ZeroDivisionError
        return len(caplog.records)

    assert fail(3) == 3
    monkeypatch.setattr(fence, "SECONDS_BETWEEN_TRACEBACKS", 0.0)
    assert fail(1000) == 3, "within a minute of the last one"
    guarded = Fence(Journal(LOG), events.HANDOVER_FAULT)
    assert fail(10) == 13, "a minute that is over at once"
    assert all(one.exc_info for one in caplog.records)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_fault_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), Fence(Journal(LOG), events.HANDOVER_FAULT):
        raise error
