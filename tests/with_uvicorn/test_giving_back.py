"""Connections go to the new instance, and come back: the same handover, the other way."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.deploys import Deploys, Instance
from demo_app.load import LoadProcess, Mix
from hotrestart_plugins.handover.frames import HandoverTarget, Side
from tests.support import driven_server
from tests.support.processes import DEADLINE, ROOT, eventually, open_descriptors
from tests.support.raw import Connection, request


class Driven:
    """A `driven_server`, and this end of its line."""

    def __init__(self, place: Deploys, listener: socket.socket, *args: str) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line.settimeout(DEADLINE)
        fds = (theirs.fileno(), listener.fileno())
        program = [sys.executable, driven_server.__file__, *map(str, fds), *args]
        self.instance: Instance = place.start_passing(fds, program, PYTHONPATH=str(ROOT))
        theirs.close()
        self.answered()

    @property
    def pid(self) -> int:
        return self.instance.pid

    def answered(self) -> None:
        assert self.line.recv(8) == b"ok", self.instance.log

    def tell(self, name: str, *target: HandoverTarget) -> None:
        messages = [(str(one.directory), one.takeover_id, one.side.value) for one in target]
        self.line.send(json.dumps([name, *messages]).encode())
        self.answered()

    def close(self) -> None:
        self.line.close()


@contextlib.contextmanager
def driven(place: Deploys, listener: socket.socket, *args: str) -> Iterator[Driven]:
    with contextlib.closing(Driven(place, listener, *args)) as server:
        yield server


def answered_by(server: Driven, connections: list[Connection]) -> None:
    """Each answers, keeps its connection, and is with this server in the end."""
    deadline = time.monotonic() + DEADLINE
    for connection in connections:
        while True:
            answer = connection.get()
            assert (answer.status, answer.closes) == (200, False), server.instance.log
            if answer.pid == server.pid:
                break
            assert time.monotonic() < deadline, f"{answer.pid} instead of {server.pid}"


@pytest.mark.parametrize(("loop", "parser"), [("asyncio", "h11"), ("uvloop", "httptools")])
def test_old_new_old(place: Deploys, meet: Path, loop: str, parser: str) -> None:
    """Twice in a row a new server takes all connections and gives them back, half a request and
    an upload included: no client connects again, no request is lost, no descriptor stays open."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        old = stack.enter_context(driven(place, listener, loop, parser))
        idle = [stack.enter_context(Connection(address)) for _ in range(20)]
        half, busy, fresh = (stack.enter_context(Connection(address)) for _ in range(3))
        answered_by(old, [*idle, half, busy])
        before = Counter(open_descriptors(old.pid).values())
        load = stack.enter_context(LoadProcess(address, Mix(keep_alive=16, slow=2, upload=2)))
        load.wait(answers=100)
        for takeover_id in (1, 2):
            to_new, to_old = (
                HandoverTarget(meet, takeover_id, side) for side in (Side.NEW, Side.OLD)
            )
            new = stack.enter_context(driven(place, listener, loop, parser))
            new.tell("receive", to_new)
            half.send(request()[:9])
            busy.begin_upload()
            old.tell("pause", to_new)
            half.send(request()[9:])
            busy.send(b"hello")
            for connection in (half, busy):
                assert connection.answer().pid == old.pid
            everybody = [*idle, half, busy]
            if takeover_id == 2:
                everybody.append(fresh)  # the first time it says nothing anywhere
            answered_by(new, everybody)
            load.wait(answers=100)

            half.send(request()[:9])
            busy.begin_upload()
            old.tell("receive", to_old)
            old.tell("resume")
            new.tell("pause", to_old)
            half.send(request()[9:])
            busy.send(b"hello")
            for connection in (half, busy):
                answer = connection.answer()
                assert (answer.pid, answer.closes) == (new.pid, False)
            answered_by(old, [*everybody, fresh])
            load.wait(answers=100)
            new.tell("end")
            assert new.instance.wait() == 0, new.instance.log
        report = load.stop()
        assert not report.failures, report
        assert (report.reconnects, report.closed_idle) == (0, 0), report

        def more() -> Counter[str]:
            return Counter(open_descriptors(old.pid).values()) - before

        # The listener for the last new instance, should it give back more.
        eventually(lambda: more().total() == 1, f"one descriptor more, not {more()}")
