"""Connections move: kept-alive clients stay connected through a takeover."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from demo_app.deploys import DEADLINE, HERE, TOOK_OVER, UP, Deploys, Instance, command, free_port
from demo_app.load import LoadProcess, Mix
from hotrestart_plugins.handover import frames
from tests.support.instances import QUICK, STOPPED, WINDOW, demo, drained, takes_over, up
from tests.support.raw import Connection, ask, request

LONG = ("--timeout-keep-alive", "60")


def start(place: Deploys, args: list[str], *texts: str, **env: str) -> Instance:
    instance = place.start(args, **{**QUICK, **env})
    instance.wait_for(*texts)
    return instance


def outcome(place: Deploys, child: Instance) -> dict[str, int]:
    """The stats in the record of the takeover by this child."""
    stats: dict[str, int] = place.record_of(child.pid)["old"]["drain"]
    return stats


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize(("loop", "parser"), [("asyncio", "h11"), ("uvloop", "httptools")])
@pytest.mark.parametrize("server", ["uvicorn", pytest.param("uvicorn4", marks=pytest.mark.long)])
def test_no_client_reconnects(
    place: Deploys, tmp_path: Path, *, server: str, loop: str, parser: str, unix: bool
) -> None:
    """In takeovers in a row every request is answered, on the connection that the client had."""
    address = f"unix:{tmp_path}/app.sock" if unix else f"127.0.0.1:{free_port()}"
    args = command(server, address, "--loop", loop, "--http", parser, *LONG)
    current = start(place, args, *UP)
    with LoadProcess(address, Mix(keep_alive=32, slow=2, upload=2)) as load:
        load.wait(answers=100)
        for _ in range(3):
            old, current = current, start(place, args, TOOK_OVER)
            assert old.wait() == 0, old.log
            load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    assert (report.reconnects, report.closed_idle) == (0, 0), report


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn4"])
def test_whatever_waits_moves_at_once(place: Deploys, address: str, server: str) -> None:
    """Accepted and unread, and idle, are with the new instance before they say a word; those that
    it has are spread over its workers."""
    args = command(server, address, *LONG)
    old = start(place, args, *UP)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Connection(address)) for _ in range(40)]
        for connection in opened[:20]:
            assert old.owns(connection.get().pid)
        for _ in range(20):
            ask(address)
        new = start(place, args, TOOK_OVER)
        assert old.wait() == 0
        answers = [connection.get() for connection in opened]
        assert all(answer.status == 200 and not answer.closes for answer in answers)
        assert all(new.owns(answer.pid) for answer in answers)
        assert len({answer.pid for answer in answers}) == (4 if server == "uvicorn4" else 1)
        assert outcome(place, new)["handed_over"] == 40


@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_a_pair_of_requests_cut_anywhere_is_answered_once_each(
    place: Deploys, address: str, parser: str
) -> None:
    """Whatever part of a pipelined pair came before the takeover, and whatever comes after it."""
    args = command("uvicorn", address, "--http", parser, *LONG)
    old = start(place, args, *UP)
    pair = request("/?first") + request("/slow?seconds=0")
    with contextlib.ExitStack() as stack:
        cuts = [(cut, stack.enter_context(Connection(address))) for cut in range(len(pair) + 1)]
        for cut, connection in cuts:
            connection.send(pair[:cut])
        ask(address)
        new = start(place, args, TOOK_OVER)
        old.wait_for(STOPPED)
        for cut, connection in cuts:
            connection.send(pair[cut:])
        for cut, connection in cuts:
            first, second = connection.answer(), connection.answer()
            assert (first.status, second.status) == (200, 200), cut
            assert first.body.startswith(b'{"pid"'), cut
            assert second.body.startswith(b'{"pid"'), cut
            third = connection.get()
            assert new.owns(third.pid), cut
        assert old.wait() == 0
    assert outcome(place, new)["handed_over"] == len(cuts)


def test_a_busy_connection_moves_right_after_its_answer(place: Deploys, address: str) -> None:
    """It is answered by the old instance, without a word of closing, and goes on with the new."""
    args = command("uvicorn", address, *LONG)
    old = start(place, args, *UP)
    with Connection(address) as busy, Connection(address) as upload:
        busy.send(request("/slow?seconds=1.5"))
        upload.send(request("/upload", "Content-Length: 8\r\n").replace(b"GET", b"POST") + b"half")
        ask(address)
        new = start(place, args, TOOK_OVER)
        old.wait_for(STOPPED)
        upload.send(b"full")
        for connection in (upload, busy):
            answer = connection.answer()
            assert (answer.status, answer.closes) == (200, False)
            assert new.owns(connection.get().pid)
        assert old.wait() == 0


AHEAD = """
import asyncio, os

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("no lifespan")
    size = 30_000_000 if scope["path"] == "/big" else 2
    message = await receive()
    while scope["path"] == "/late" and message["more_body"]:
        message = await receive()
    await asyncio.sleep(0.05)
    headers = {"content-length": str(size), "x-served-by": str(os.getpid())}
    headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * size})
