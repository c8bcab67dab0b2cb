"""Every order of events in the lives of three instances: see `tests/support/lifecycle_model.py`."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hotrestart_plugins.lifecycle.table import TABLE, TIMEOUTS, Action, Event, State, Transition
from tests.support.lifecycle_model import Found, Options, explore

CANARY_ROWS = {
    (state, event)
    for state, rows in TABLE.items()
    for event in rows
    if state is State.CANARY or event is Event.CANARY_BEGAN
}
ROLLBACK_EVENTS = {
    Event.ROLLBACK_ORDERED,
    Event.GIVEN_BACK,
    Event.TAKEN_BACK,
    Event.OLD_INSTANCE_ENDED,
}
ROLLBACK_ROWS = {
    (state, event)
    for state, rows in TABLE.items()
    for event in rows
    if (state is not State.CANARY and event in ROLLBACK_EVENTS) or state is State.GIVING_BACK
}
ROWS = {(state, event) for state, rows in TABLE.items() for event in rows}

EXPLORED = {
    "three crashes, and the directory is removed": (
        Options(crashes=3, failures=2, stops=2, removals=1, losses=2),
        ROWS - CANARY_ROWS - ROLLBACK_ROWS,
    ),
    "a canary, an order to give back, and all kinds of faults": (
        Options(crashes=2, removals=1, losses=1, canaries=1, rollbacks=1),
        ROWS,
    ),
}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("name", EXPLORED)
def test_every_order_of_events(name: str) -> None:
    """Somebody accepts, nobody waits without a deadline, the newest serves, two do not."""
    options, rows = EXPLORED[name]
    explored = explore(options)
    assert explored.rows == rows
    print(f"{explored.states} states, {explored.transitions} transitions")


@pytest.mark.long
def test_every_order_of_more_events() -> None:
    """The same holds with more faults, and two orders to give back."""
    options = Options(crashes=3, failures=2, stops=2, removals=1, losses=2, canaries=1, rollbacks=2)
    explored = explore(options)
    assert explored.rows == ROWS
    print(f"{explored.states} states, {explored.transitions} transitions")


REMOVED = Options(crashes=2, stops=0, failures=0, removals=1)
BROKEN = {
    "no newer ticket": (Options(), "1 is replaced by 0, which started before it"),
    "ticket ends when serving": (Options(), "1 is replaced by 0, which started before it"),
    "ticket outlives failure": (Options(), "0 is overtaken by an instance that cannot become"),
    "overtaken alone": (Options(), "0 is ready, and leaves although nobody serves"),
    "tell before claim": (Options(), "nobody accepts: 0 is DRAINING for HOLDING"),
    "unlock before claim": (Options(), "0 serves, and the name leads to"),
    "no stand-by": (Options(), "2 finds nobody, although 0 is ACCEPTING"),
    "no rollback": (Options(), "0 gives up although 1 crashed and nobody serves"),
    "no take back": (Options(), "0 serves, and the name leads to"),
    "roll back when left": (Options(), "[0, 2] accept, and nobody has told them to go"),
    "end before messages": (Options(), "[0, 2] accept, and nobody has told them to go"),
    "no look before claim": (Options(), "[0, 2] accept, and nobody has told them to go"),
    "no lock for claims": (Options(), "[0, 2] accept, and nobody has told them to go"),
    "no look at the lock file": (REMOVED, "1 is replaced by 0, which started before it"),
    "no lock for serving": (REMOVED, "[0, 2] accept, and nobody has told them to go"),
    "take back from anybody": (Options(rollbacks=1), "0 serves, and the name leads to"),
}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("part", BROKEN)
def test_a_protocol_without_this_part_is_found_out(part: str) -> None:
    """Each rule of the protocol is needed: without it the exploration finds a violation."""
    options, why = BROKEN[part]
    with pytest.raises(Found) as found:
        explore(Options(**{**vars(options), "broken": frozenset({part})}))
    assert found.value.why.startswith(why)


_S, _E, _A = State, Event, Action
CHANGED: dict[str, tuple[Options, State, Event, Transition | None, str]] = {
    "the old instance goes on accepting": (
        Options(),
        _S.ACCEPTING,
        _E.REPLACED,
        Transition(_S.TOLD_TO_GO),
        "0 is TOLD_TO_GO and accepts: True",
    ),
    "it accepts before it has taken over": (
        Options(),
        _S.STARTING,
        _E.READY,
        Transition(_S.HOLDING, (_A.ACCEPT, _A.COMMIT)),
        "0 is HOLDING and accepts: True",
    ),
    "it serves again after the window": (
        Options(),
        _S.DRAINING,
        _E.WINDOW_ENDED,
        Transition(_S.STANDING_BY, (_A.STAND_DOWN,)),
        "0 stands by for nobody",
    ),
    "it drains on after a rollback": (
        Options(),
        _S.DRAINING,
        _E.NEW_INSTANCE_CRASHED,
        Transition(_S.SERVING_AGAIN),
        "0 is SERVING_AGAIN and accepts: False",
    ),
    "it gives back before the old instance serves": (
        Options(rollbacks=1),
        _S.ACCEPTING,
        _E.ROLLBACK_ORDERED,
        Transition(_S.STOOD_DOWN, (_A.STOP_ACCEPTING, _A.DRAIN, _A.STAND_DOWN)),
        "0 gives up although 1 crashed and nobody serves",
    ),
    "it cannot be stopped while it waits": (
        Options(),
        _S.WAITING,
        _E.STOP_ORDERED,
        None,
        "WAITING cannot hear STOP_ORDERED",
    ),
    "it fails as if it were stopped": (
        Options(),
        _S.ACCEPTING,
        _E.FAILED,
        Transition(_S.LEAVING, (_A.EXIT,)),
        "0 gives up although 1 crashed and nobody serves",
    ),
}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_table_is_found_out(change: str) -> None:
    """A wrong or a missing row of the table is a violation."""
    options, state, event, row, why = CHANGED[change]
    rows = dict(TABLE[state])
    if row is None:
        del rows[event]
    else:
        rows[event] = row
    table: Mapping[State, Mapping[Event, Transition]] = {**TABLE, state: rows}
    with pytest.raises(Found) as found:
        explore(Options(**{**vars(options), "table": table}))
    assert found.value.why.startswith(why)


def test_a_wait_without_a_deadline_is_found_out() -> None:
    """An instance that waits for its turn for ever is a violation."""
    timeouts = {**TIMEOUTS, State.WAITING: frozenset[Event]()}
    with pytest.raises(Found) as found:
        explore(Options(timeouts=timeouts))
    assert found.value.why == "1 waits without a deadline: WAITING"


def test_a_violation_comes_with_the_shortest_way_to_it() -> None:
    """The steps lead from the first start to what is wrong."""
    with pytest.raises(Found) as found:
        explore(Options(broken=frozenset({"tell before claim"})))
    steps = [(step.instance, step.what) for step in found.value.trace]
    assert steps[0] == (0, "starts")
    assert steps.index((1, "tells the old instance to go")) < steps.index((0, "REPLACED"))
    assert "0: REPLACED" in str(found.value)
