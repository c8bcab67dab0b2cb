"""What the lifecycle model says is what real processes do: 200 of its traces, replayed."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from hotrestart_plugins.lifecycle.table import TABLE, Event, State
from tests.support.lifecycle_replay import TODAY, Move, Replay, random_trace, shortest_traces
from tests.support.processes import Processes, free_address

pytestmark = pytest.mark.usefixtures("no_leak")

NOT_IN_THE_PRODUCT = {
    Event.CANARY_BEGAN,
    Event.ROLLBACK_ORDERED,
    Event.GIVEN_BACK,
    Event.TAKEN_BACK,
    Event.OLD_INSTANCE_ENDED,
}
ROWS = sorted(
    (
        (state, event)
        for state, rows in TABLE.items()
        for event in rows
        if event not in NOT_IN_THE_PRODUCT and state not in {State.CANARY, State.GIVING_BACK}
    ),
    key=lambda row: (row[0].name, row[1].name),
)
RANDOM = 200 - len(ROWS)


@functools.cache
def traces() -> dict[tuple[State, Event], list[Move]]:
    return shortest_traces(TODAY)


def replay(moves: list[Move], processes: Processes, directory: Path) -> None:
    played = Replay(processes, directory, free_address())
    for number, move in enumerate(moves):
        try:
            played.play(move)
            played.compare(move.after)
            if number == len(moves) - 1:
                played.compare_service(move.after)
        except AssertionError as error:
            steps = [f"{done.step.instance}: {done.step.what}" for done in moves[: number + 1]]
            raise AssertionError("\n".join(["after these steps:", *steps, str(error)])) from error


@pytest.mark.parametrize(
    ("state", "event"), ROWS, ids=[f"{state.name}-{event.name}" for state, event in ROWS]
)
def test_a_row_of_the_table(state: State, event: Event, processes: Processes, meet: Path) -> None:
    """The shortest way to each row that the product has today ends as in the model."""
    replay(traces()[state, event], processes, meet / "d")


@pytest.mark.parametrize("seed", range(RANDOM))
def test_a_random_trace(seed: int, processes: Processes, meet: Path) -> None:
    """Some way through the model ends as in the model."""
    replay(random_trace(TODAY, seed), processes, meet / "d")
