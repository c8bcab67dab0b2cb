"""The driver of the lifecycle keeps watching, whatever the functions below it raise."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hotrestart_plugins import HotRestart
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.record import Record
from hotrestart_plugins.draining.stats import DrainStats
from hotrestart_plugins.handover.frames import HandoverTarget
from hotrestart_plugins.lifecycle.table import Event, State
from hotrestart_plugins.settings import Settings
from hotrestart_plugins.uvicorn.lifecycle_driver import LifecycleDriver
from hotrestart_plugins.uvicorn.takeover import Takeover
from tests.support.processes import DEADLINE, Instance, Processes, free_address

if TYPE_CHECKING:
    from typing_extensions import Self

pytestmark = pytest.mark.usefixtures("no_leak")
uvicorn = pytest.importorskip("uvicorn")
FAULT = "Error in hotrestart_plugins; this instance keeps serving"


class Counter:
    """An instance that serves nobody, and counts what it is told to do."""

    def __init__(self, takeover: Takeover) -> None:
        self.stats = DrainStats()
        self.done: list[str] = []
        self.drained = asyncio.Event()
        self._takeover = takeover

    def take_over(self) -> None:
        self._takeover.ready()

    async def pause(self, _target: HandoverTarget | None = None) -> None:
        self.done.append("pause")

    async def all_paused(self) -> bool:
        return True

    async def resume(self) -> None:
        self.done.append("resume")

    async def drain(self, _seconds: float) -> bool:
        await self.drained.wait()
        return True

    def abort(self) -> None:
        self.done.append("abort")

    def close_listeners(self) -> None:
        self.done.append("close listeners")

    def shut_down(self) -> None:
        self.done.append("shut down")


class Running:
    """An instance in this process that has started, and its driver."""

    def __init__(self, directory: Path, address: str) -> None:
        host, port = address.split(":")
        config = uvicorn.Config("none:app", host=host, port=int(port), log_config=None)
        settings = Settings.gather({"directory": directory, "rollback_window": 3600.0})
        journal = Journal(logging.getLogger("uvicorn.error"))
        self.takeover = Takeover(config, settings, journal)
        self.serving = Counter(self.takeover)
        self.driver = LifecycleDriver(self.takeover, self.serving, journal)
        self.listeners: list[socket.socket] = []

    @property
    def hot(self) -> HotRestart:
        assert self.takeover.hot is not None
        return self.takeover.hot

    @property
    def state(self) -> State:
        return self.driver.lifecycle.state

    async def __aenter__(self) -> Self:
        self.listeners = self.driver.begin()
        self.driver.report(Event.READY)
        assert self.state is State.ACCEPTING
        return self

    async def __aexit__(self, *_exc_info: object) -> None:
        self.driver.stop()
        await asyncio.sleep(0)  # what was cancelled ends
        self.takeover.close()
        for sock in self.listeners:
            sock.close()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async def reached() -> None:
            while not condition():  # noqa: ASYNC110 (no descriptor tells of it)
                await asyncio.sleep(0.005)

        try:
            await asyncio.wait_for(reached(), DEADLINE)
        except asyncio.TimeoutError:
            pytest.fail(f"{what}: not within {DEADLINE:g} s; it is {self.state.value}")


def faulty(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False
) -> list[int]:
    """Have the function fail at its first call, before or `after` its work; counts the calls."""
    original = getattr(owner, name)
    calls: list[int] = []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        first = len(calls) == 1
        if first and not after:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        result = original(*args, **kwargs)
        if first:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return result

    monkeypatch.setattr(owner, name, fails_once)
    return calls


@pytest.fixture
def run(
    meet: Path, processes: Processes, caplog: pytest.LogCaptureFixture
) -> Callable[[Callable[[Running, Instance, str], Awaitable[None]]], None]:
    """Runs a test on a loop, with an instance in this process, and one that can be told to start.

    The log must have the traceback of the fault once.
    """
    address = free_address()
    peer = processes.instance()  # before there is a loop in this process

    def runs(test: Callable[[Running, Instance, str], Awaitable[None]]) -> None:
        async def steps() -> None:
            async with Running(meet, address) as running:
                await test(running, peer, address)

        with caplog.at_level(logging.INFO, "uvicorn.error"):
            asyncio.run(steps())
        faults = [record for record in caplog.records if record.getMessage().startswith(FAULT)]
        assert len(faults) == 1, caplog.text
        assert faults[0].exc_info

    return runs


async def told(peer: Instance, verb: str, *args: object) -> Any:
    """Tell the other instance to do something; this one's loop goes on meanwhile."""
    return await asyncio.to_thread(peer.call, verb, *args)


