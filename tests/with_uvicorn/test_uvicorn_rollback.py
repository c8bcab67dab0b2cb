"""hotrestart-uvicorn serves again when its successor dies, with what is left of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, Deploys, command
from tests.support.instances import (
    NO_HANDOVER,
    ONE_OR_MORE,
    QUICK,
    WINDOW,
    successor,
    takes_over,
    up,
)
from tests.support.processes import eventually, wait_readable
from tests.support.raw import Connection, ask, request


@ONE_OR_MORE
def test_the_parent_serves_again_if_its_successor_dies_in_the_window(
    place: Deploys, address: str, server: str
) -> None:
    """With the processes that it has; what waited in the queue is served; the next one is fine."""
    args = command(server, address)
    parent = up(place, args, **WINDOW)
    before = ask(address).pid
    child = takes_over(place, parent, args)
    child.signal(signal.SIGKILL)
    parent.wait_for("this instance serves again")
    child.wait()
    answers: set[int] = set()
    while not answers or not all(parent.owns(pid) for pid in answers):
        # The workers of a killed supervisor leave by themselves, one after the other.
        answers = {ask(address).pid for _ in range(8)}
    assert server != "uvicorn" or answers == {before}
    new = place.start(args, **QUICK)
    new.wait_for(TOOK_OVER)
    parent.signal(signal.SIGTERM)
    parent.wait()
    assert new.owns(ask(address).pid)


HELD_UP = """
import os, time
async def app(scope, receive, send):
    assert scope["type"] == "http"
    if scope["path"] == "/hold":
        print("held up", flush=True)
        time.sleep(3600)
    by = (b"x-served-by", str(os.getpid()).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [by]})
    await send({"type": "http.response.body", "body": b""})
"""


def held_up(address: str, tmp_path: Path) -> list[str]:
    """The command of four workers whose app can hold up the loop of one."""
    (tmp_path / "held_up.py").write_text(HELD_UP)
    args = command("uvicorn4", address, "--app-dir", str(tmp_path), "--lifespan", "off")
    args[args.index("app:app")] = "held_up:app"
    return args


@pytest.mark.once
def test_a_rollback_does_not_wait_for_a_worker_that_is_held_up(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """The others accept again at once; what it was told meanwhile, it need not hear."""
    args = held_up(address, tmp_path)
    old = up(place, args, **WINDOW, HOTRESTART_DRAIN_TIMEOUT="3600")
    with Connection(address) as holding:
        holding.send(request("/hold"))
        old.wait_for("held up")
        new = place.start(args, **WINDOW)
        new.wait_for(TOOK_OVER)
        os.killpg(new.pid, signal.SIGKILL)
        old.wait_for("Accepting again")
        assert old.owns(ask(address).pid)


@pytest.mark.once
def test_a_worker_that_is_held_up_ends_at_the_drain_timeout(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """It is killed, and counts as one request cut off; the others have drained."""
    args = held_up(address, tmp_path)
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="0.5")
    with Connection(address) as holding:
        holding.send(request("/hold"))
        old.wait_for("held up")
        successor(place, old, args)
        assert old.log.count("did not drain in time; killing it") == 1
        assert "1 aborted; exiting" in old.log
        with pytest.raises(ConnectionError):
            holding.answer()


BAD_PONG = """
import os, pathlib
from uvicorn.supervisors.multiprocess import Process

def pong(self):
    self.child_conn.recv()
    print("pinged", flush=True)
    pathlib.Path(__file__).with_name("gate").open().close()
    self.child_conn.send_bytes(b"no answer")

async def app(scope, receive, send):
    if scope["path"] == "/bad":
        Process.pong = pong
    by = (b"x-served-by", str(os.getpid()).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [by]})
    await send({"type": "http.response.body", "body": b""})
