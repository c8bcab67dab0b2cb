"""A look at the parent socket's name and what is done about it: nobody comes in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotrestart_plugins.lifecycle.table import Event
from tests.support.processes import (
    Instance,
    Processes,
    eventually,
    free_address,
    stopped,
    who_answers,
)

pytestmark = pytest.mark.usefixtures("no_leak")

GIVES_NO_WORD = 50
"""So many times an instance has slept between two looks if it waits for another one's claim."""


@pytest.fixture
def address() -> str:
    return free_address()


def through_gates(instance: Instance, *gates: str) -> None:
    """It goes on from one gate to the next."""
    for gate in gates:
        assert instance.call("go") == gate


def up_to_ready(processes: Processes, meet: Path, address: str, old: Instance | None) -> Instance:
    """An instance that is ready, and looks next whether the old one still serves."""
    instance = processes.instance(module="tests.support.lifecycle_puppet")
    assert instance.call("start", str(meet), address) == "turn"
    if old is None:
        through_gates(instance, "connect", "bind", "booted")
    else:
        through_gates(instance, "connect", "ask", "asked")
        assert old.call("handle") == "handled"
        assert instance.end() == "booted"
    assert instance.call("event", Event.READY.name) == "look"
    return instance


def takes_over(instance: Instance, old: Instance | None) -> None:
    """It goes on from its look at the name until it serves."""
    through_gates(instance, *(("claim", "done") if old is None else ("check", "claim", "tell")))
    if old is not None:
        through_gates(instance, "done")
        old.call("handle")
    instance.call("event", Event.COMMITTED.name)


@pytest.fixture
def standing_by(processes: Processes, meet: Path, address: str) -> tuple[Instance, Instance]:
    """An instance that stands by, and the one that serves."""
    old = up_to_ready(processes, meet, address, None)
    takes_over(old, None)
    new = up_to_ready(processes, meet, address, old)
    takes_over(new, old)
    return old, new


def sleeps(instance: Instance) -> int:
    """How many times it has waited for something."""
    status = Path(f"/proc/{instance.pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def test_one_that_stands_by_waits_for_a_claim(
    processes: Processes, meet: Path, address: str, standing_by: tuple[Instance, Instance]
) -> None:
    """The new instance has looked, and claims next: the name is not taken back in between."""
    old, new = standing_by
    third = up_to_ready(processes, meet, address, new)
    through_gates(third, "check", "claim")
    new.kill()
    before = sleeps(old)
    old.begin("new_instance_ended")
    eventually(lambda: sleeps(old) > before + GIVES_NO_WORD, "the old instance waits")
    through_gates(third, "tell", "done")
    third.call("event", Event.COMMITTED.name)
    assert old.end() == "done"
    assert (old.call("status")["state"], old.call("status")["accepts"]) == ("STOOD_DOWN", False)
    assert third.call("status")["has name"]
    assert who_answers(address) == third.pid


def test_a_claim_that_takes_too_long(
    processes: Processes, meet: Path, address: str, standing_by: tuple[Instance, Instance]
) -> None:
    """The one that stands by serves again; who was too slow looks again, and takes over from it."""
    old, new = standing_by
    third = up_to_ready(processes, meet, address, new)
    for instance in (old, third):
        instance.call("claim_within", 0.1)
    through_gates(third, "check", "claim")
    new.kill()
    with stopped(third):
        assert old.call("new_instance_ended") == "claim"
        through_gates(old, "done")
        assert old.call("status")["has name"]
        assert who_answers(address) == old.pid
    assert f"pid {third.pid} is about to claim a name" in old.log
    for instance in (old, third):
        instance.call("claim_within", 30.0)
    through_gates(third, "connect", "ask", "asked")
    assert old.call("handle") == "handled"
    assert third.end() == "look"
    through_gates(third, "check", "claim", "tell", "done")
    old.call("handle")
    third.call("event", Event.COMMITTED.name)
    assert old.call("status")["state"] == "TOLD_TO_GO"
    assert not old.call("status")["accepts"]
    assert who_answers(address) == third.pid
