"""A replaced instance of hotrestart-uvicorn that does not serve again, until it exits."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, Deploys, Instance, command
from tests.support.instances import NO_HANDOVER, ONE_OR_MORE, STOPPED, WINDOW, up
from tests.support.processes import eventually, open_descriptors
from tests.support.raw import Connection, ask

LISTENING = "0A"  # in /proc/net/tcp
HOURS = {"HOTRESTART_DRAIN_TIMEOUT": "3600"}


def holders(instance: Instance, address: str) -> Iterator[int]:
    """The processes of the instance that have a descriptor of the listener on `address`."""
    port = f":{int(address.rpartition(':')[2]):04X}"
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    listeners = {
        f"socket:[{line[9]}]" for line in lines if line[1].endswith(port) and line[3] == LISTENING
    }
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and instance.owns(int(entry.name)):
            try:
                opened = set(open_descriptors(entry.name).values())
            except FileNotFoundError:  # it has ended meanwhile
                continue
            if opened & listeners:
                yield int(entry.name)


def replaced_while_busy(place: Deploys, args: list[str], old: Instance) -> Instance:
    """Have a new instance take over from `old`, which has a request in flight."""
    new = place.start(args, **WINDOW)
    new.wait_for(TOOK_OVER)
    old.wait_for(STOPPED)
    return new


def crash(new: Instance, address: str) -> None:
    """Kill all of its processes, and wait until none of them holds the listener."""
    os.killpg(new.pid, signal.SIGKILL)
    new.wait()
    eventually(lambda: not [*holders(new, address)], "the new instance is gone")


def is_refused(address: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        ask(address)


@ONE_OR_MORE
def test_after_the_window_nobody_waits_for_an_instance_that_does_not_serve_again(
    place: Deploys, address: str, server: str
) -> None:
    """It still drains. When the new instance crashes, clients are refused at once; they do not
    hang in the listener of one that never accepts again. What is in flight is answered."""
    args = command(server, address, NO_HANDOVER)
    old = up(place, args, **HOURS)
    with Connection(address) as busy:
        busy.begin_upload()
        new = replaced_while_busy(place, args, old)
        eventually(lambda: not [*holders(old, address)], "the old instance closes its listeners")
        crash(new, address)
        is_refused(address)
        busy.send(b"hello")
        answer = busy.answer()
        assert (answer.status, old.owns(answer.pid)) == (200, True)
    assert old.wait() == 0
    assert "serves again" not in old.log
    is_refused(address)


@ONE_OR_MORE
def test_a_replaced_instance_that_is_stopped_finishes_its_drain(
    place: Deploys, address: str, server: str
) -> None:
    """It does not serve again from then on, although its window has not ended."""
    args = command(server, address, NO_HANDOVER)
    old = up(place, args, **{**WINDOW, **HOURS})
    with Connection(address) as busy:
        busy.begin_upload()
        new = replaced_while_busy(place, args, old)
        assert [*holders(old, address)]
        old.signal(signal.SIGTERM)
        eventually(lambda: not [*holders(old, address)], "the old instance closes its listeners")
        crash(new, address)
        is_refused(address)
        busy.send(b"hello")
        assert busy.answer().status == 200
    # uvicorn alone ends with the signal that has stopped it, as it does without hot restarts.
    assert old.wait() == (0 if server == "uvicorn4" else -signal.SIGTERM)
    assert place.record_of(new.pid)["steps"][-1]["step"] == "drained"
    assert "serves again" not in old.log
    assert old.log.count("Drained: 1 request answered") == 1


@pytest.mark.once
@ONE_OR_MORE
def test_what_is_open_at_the_drain_timeout_is_closed_then(
    place: Deploys, address: str, server: str
) -> None:
    """Also while the instance stands by; it serves again all the same."""
    args = command(server, address, NO_HANDOVER)
    old = up(place, args, **WINDOW, HOTRESTART_DRAIN_TIMEOUT="0.5")
    with Connection(address) as busy:
        busy.begin_upload()
        new = replaced_while_busy(place, args, old)
        old.wait_for("The drain timeout ended: aborted 1 request")
        assert busy.answer().status == 500  # uvicorn's own way to cut a request off
        assert busy.at_end()
        crash(new, address)
        old.wait_for("Accepting again")
        assert old.owns(ask(address).pid)