"""


@pytest.mark.parametrize("parser", ["h11", "httptools"])
def test_whoever_is_ahead_of_the_other(
    place: Deploys, address: str, tmp_path: Path, parser: str
) -> None:
    """An answer is complete before its client has read it: the connection moves once it has. A
    client has always one more request under way: it is told to come back, and nobody else is."""
    (tmp_path / "ahead.py").write_text(AHEAD)
    args = command("uvicorn", address, "--http", parser, "--app-dir", str(tmp_path), *LONG)
    args[args.index("app:app")] = "ahead:app"
    old = start(place, args, *UP, HOTRESTART_DRAIN_TIMEOUT="4")
    with Connection(address) as reader, Connection(address) as sender, Connection(address) as late:
        late.send(request("/late", "Content-Length: 5\r\n").replace(b"GET", b"POST"))
        reader.send(request("/big"))
        assert reader.sock.recv(1, socket.MSG_PEEK)
        sender.send(request("/", "Content-Length: 5\r\n").replace(b"GET", b"POST"))
        new = start(place, args, TOOK_OVER)
        old.wait_for(STOPPED)
        sender.send(b"hello" + request() * 2)
        while not (answer := sender.answer()).closes:
            assert answer.pid == old.pid
            sender.send(request())
        late.send(b"hello")
        answer = late.answer()
        assert (answer.pid, answer.closes) == (old.pid, False)
        answer = reader.answer()
        assert (answer.pid, answer.closes, len(answer.body)) == (old.pid, False, 30_000_000)
        assert old.wait() == 0
        assert new.owns(reader.get().pid)
        assert new.owns(late.get().pid)
    assert "2 connections handed over" in old.log, old.log
    assert "aborted" not in drained(old.log)


def test_a_child_without_room_takes_what_it_can(place: Deploys, address: str) -> None:
    """What does not fit its descriptor limit stays with the old instance, and is answered there;
    what it had acknowledged before is its own."""
    args = command("uvicorn", address, *LONG)
    old = start(place, args, *UP)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Connection(address)) for _ in range(200)]
        for connection in opened:
            assert connection.get().pid == old.pid
        limited = ["bash", "-c", 'ulimit -n 100; exec "$@"', "bash", *args]
        new = start(place, limited, TOOK_OVER)
        old.wait_for(STOPPED)
        taken = 0
        for connection in opened:
            # The old one serves those that have yet to move: until they have, or may not.
            while (answer := connection.get()).pid == old.pid and not answer.closes:
                assert answer.status == 200
            assert answer.status == 200
            assert (answer.pid, answer.closes) in {(old.pid, True), (new.pid, False)}
            taken += answer.pid == new.pid
        assert 0 < taken < 100
        assert old.wait() == 0
        assert outcome(place, new)["handed_over"] == taken
        assert new.running
        assert "descriptor limit" in new.log


def test_a_parent_without_room_goes(place: Deploys, address: str) -> None:
    """Its last descriptor is taken when it is told to go: it stops accepting all the same, and
    hands over what it has."""
    args = command("uvicorn", address, "--loop", "asyncio", *LONG)
    limited = ["bash", "-c", 'ulimit -n 60; exec "$@"', "bash", *args]
    old = start(place, limited, *UP)
    new = place.start(args, **QUICK)
    old.wait_for("Takeover started by pid")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Connection(address)) for _ in range(70)]
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0
        assert "Too many open files" in old.log
        for connection in opened:
            assert new.owns(connection.get().pid)


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn4"])
def test_a_child_that_dies_with_connections_in_flight(
    place: Deploys, address: str, server: str
) -> None:
    """What it had not acknowledged is answered by the old instance, and stays with it; what it had
    is lost with it."""
    args = command(server, address, *LONG)
    old = start(place, args, *UP, **WINDOW)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Connection(address)) for _ in range(40)]
        for connection in opened:
            assert old.owns(connection.get().pid)
        late = [stack.enter_context(Connection(address)) for _ in range(8)]
        for connection in late:
            connection.send(request("/slow?seconds=3"))
        new = start(place, args, TOOK_OVER)
        old.wait_for(STOPPED)
        assert new.owns(opened[0].get().pid)  # it has taken what was offered at once
        os.killpg(new.pid, signal.SIGKILL)
        new.wait()
        old.wait_for("Accepting again")
        for connection in late:
            answer = connection.answer()
            assert (answer.status, old.owns(answer.pid), answer.closes) == (200, True, False)
        lost = 0
        for connection in opened:  # those that were still on their way stayed
            try:
                assert old.owns(connection.get().pid)
            except OSError:
                lost += 1
        assert lost
    assert old.owns(ask(address).pid)


def one_worker(server: str, address: str, keep_alive: int) -> list[str]:
    """The demo's command line."""
    if server == "uvicorn":
        return demo(server, address, "--timeout-keep-alive", str(keep_alive))
    return demo(server, address, "-w", "1", "--keep-alive", str(keep_alive))


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn gthread", "gunicorn asgi"])
def test_what_arrives_at_one_that_was_replaced_goes_on(
    place: Deploys, address: str, server: str
) -> None:
    """Busy with the first instance until the second is replaced: it comes to the second, and from
    there to the third. It would be served by the second until that ends, and be cut off."""
    args = one_worker(server, address, keep_alive=60)
    first = start(place, args, *UP, **WINDOW)
    with Connection(address) as busy:
        busy.begin_upload()
        second = start(place, args, TOOK_OVER, **WINDOW)
        first.wait_for(STOPPED)
        third = start(place, args, TOOK_OVER, **WINDOW)
        second.wait_for(STOPPED)
        busy.send(b"hello")
        answer = busy.answer()
        deadline = time.monotonic() + DEADLINE
        while not third.owns(answer.pid):
            assert (answer.status, answer.closes) == (200, False)
            assert time.monotonic() < deadline
            answer = busy.get()


