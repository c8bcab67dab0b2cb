"""Instances that are overtaken by a newer one, with each of the servers: promise 15."""

from __future__ import annotations

import contextlib

import pytest

from demo_app.deploys import TOOK_OVER, Deploys, Instance
from demo_app.load import LoadProcess, Mix
from tests.support.gate import Gate
from tests.support.instances import QUICK, demo, kept_alive, up
from tests.support.raw import ask

CLIENTS = Mix(one_shot=4, keep_alive=4)
PROCESSES = {"uvicorn": 1, "uvicorn4": 4, "gunicorn gthread": 2, "gunicorn asgi": 2}
"""That import the app, in one instance of each server."""
WAITING = "to finish its takeover"


def is_overtaken(instance: Instance, newer: Instance) -> None:
    """It ends with 0, and its last line says by whom."""
    assert instance.wait() == 0, instance.log
    last = instance.log.strip().splitlines()[-1]
    assert last.endswith(f"Overtaken by pid {newer.pid}"), instance.log
    assert "failed" not in instance.log


@pytest.mark.parametrize("server", PROCESSES)
def test_the_newest_serves(place: Deploys, address: str, server: str) -> None:
    """One that waits for its turn, and one that boots, make way for it; no request fails."""
    args = demo(server, address, *kept_alive(server))
    with contextlib.closing(Gate(place.directory, args)) as gate:
        old = up(place, gate.args, **gate.open)
        with LoadProcess(address, CLIENTS) as load:
            booting = place.start(gate.args, **QUICK, **gate.closed)
            for _ in range(PROCESSES[server]):
                gate.wait()
            waiting = place.start(gate.args, **QUICK, **gate.open)
            waiting.wait_for(WAITING)
            newest = place.start(gate.args, **QUICK, **gate.open)
            is_overtaken(waiting, newest)
            newest.wait_for(WAITING)
            load.wait(answers=50)
            for _ in range(PROCESSES[server]):
                gate.let_one_through()
            is_overtaken(booting, newest)
            newest.wait_for(TOOK_OVER)
            load.wait(answers=50)
            report = load.stop()
    assert old.wait() == 0
    assert not report.failures, report
    assert newest.owns(ask(address).pid)
    assert place.record_of(booting.pid)["outcome"] == "overtaken"
    assert place.record_of(newest.pid)["outcome"] == "taken over"
