"""How a draining uvicorn ends HTTP/2: GOAWAY, and no stream is lost."""

from __future__ import annotations

import contextlib
import re
import ssl
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command
from tests.support import certificates
from tests.support.http2 import NO_MORE, Http2
from tests.support.instances import ONE_OR_MORE, QUICK, STOPPED, drained
from tests.support.raw import ask


def start(place: Deploys, args: list[str], *texts: str, **env: str) -> Instance:
    instance = place.start(args, **{**QUICK, **env})
    instance.wait_for(*texts)
    return instance


def http2(server: str, address: str, *, keep_alive: int) -> list[str]:
    more = ("--http", "zttp", "--http2", "--timeout-keep-alive", str(keep_alive))
    return command(server, address, *more)


@pytest.fixture(params=["plaintext", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], ssl.SSLContext | None]:
    """The server's options, and what the client needs."""
    if request.param == "plaintext":
        return [], None
    key, chain, ca = certificates.issue(tmp_path)
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    return ["--ssl-keyfile", str(key), "--ssl-certfile", str(chain)], context


@ONE_OR_MORE
def test_a_drain_says_goaway_and_loses_no_stream(
    place: Deploys, address: str, server: str, tls: tuple[list[str], ssl.SSLContext | None]
) -> None:
    """What is under way and what was sent before the client has seen the GOAWAY is answered; a
    connection that has said nothing yet hears the same with its first answer."""
    options, context = tls
    args = [*http2(server, address, keep_alive=60), *options]
    old = start(place, args, *UP)
    with contextlib.ExitStack() as stack:
        busy, idle, unread = (stack.enter_context(Http2(address, context)) for _ in range(3))
        under_way = busy.begin("/upload", body=b"half")
        for client in (busy, idle):
            assert old.owns(client.get().pid)
        new = start(place, args, TOOK_OVER)
        old.wait_for(STOPPED)
        late = busy.begin()
        first = unread.begin("/upload", body=b"half")
        for client in (busy, idle, unread):
            assert client.goodbye() == NO_MORE
        assert old.owns(busy.answer(late).pid)
        for client, number in ((busy, under_way), (unread, first)):
            client.send(number, b"full")
            answer = client.answer(number)
            assert (answer.status, old.owns(answer.pid)) == (200, True)
            assert b'"bytes":8' in answer.body
    assert old.wait() == 0
    assert not re.search("WebSocket|event stream|aborted", drained(old.log))
    with Http2(address, context) as client:
        assert new.owns(client.get().pid)


def test_the_keep_alive_timeout_ends_the_connection(place: Deploys, address: str) -> None:
    """As ever, when the last stream has been answered: not before."""
    args = http2("uvicorn", address, keep_alive=1)
    old = start(place, args, *UP)
    with Http2(address) as client:
        under_way = client.begin("/upload", body=b"half")
        start(place, args, TOOK_OVER)
        assert client.goodbye() == NO_MORE
        client.send(under_way, b"full")
        assert client.answer(under_way).status == 200
        assert client.at_end()
    assert old.wait() == 0
    assert "1 connection closed after an answer; exiting" in drained(old.log)


def test_a_rollback_keeps_new_connections(place: Deploys, address: str) -> None:
    """Who was told to leave may leave; who comes to the instance that serves again stays."""
    args = http2("uvicorn", address, keep_alive=60)
    old = start(place, args, *UP, HOTRESTART_ROLLBACK_WINDOW="60")
    with Http2(address) as before:
        assert before.get().pid == old.pid
        new = start(place, args, TOOK_OVER)
        assert before.goodbye() == NO_MORE
        new.close()
        old.wait_for("Accepting again")
        with Http2(address) as after:
            assert [after.get().pid for _ in range(3)] == [old.pid] * 3
            assert not after.farewells
        assert before.get().pid == old.pid


def test_event_streams_are_ended_at_the_deadline(place: Deploys, address: str) -> None:
    """Each with its end, and not with the connection's, beside others on the same one."""
    args = http2("uvicorn", address, keep_alive=60)
    old = start(place, args, *UP, HOTRESTART_DRAIN_TIMEOUT="3")
    with Http2(address) as client:
        streams = [client.begin("/events?count=100000", sse=True) for _ in range(2)]
        other = client.begin("/slow?seconds=1")
        client.answer(other)
        start(place, args, TOOK_OVER)
        for number in streams:
            assert client.answer(number).body.endswith(b"\n\n")
    assert old.wait() == 0
    assert "2 event streams ended; exiting" in drained(old.log)
    assert "WebSocket" not in drained(old.log)
    assert "Traceback" not in old.log
    assert ask(address).status == 200
