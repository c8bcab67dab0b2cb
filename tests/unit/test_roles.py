"""The roles of an instance: which may follow which."""

from __future__ import annotations

import itertools

import pytest

from hotrestart_plugins.core.roles import TRANSITIONS, InstanceState, Role
from hotrestart_plugins.errors import LifecycleError

LIFE = [Role.NEW, Role.CHILD, Role.INITIAL, Role.PARENT, Role.REPLACED, Role.PARENT, Role.CLOSED]


def state_in(role: Role) -> InstanceState:
    state = InstanceState()
    state.role = role
    return state


def test_every_role_has_its_row() -> None:
    assert set(TRANSITIONS) == set(Role)


def test_a_life_with_a_rollback() -> None:
    state = InstanceState()
    for before, after in itertools.pairwise(LIFE):
        assert state.role is before
        state.become(after)
    assert state.role is Role.CLOSED


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Role, Role)))
def test_a_role_that_cannot_follow(before: Role, after: Role) -> None:
    """It is one error that names both roles, and nothing changes."""
    state = state_in(before)
    if after in TRANSITIONS[before]:
        state.become(after)
        assert state.role is after
        return
    with pytest.raises(LifecycleError) as error:
        state.become(after)
    assert str(error.value) == f"an instance that is {before.value} cannot become {after.value}"
    assert state.role is before


def test_every_open_role_can_be_closed() -> None:
    assert all(Role.CLOSED in TRANSITIONS[role] for role in set(Role) - {Role.CLOSED})