"""


@pytest.mark.once
def test_no_worker_is_started_once_replaced(place: Deploys, address: str, tmp_path: Path) -> None:
    """Not even where uvicorn was waiting for a worker that does not answer it: its successor would
    run the new code, and accept beside the new instance."""
    (tmp_path / "bad_pong.py").write_text(BAD_PONG)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    more = ["--app-dir", str(tmp_path), "--lifespan", "off", "--timeout-worker-healthcheck", "60"]
    args = command("uvicorn4", address, *more)
    args[args.index("app:app")] = "bad_pong:app"
    old = up(place, args, **WINDOW)
    bad = ask(address, "/bad").pid
    old.wait_for("pinged")
    takes_over(place, old, args)
    gate.open("w").close()
    old.wait_for(f"Child process [{bad}] died")
    old.wait_for("was started after the takeover; killing it")
    old.stop()
    assert old.log.count("Started server process") == 4


def test_after_a_rollback_there_are_as_many_workers_as_are_left(
    place: Deploys, address: str
) -> None:
    """One started in the place of one that has ended would run the code that has just failed."""
    args = command("uvicorn4", address)
    old = up(place, args, **WINDOW)
    ended = ask(address).pid
    new = takes_over(place, old, args)
    end = os.pidfd_open(ended)
    os.kill(ended, signal.SIGKILL)
    wait_readable(end, "the end of the worker")
    os.close(end)
    os.killpg(new.pid, signal.SIGKILL)
    old.wait_for("3 of 4 workers are left")
    old.signal(signal.SIGTTIN)
    old.wait_for("Started server process", count=5)
    assert old.owns(ask(address).pid)
    assert old.log.count("Started server process") == 5


NO_WAY = """
import asyncio, os
from hotrestart_plugins.app import drain
drain.call_when_begun(lambda: 1 / 0)
async def app(scope, receive, send):
    assert scope["type"] == "http"
    if scope["path"] == "/slow":
        while not drain.is_set():
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
    by = (b"x-served-by", str(os.getpid()).encode())
    length = (b"content-length", b"0")
    await send({"type": "http.response.start", "status": 200, "headers": [by, length]})
    await send({"type": "http.response.body", "body": b""})
"""


@pytest.mark.once
@ONE_OR_MORE
def test_an_instance_that_fails_to_make_way_leaves(
    place: Deploys, address: str, tmp_path: Path, server: str
) -> None:
    """It says why, and finishes what it had accepted; it does not serve on beside the new one."""
    (tmp_path / "no_way.py").write_text(NO_WAY)
    args = command(server, address, "--app-dir", str(tmp_path), "--lifespan", "off", NO_HANDOVER)
    args[args.index("app:app")] = "no_way:app"
    old = up(place, args)
    with Connection(address) as busy:
        busy.send(request("/slow"))
        assert ask(address).status == 200
        successor(place, old, args)
        assert busy.answer().status == 200
    assert "ZeroDivisionError" in old.log
    assert "was never retrieved" not in old.log


@ONE_OR_MORE
def test_a_header_of_the_users_own_survives_a_rollback(
    place: Deploys, address: str, server: str
) -> None:
    """Be it the same as that of a drain."""
    args = command(server, address, "--header", "Connection:close", NO_HANDOVER)
    parent = up(place, args, **WINDOW)
    assert ask(address).closes
    child = takes_over(place, parent, args)
    os.killpg(child.pid, signal.SIGKILL)
    parent.wait_for("Accepting again")
    answer = ask(address)
    assert (parent.owns(answer.pid), answer.closes) == (True, True)


@ONE_OR_MORE
def test_a_limit_of_requests_ends_none_that_may_have_to_serve_again(
    place: Deploys, address: str, server: str
) -> None:
    """--limit-max-requests, reached by the last answer of a replaced instance: that serves again,
    and ends by the requests that come then."""
    args = command(server, address, "--limit-max-requests", "1")
    parent = up(place, args, **WINDOW)
    with Connection(address) as busy:
        busy.begin_upload()
        child = takes_over(place, parent, args)
        busy.send(b"hello")
        assert parent.owns(busy.answer().pid)
        eventually(
            lambda: place.record_of(child.pid)["steps"][-1]["step"] == "drained", "it has drained"
        )
        os.killpg(child.pid, signal.SIGKILL)
        parent.wait_for("Accepting again")
        assert f"Started server process [{ask(address).pid}]" in parent.log  # it may have ended
        parent.wait_for("Maximum request limit")
    assert parent.log.index("Accepting again") < parent.log.index("Maximum request limit")


def test_a_successor_that_is_stopped_on_purpose_is_not_rolled_back(
    place: Deploys, address: str
) -> None:
    """Stopping the service within the rollback window stops the service."""
    args = command("uvicorn", address)
    parent = up(place, args, **WINDOW)
    child = takes_over(place, parent, args)
    child.stop()
    assert parent.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        ask(address)