@pytest.mark.once
@pytest.mark.parametrize("server", ["uvicorn", "gunicorn gthread", "gunicorn asgi"])
def test_one_that_moves_twice_keeps_its_timeout(place: Deploys, address: str, server: str) -> None:
    """Where it is asked nothing meanwhile, too: its client may have gone without a word."""
    args = one_worker(server, address, keep_alive=8)
    old = start(place, args, *UP)
    with Connection(address) as idle:
        assert not idle.get().closes
        for _ in range(2):
            new = start(place, args, TOOK_OVER)
            assert old.wait() == 0
            assert outcome(place, new)["handed_over"] == 1
            old = new
        assert idle.at_end()


def test_switched_off(place: Deploys, address: str) -> None:
    """--no-connection-handover: each connection is answered once more, with `close`."""
    args = command("uvicorn", address, "--no-connection-handover", *LONG)
    old = start(place, args, *UP)
    with Connection(address) as idle:
        assert idle.get().pid == old.pid
        new = start(place, args, TOOK_OVER)
        old.wait_for(STOPPED)
        answer = idle.get()
        assert (answer.status, answer.pid, answer.closes) == (200, old.pid, True)
        assert old.wait() == 0
        assert outcome(place, new)["handed_over"] == 0


@pytest.mark.descriptors
def test_a_thousand_connections_go_in_one_go(place: Deploys, address: str) -> None:
    """All alive behind it, none reconnected."""
    args = command("uvicorn", address, *LONG)
    old = start(place, args, *UP)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Connection(address)) for _ in range(1000)]
        for connection in opened:
            connection.send(request())
        for connection in opened:
            assert connection.answer().pid == old.pid
        new = start(place, args, TOOK_OVER)
        assert old.wait() == 0
        for connection in opened:
            connection.send(request())
        for connection in opened:
            assert connection.answer().pid == new.pid
        assert outcome(place, new)["handed_over"] == 1000


ENDS_AS_ONE_COMES = """
import asyncio
from app import app
from hotrestart_plugins.gunicorn.adapters.asgi import AsgiAdapter
shut_down = AsgiAdapter._shut_down
async def ends(adapter, gunicorns):
    print("ends", flush=True)
    while not adapter._adopter.pending:
        await asyncio.sleep(0)
    await shut_down(adapter, gunicorns)
AsgiAdapter._shut_down = ends
"""


@pytest.mark.once
def test_what_comes_to_a_worker_as_it_ends_is_answered(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """It was acknowledged, as in the test before; and gunicorn waits for connections alone."""
    (tmp_path / "ends.py").write_text(ENDS_AS_ONE_COMES)
    more = ["-w", "1", "--max-requests", "1", "--pythonpath", f"{tmp_path},{HERE}"]
    args = demo("gunicorn asgi", address, *more)
    args[args.index("app:app")] = "ends:app"
    new = takes_over(place, up(place, args, **WINDOW), args)
    worker = ask(address).pid  # which is used up by that
    new.wait_for("ends")
    (path,) = (place.directory / "meet").glob(f"to-new.*.{worker}")
    client, theirs = socket.socketpair()
    with client, theirs, frames.connect(path) as channel:
        client.settimeout(DEADLINE)
        channel.settimeout(DEADLINE)
        client.sendall(request())
        frames.send(channel, 1, [(theirs.fileno(), frames.ConnectionState.FRESH)])
        theirs.close()
        assert frames.acknowledged(channel) == 1
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