async def asks(peer: Instance, meet: Path, address: str) -> bool:
    """The other instance begins a takeover; whether it was given the listener."""
    await told(peer, "initialize", str(meet), 1, {})
    return bool(await told(peer, "dup", address))


@pytest.mark.parametrize("name", ["handle", "fileno"])
def test_an_instance_that_failed_to_answer_answers(
    run: Any, meet: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The next look at the parent socket finds the question still there."""

    async def test(running: Running, peer: Instance, address: str) -> None:
        calls = faulty(monkeypatch, running.hot, name)
        if name == "fileno":
            running.driver._guarded(lambda: None)
        assert await asks(peer, meet, address)
        assert len(calls) > 1

    run(test)


def test_an_instance_that_fails_after_it_was_told_to_go_makes_way(
    run: Any, meet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(running: Running, peer: Instance, address: str) -> None:
        assert await asks(peer, meet, address)
        await running.until(lambda: running.hot.child is not None, "it knows who asked")
        original = running.hot.handle

        def handle() -> bool:
            original()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(running.hot, "handle", handle)
        await told(peer, "ready")
        await running.until(lambda: running.state is State.DRAINING, "it drains")
        assert running.serving.done == ["pause"]
        monkeypatch.setattr(running.hot, "handle", original)

    run(test)


@pytest.mark.parametrize("name", ["child_ended", "fileno"])
def test_the_crash_of_a_new_instance_is_not_missed(
    run: Any, meet: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever fails as it is noticed: this instance serves again."""

    async def test(running: Running, peer: Instance, address: str) -> None:
        assert await asks(peer, meet, address)
        await told(peer, "ready")
        await running.until(lambda: running.state is State.DRAINING, "it drains")
        faulty(monkeypatch, running.hot, name)
        if name == "fileno":
            running.driver._guarded(lambda: None)
        peer.kill(signal.SIGKILL)
        await running.until(lambda: running.state is State.SERVING_AGAIN, "it serves again")
        await running.until(lambda: "resume" in running.serving.done, "it accepts again")

    run(test)


def test_a_record_that_cannot_be_opened_does_not_keep_an_instance_from_making_way(
    run: Any, meet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is for people to read; the instance stops accepting without it, too."""

    async def test(running: Running, peer: Instance, address: str) -> None:
        assert await asks(peer, meet, address)
        faulty(monkeypatch, Record, "__init__")
        await told(peer, "ready")
        await running.until(lambda: running.state is State.DRAINING, "it drains")
        running.serving.drained.set()
        await running.until(lambda: running.state is State.STANDING_BY, "it stands by")

    run(test)


def test_a_timer_that_fails_leaves_the_instance_watching(
    run: Any, meet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window ends as it should all the same; the instance exits after its drain."""

    async def test(running: Running, peer: Instance, address: str) -> None:
        assert await asks(peer, meet, address)
        await told(peer, "ready")
        await running.until(lambda: running.state is State.DRAINING, "it drains")
        faulty(monkeypatch, running.hot, "stand_down")
        running.driver._on_timer(Event.WINDOW_ENDED)
        assert running.state is State.STOOD_DOWN
        running.serving.drained.set()
        await running.until(lambda: running.state is State.LEAVING, "it leaves")
        await running.until(lambda: len(running.serving.done) == 3, "it closes its listeners")
        assert sorted(running.serving.done) == ["close listeners", "pause", "shut down"]

    run(test)


def test_faults_that_go_on_do_not_fill_the_log(
    meet: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three in a row are said, and the next one a minute later; after a success, three again."""

    def fails() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def steps() -> None:
        async with Running(meet, free_address()) as running:
            for _ in range(8):
                running.driver._guarded(fails)
            assert caplog.text.count(FAULT) == 3
            running.driver._guarded(lambda: None)
            running.driver._guarded(fails)
            assert caplog.text.count(FAULT) == 4
            assert running.state is State.ACCEPTING

    with caplog.at_level(logging.INFO, "uvicorn.error"):
        asyncio.run(steps())
