"""The table of an instance's life, looked at by itself; test_lifecycle_model.py explores it."""

from __future__ import annotations

import pytest

from hotrestart_plugins.errors import LifecycleError
from hotrestart_plugins.lifecycle.table import (
    CAN_SERVE_AGAIN,
    LATE,
    MAY_ACCEPT,
    REPLACED,
    SERVES,
    TABLE,
    TIMEOUTS,
    Action,
    Event,
    Lifecycle,
    State,
)

ROWS = [(state, event, transition) for state in State for event, transition in TABLE[state].items()]
START = {State.WAITING}


def test_each_state_has_its_rows_and_its_timeouts() -> None:
    """No state is forgotten, and only the end has no way on."""
    assert set(TABLE) == set(TIMEOUTS) == set(State)
    assert {state for state in State if not TABLE[state]} == {State.GONE}


def test_each_state_event_and_action_is_used() -> None:
    """Each state can be entered, each event changes something, each action is asked for."""
    assert {row.state for _, _, row in ROWS} | START == set(State)
    assert {event for _, event, _ in ROWS} == set(Event)
    assert {action for _, _, row in ROWS for action in row.actions} == set(Action)


@pytest.mark.parametrize("state", State)
def test_each_wait_has_a_deadline(state: State) -> None:
    """A state that does not serve ends by itself, at a deadline that leads to another state."""
    waits = state not in {State.ACCEPTING, State.SERVING_AGAIN, State.GONE}
    assert bool(TIMEOUTS[state]) == waits
    for timeout in TIMEOUTS[state]:
        assert TABLE[state][timeout].state is not state


def test_deadlines_alone_end_each_state() -> None:
    """With nothing but deadlines, every instance comes to serve or to be gone."""
    for begin in State:
        for choice in range(2):
            state, steps = begin, 0
            while TIMEOUTS[state] and steps < len(State):
                timeouts = sorted(TIMEOUTS[state], key=lambda event: event.name)
                state = TABLE[state][timeouts[choice % len(timeouts)]].state
                steps += 1
            assert state in {State.ACCEPTING, State.SERVING_AGAIN, State.GONE}


@pytest.mark.parametrize(("state", "event", "row"), ROWS)
def test_a_deadline_that_passes_too_late_changes_nothing(
    state: State, event: Event, row: tuple[State, object]
) -> None:
    """What a state waited for may happen just as its deadline passes."""
    after = row[0]
    for timeout in TIMEOUTS[state] - TIMEOUTS[after] - {event}:
        assert timeout in LATE[after]


def test_late_events_have_no_row() -> None:
    """An event either changes something in a state or is late there, not both."""
    for state, events in LATE.items():
        assert not events & TABLE[state].keys()


def test_the_end_is_the_end() -> None:
    """A process that has ended hears whatever may come."""
    assert LATE[State.GONE] == set(Event)


def test_to_stop_is_always_possible() -> None:
    """Whatever an instance does, it can be told to stop, and then it never serves again."""
    for state in State:
        if state in LATE and Event.STOP_ORDERED in LATE[state]:
            continue
        after = TABLE[state][Event.STOP_ORDERED].state
        assert after in {State.STOOD_DOWN, State.LEAVING}
    for state in (State.STOOD_DOWN, State.LEAVING, State.OVERTAKEN):
        assert reachable(state) <= {State.STOOD_DOWN, State.LEAVING, State.OVERTAKEN, State.GONE}


def reachable(state: State) -> set[State]:
    """Every state that can come after this one."""
    found, rest = {state}, [state]
    while rest:
        for row in TABLE[rest.pop()].values():
            if row.state not in found:
                found.add(row.state)
                rest.append(row.state)
    return found


def test_what_accepts() -> None:
    """An instance accepts where its actions say so, and in no other state."""
    begin = {Action.ACCEPT, Action.ACCEPT_AGAIN, Action.BEGIN_CANARY}
    for state, _, row in ROWS:
        if begin & set(row.actions):
            assert row.state in SERVES
        elif row.state in SERVES:
            assert state in SERVES
        if state in SERVES and row.state not in MAY_ACCEPT:
            assert {Action.STOP_ACCEPTING, Action.EXIT, Action.EXIT_FAILED} & set(row.actions)
    assert SERVES < MAY_ACCEPT
    assert CAN_SERVE_AGAIN < REPLACED
    assert not SERVES & REPLACED


def test_a_takeover_and_a_rollback() -> None:
    """The actions of an instance that takes over, is replaced, and comes back."""
    life = Lifecycle()
    steps = [
        (Event.TURN_CAME, State.STARTING, (Action.BOOT,)),
        (Event.READY, State.HOLDING, (Action.COMMIT,)),
        (Event.COMMITTED, State.ACCEPTING, (Action.ACCEPT,)),
        (Event.REPLACED, State.TOLD_TO_GO, (Action.STOP_ACCEPTING, Action.DRAIN)),
        (Event.STOPPED_ACCEPTING, State.DRAINING, ()),
        (Event.NEW_INSTANCE_CRASHED, State.SERVING_AGAIN, (Action.ACCEPT_AGAIN,)),
        (Event.DRAINED, State.SERVING_AGAIN, ()),
    ]
    for event, state, actions in steps:
        assert life.handle(event) == actions
        assert life.state is state
        assert (life.serves, life.replaced, life.can_serve_again) == (
            state in SERVES,
            state in REPLACED,
            state in CAN_SERVE_AGAIN,
        )


def test_no_rollback_after_the_window() -> None:
    """An instance that has stood down does not come back."""
    life = Lifecycle(State.DRAINING)
    assert life.handle(Event.WINDOW_ENDED) == (Action.STAND_DOWN, Action.FINISH_DRAINING)
    assert life.handle(Event.NEW_INSTANCE_CRASHED) == ()
    assert life.handle(Event.DRAINED) == (Action.EXIT,)
    assert not life.can_serve_again


def test_an_event_that_cannot_come() -> None:
    """It is refused in words, and the state stays."""
    life = Lifecycle()
    with pytest.raises(LifecycleError, match=r"waiting for its turn got .*: the canary failed"):
        life.handle(Event.CANARY_FAILED)
    assert life.state is State.WAITING
    assert LifecycleError.status == 70
