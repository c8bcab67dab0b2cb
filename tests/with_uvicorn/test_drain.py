"""How a replaced instance ends what it cannot hand over, and how the app hears of it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command
from demo_app.load import LoadProcess, Mix
from tests.support.instances import NO_HANDOVER, ONE_OR_MORE, demo
from tests.support.raw import Connection, ask, request

HANDSHAKE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
RESTART = (1012).to_bytes(2, "big")  # Service Restart, the IANA registry of close codes


def up(place: Deploys, args: list[str], **env: str) -> Instance:
    instance = place.start(args, **{"HOTRESTART_ROLLBACK_WINDOW": "0", **env})
    instance.wait_for(*UP)
    return instance


def take_over(place: Deploys, args: list[str], **env: str) -> Instance:
    instance = place.start(args, **{"HOTRESTART_ROLLBACK_WINDOW": "0", **env})
    instance.wait_for(TOOK_OVER)
    return instance


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while more := sock.recv(65536):
        data += more
    return data


@ONE_OR_MORE
def test_the_app_hears_of_the_drain(place: Deploys, address: str, server: str) -> None:
    """An endless stream ends on its own terms, and the health check turns; the new one is fine."""
    args = command(server, address, "--timeout-keep-alive", "60", NO_HANDOVER)
    old = up(place, args)
    with Connection(address) as stream, Connection(address) as checked:
        stream.send(request("/events"))
        read_until(stream.sock, b"data:")
        assert checked.get("/health").status == 200
        new = take_over(place, args)
        old.wait_for("Stopped accepting")
        assert b"event: bye" in read_until(stream.sock, b"0\r\n\r\n")
        assert checked.get("/health").status == 503
    assert ask(address, "/health").status == 200
    assert old.wait() == 0
    assert new.running


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn4", "gunicorn asgi", "gunicorn uvicorn"])
def test_long_lived_connections_are_ended_one_by_one(
    place: Deploys, address: str, server: str
) -> None:
    """In the last part of the drain: WebSockets with 1012, event streams with their last chunk."""
    args = command(server, address)
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="3")
    sockets = [Connection(address) for _ in range(4)]
    streams = [Connection(address) for _ in range(4)]
    for one in sockets:
        one.send(request("/ws", HANDSHAKE))
        assert b" 101 " in read_until(one.sock, b"\r\n\r\n")
    for one in streams:
        one.send(request("/events?count=100000", "Accept: text/event-stream\r\n"))
        read_until(one.sock, b"data:")
    take_over(place, args)
    for one in sockets:
        assert read_all(one.sock).endswith(RESTART)
    for one in streams:
        assert read_all(one.sock).endswith(b"0\r\n\r\n")
    assert old.wait() == 0
    assert "4 WebSockets closed, 4 event streams ended; exiting" in old.log, old.log
    assert "Traceback" not in old.log
    for one in (*sockets, *streams):
        one.sock.close()


STREAMS = """
import asyncio
ended = asyncio.Event()
HEAD = {"type": "http.response.start", "status": 200}

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("no lifespan")
    await receive()
    if scope["path"] == "/json":
        await send({**HEAD, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"[", "more_body": True})
        await ended.wait()
        await send({"type": "http.response.body", "body": b"]"})
        return
    await send({**HEAD, "headers": [(b"content-type", b"text/event-stream")]})
    flood = scope["path"] == "/flood"
    await send({"type": "http.response.body", "body": b"data: 1\\n\\n", "more_body": True})
    while flood:
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass
    ended.set()
"""
ACCEPT = "Accept: application/json, text/event-stream\r\n"


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn asgi"])
@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_only_event_streams_are_ended(
    place: Deploys, address: str, tmp_path: Path, server: str, http: str
) -> None:
    """Not every answer to a client that would accept one: those that are under way are finished.
    And of a stream's client that does not read, nobody else hears."""
    (tmp_path / "streams.py").write_text(STREAMS)
    one_parser = ("--http", http) if server == "uvicorn" else ("-w", "1")
    args = demo(server, address, *one_parser)
    args[args.index("app:app")] = "streams:app"
    env = {"PYTHONPATH": str(tmp_path), "HOTRESTART_DRAIN_TIMEOUT": "4"}
    old = up(place, args, **env)
    with contextlib.ExitStack() as stack:

        def asked(path: str) -> Connection:
            connection = stack.enter_context(Connection(address))
            connection.send(request(path, ACCEPT))
            assert connection.sock.recv(12) == b"HTTP/1.1 200"
            return connection

        flood = asked("/flood")
        plain = [asked("/json") for _ in range(5)]
        stream = asked("/stream")
        take_over(place, args, **env)
        assert read_all(stream.sock).endswith(b"0\r\n\r\n")
        for one in plain:
            read_until(one.sock, b"1\r\n]\r\n0\r\n\r\n")
        assert old.wait() == 0
        assert "1 event stream ended, 1 aborted; exiting" in old.log, old.log
        flood.sock.close()


