"""The new instance is killed, at moments from its start to the end of the rollback window."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance
from demo_app.load import LoadProcess, Mix
from tests.support.instances import demo
from tests.support.processes import eventually, open_descriptors
from tests.support.raw import ask

pytestmark = pytest.mark.faults

WINDOW = 20.0
ENV = {"HOTRESTART_ROLLBACK_WINDOW": str(WINDOW), "HOTRESTART_DRAIN_TIMEOUT": "30"}
IN_THE_START = [(number + 0.5) / 10 for number in range(10)]  # of what a start took
# Most happens right after the takeover. The last one leaves seconds to this test, however busy the
# machine: the old instance's window ends when it ends.
IN_THE_WINDOW = [0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.7]
CLIENTS = Mix(one_shot=4, keep_alive=8)
ESTABLISHED = "01"  # in /proc/net/tcp; and others that have a descriptor on this side
CLOSE_WAIT = "08"


def connections_of(instance: Instance, address: str) -> int:
    """How many connections of clients the processes of a stopped instance hold."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    held = {
        f"socket:[{line[9]}]"
        for line in lines
        if line[1].endswith(port) and line[3] in (ESTABLISHED, CLOSE_WAIT)
    }
    opened: set[str] = set()
    for pid in processes_of(instance):
        opened |= set(open_descriptors(pid).values())
    return len(held & opened)


def processes_of(instance: Instance) -> list[int]:
    """Those of its session."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if instance.owns(pid)]


def stopped(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return any(f"State:\t{state}" in status for state in "TZ")


def kill(child: Instance, address: str) -> int:
    """SIGKILL to all of it at once; how many connections it held."""
    os.killpg(child.pid, signal.SIGSTOP)  # so that there are no more when they are counted
    eventually(lambda: all(stopped(pid) for pid in processes_of(child)), "its processes stop")
    held = connections_of(child, address)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return held


def pass_time(seconds: float) -> None:
    """Let the moment come: time is what this test is about, and waits for nothing."""
    select.select([], [], [], max(0.0, seconds))


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn gthread"])
def test_the_child_is_killed_at_twenty_moments(place: Deploys, address: str, server: str) -> None:
    """Only what it held is lost, at most one request for each connection; nobody is refused and
    nobody waits in vain. Then one instance serves, the old one, and the next child takes over."""
    args = demo(server, address)
    first = place.start(args, **ENV)
    first.wait_for(*UP)
    with LoadProcess(address, CLIENTS, pause=0.002) as load:
        load.wait(answers=100)
        parent = place.start(args, **ENV)
        boot = parent.wait_for(TOOK_OVER) - parent.started
        first.stop()
        held: list[int] = []
        for start, window in zip(IN_THE_START, IN_THE_WINDOW, strict=True):
            child = place.start(args, **ENV)
            pass_time(child.started + start * boot - time.monotonic())
            held.append(kill(child, address))
            old_one_serves(parent, child, address)
            child = place.start(args, **ENV)
            pass_time(child.wait_for(TOOK_OVER) + window * WINDOW - time.monotonic())
            held.append(kill(child, address))
            old_one_serves(parent, child, address)
            report = load.wait(answers=100)
            assert report.failures <= sum(held), (held, report)
            assert set(report.failed) <= {"reset", "eof", "cut_short"}, report
        assert 0 in held
        assert any(held)
        last = place.start(args, **ENV)
        last.wait_for(TOOK_OVER)
        eventually(lambda: serves(last, address), "it alone serves")
        parent.stop()
        load.wait(answers=100)
        after = load.stop()
    assert after.failed == report.failed, after


def serves(instance: Instance, address: str) -> bool:
    """Whether it answers, and nobody else."""
    return all(instance.owns(ask(address).pid) for _ in range(8))


def old_one_serves(parent: Instance, child: Instance, address: str) -> None:
    """It accepts again, if it had stopped, and nobody else does; none of the child is left."""
    assert serves(parent, address)
    assert not [pid for pid in processes_of(child) if not stopped(pid)]
