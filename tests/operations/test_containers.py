"""Instances in pid namespaces of their own, as containers have that share the meeting directory."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys
from tests.support.instances import QUICK, STOPPED, WINDOW, demo, kept_alive, takes_over
from tests.support.processes import eventually
from tests.support.raw import Connection, ask, request

pytestmark = [pytest.mark.root, pytest.mark.once]
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")


def contained(server: str, address: str) -> list[str]:
    """The demo's command line."""
    return [*CONTAINER, *demo(server, address)]


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn4", "gunicorn gthread"])
def test_a_successor_that_is_not_seen(place: Deploys, address: str, server: str) -> None:
    """It has no pid here. That it died is noticed at the parent socket; the next one takes over."""
    args = contained(server, address)
    old = place.start(args, **WINDOW)
    old.wait_for(*UP)
    new = place.start(args)
    new.wait_for(*UP)
    old.wait_for(STOPPED)
    assert "another pid namespace" in old.log
    (record,) = (place.directory / "meet").glob("handover-*.json")  # of both
    eventually(lambda: "stopped accepting" in record.read_text(), "the old one's part of it")
    steps = json.loads(record.read_text())["steps"]
    assert {"started", "ready", "stopped accepting"} <= {one["step"] for one in steps}
    os.killpg(new.pid, signal.SIGSTOP)
    with Connection(address) as waits:  # in the queue of a listener that nobody accepts from
        waits.send(request())
        os.killpg(new.pid, signal.SIGKILL)
        assert waits.answer().status == 200
    old.wait_for("Accepting again")
    last = place.start(args, **QUICK)
    last.wait_for(TOOK_OVER)
    assert ask(address).status == 200
    assert old.running


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn gthread"])
def test_of_two_that_stand_by_the_later_one_serves(
    place: Deploys, address: str, server: str
) -> None:
    """Each has the pid 1, and sees the other's lock alone."""
    args = contained(server, address)
    first = place.start(args, DEMO_VERSION="1", **WINDOW)
    first.wait_for(*UP)
    second = place.start(args, DEMO_VERSION="2", **WINDOW)
    second.wait_for(TOOK_OVER)
    third = takes_over(place, second, args, DEMO_VERSION="3")
    os.killpg(third.pid, signal.SIGKILL)
    second.wait_for("Accepting again")
    assert {json.loads(ask(address).body)["version"] for _ in range(8)} == {"2"}
    last = place.start(args, **QUICK)
    last.wait_for(TOOK_OVER)
    assert "Accepting again" not in first.log


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn4", "gunicorn gthread", "gunicorn asgi"])
def test_connections_move(place: Deploys, address: str, server: str) -> None:
    """From pid 1 to pid 1: a child is not known by its pid."""
    args = [*contained(server, address), *kept_alive(server)]
    current = place.start(args, DEMO_VERSION="0", **QUICK)
    current.wait_for(*UP)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Connection(address)) for _ in range(8)]
        for version in ("1", "2"):
            for client in clients[::2]:
                assert not client.get().closes
            old, current = current, place.start(args, DEMO_VERSION=version, **QUICK)
            current.wait_for(TOOK_OVER)
            assert old.wait() == 0, old.log
            for client in clients:
                answer = client.get()
                assert (json.loads(answer.body)["version"], answer.closes) == (version, False)