def test_what_a_drain_did_is_counted(place: Deploys, address: str) -> None:
    """One line: answered, ended after an answer, idle, cut off."""
    args = command("uvicorn", address, "--timeout-keep-alive", "8", NO_HANDOVER)
    old = up(place, args)
    with Connection(address) as idle, Connection(address) as unread:
        new = place.start(args)
        old.wait_for("Takeover started by pid")
        assert idle.get().status == 200  # so that it is idle for long enough
        assert ask(address).status == 200
        new.wait_for(TOOK_OVER)
        old.wait_for("Stopped accepting")
        unread.send(request())
        assert unread.answer().closes
        assert idle.at_end()  # its own keep-alive timeout
        assert old.wait() == 0
    counted = (
        "Drained: 1 request answered, 1 connection closed after an answer, "
        "1 idle connection closed; exiting"
    )
    assert counted in old.log


@ONE_OR_MORE
def test_a_plain_stop_takes_the_same_care(place: Deploys, address: str, server: str) -> None:
    """SIGTERM without a successor: accepted and unread, and idle, are answered once more."""
    old = up(place, command(server, address, "--timeout-keep-alive", "60"))
    with Connection(address) as unread, Connection(address) as idle:
        assert idle.get().status == 200
        assert ask(address).status == 200
        old.signal(signal.SIGTERM)
        while True:  # until it no longer accepts
            try:
                ask(address)
            except OSError:
                break
        for connection in (unread, idle):
            connection.send(request())
            answer = connection.answer()
            assert (answer.status, answer.closes) == (200, True)
    assert old.wait() in (0, -signal.SIGTERM)


def test_a_plain_stop_does_not_wait_for_the_silent(place: Deploys, address: str) -> None:
    """A connection without a request ends with the keep-alive timeout, not the drain timeout."""
    args = command("uvicorn", address, "--timeout-keep-alive", "1")
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="3600")
    with Connection(address) as silent:
        assert ask(address).status == 200
        old.signal(signal.SIGTERM)
        assert silent.at_end()
    assert old.wait() == -signal.SIGTERM


@ONE_OR_MORE
@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ("/health", ""),
        ("checks:fine", ""),
        ("/nowhere", "the probe /nowhere was answered with 404"),
        ("checks:sick", "the probe checks:sick failed: ValueError: too old a schema"),
        ("checks:no", "the probe checks:no said no"),
    ],
)
def test_a_probe_is_asked_before_the_takeover(
    place: Deploys, address: str, tmp_path: Path, *, server: str, probe: str, said: str
) -> None:
    """A sick child exits with 3 and says what it was asked, having accepted nothing."""
    (tmp_path / "checks.py").write_text(
        "def fine(): pass\n"
        "def sick(): raise ValueError('too old a schema')\n"
        "async def no(): return False\n"
    )
    args = command(server, address)
    old = up(place, args)
    env = {"HOTRESTART_ROLLBACK_WINDOW": "0", "PYTHONPATH": str(tmp_path)}
    with LoadProcess(address, Mix(one_shot=4)) as load:
        load.wait(answers=1)
        new = place.start([*args, "--probe", probe], **env)
        if said:
            assert new.wait() == 3, new.log
            assert said in new.log
            assert "Traceback" not in new.log
            assert all(old.owns(pid) for pid in load.stop().by_pid)
        else:
            new.wait_for(TOOK_OVER)
            assert old.wait() == 0


def test_the_record_of_a_takeover(place: Deploys, address: str) -> None:
    """Both pids, what went over, what became of the connections, each step's time, the outcome."""
    args = command("uvicorn", address)
    old = up(place, args)
    new = take_over(place, args)
    new.wait_for(*UP)  # behind its last word in the record
    assert old.wait() == 0
    (path,) = (place.directory / "meet").glob("handover-*.json")
    record = json.loads(path.read_text())
    assert record["outcome"] == "taken over"
    assert (record["old"]["pid"], record["new"]["pid"]) == (old.pid, new.pid)
    assert record["new"]["inherited"] == [address]
    assert record["new"]["bound"] == []
    assert record["old"]["drain"]["aborted_requests"] == 0
    steps = [(step["by"], step["step"]) for step in record["steps"]]
    assert steps == [
        ("new", "started"),
        ("new", "listeners inherited"),
        ("new", "ready"),
        ("old", "stopped accepting"),
        ("old", "drained"),
    ]
    times = [step["time"] for step in record["steps"]]
    assert times == sorted(times)


def test_the_record_of_a_failure(place: Deploys, address: str) -> None:
    """It says why; the last few records are kept, the older ones go."""
    args = command("uvicorn", address)
    old = up(place, args)
    child = place.start(args, DEMO_FAIL="import")
    assert child.wait() == 3
    (path,) = (place.directory / "meet").glob("handover-*.json")
    record = json.loads(path.read_text())
    assert record["outcome"] == "failed"
    assert "DEMO_FAIL=import" in record["new"]["reason"]
    killed = place.start(args, DEMO_FAIL="hang")
    old.wait_for("Takeover started by pid", count=2)
    killed.signal(signal.SIGKILL)
    old.wait_for(f"pid {killed.pid} exited before it had taken over")
    deadline = time.monotonic() + 30  # the line in the log comes before the record
    while record["outcome"] != "failed" or record["new"]["pid"] != killed.pid:
        assert time.monotonic() < deadline
        record = place.record_of(killed.pid)
    assert re.search("exited before it had taken over", record["old"]["reason"])
