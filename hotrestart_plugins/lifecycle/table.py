"""The life of one instance: its states, what can happen in each, and what it does then.

Everything that decides what an instance does next is in this file, and nothing else is: no clock,
no socket, no process. A driver tells a `Lifecycle` what has happened and performs the actions that
come back, in their order. uvicorn and gunicorn have a driver each; both use this one table::

    WAITING ──> STARTING ──> HOLDING ──> ACCEPTING ──> TOLD_TO_GO ──> DRAINING ──> STANDING_BY
       │           │           │ ^         ^  │             │             │             │
       v           │           │ │         │  v             └──────┬──────┼─────────────┤
    OVERTAKEN <────┼───────────┘ │    GIVING_BACK                  │      v             │
                   v             │         │      SERVING_AGAIN <──┘  STOOD_DOWN <──────┘
                 CANARY ─────────┘         v                              │
                   └──────────────────> STOOD_DOWN ──────> LEAVING <──────┘ ──> GONE

Left out of the picture: every state can be stopped, and every wait can time out. SERVING_AGAIN
continues as ACCEPTING does.

A driver starts the timers of the state that it enters, keeps those that run already, and stops the
others: see `TIMEOUTS`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from hotrestart_plugins.errors import LifecycleError


class State(enum.Enum):
    """Where in its life an instance is."""

    WAITING = "waiting for its turn"
    """Another instance is taking over."""
    OVERTAKEN = "overtaken"
    """A newer instance was started: this one exits without having taken over."""
    STARTING = "starting"
    """It has its turn: it inherits or binds its listeners and boots the app."""
    HOLDING = "ready"
    """Every worker is ready; the old instance, if there is one, has not been told to go yet."""
    CANARY = "canary"
    """It serves a share of the traffic beside the old instance, which compares the answers."""
    ACCEPTING = "accepting"
    """It serves, and answers any instance that wants to take over from it."""
    GIVING_BACK = "giving back"
    """It asked the old instance to serve again, and accepts until the old instance does."""
    TOLD_TO_GO = "told to go"
    """A new instance has taken over; some worker may still accept."""
    DRAINING = "draining"
    """No worker accepts; requests are in flight. It serves again if the new instance crashes."""
    STANDING_BY = "standing by"
    """Drained. It serves again if the new instance crashes within the rollback window."""
    STOOD_DOWN = "stood down"
    """Requests are in flight; it does not serve again, whatever happens to the other instance."""
    SERVING_AGAIN = "serving again"
    """Rolled back: it accepts with the processes that it had."""
    LEAVING = "leaving"
    """It shuts the app down and exits."""
    GONE = "gone"
    """Its process has ended."""


class Event(enum.Enum):
    """What can happen to an instance."""

    TURN_CAME = "its turn has come"
    NEWER_STARTED = "a newer instance was started"
    READY = "every worker is ready"
    FAILED = "its app or its workers failed"
    CANARY_BEGAN = "every worker is ready, and the canary began"
    CANARY_PASSED = "the canary passed"
    CANARY_FAILED = "the canary failed"
    COMMITTED = "it has taken over, or nobody else serves"
    REPLACED = "a new instance told it to go"
    STOPPED_ACCEPTING = "no worker accepts any more"
    DRAINED = "nothing is in flight"
    NEW_INSTANCE_CRASHED = "the new instance crashed"
    NEW_INSTANCE_LEFT = "the new instance was stopped, or was replaced itself"
    OLD_INSTANCE_ENDED = "the old instance ended"
    ROLLBACK_ORDERED = "it was told to give back"
    GIVEN_BACK = "the new instance asked it to serve again"
    TAKEN_BACK = "the old instance serves again"
    STOP_ORDERED = "it was told to stop"
    TURN_TIMED_OUT = "its turn did not come in time"
    READY_TIMED_OUT = "it was not ready in time"
    TAKEOVER_TIMED_OUT = "the old instance did not answer in time"
    CANARY_TIMED_OUT = "the canary was not decided in time"
    GIVE_BACK_TIMED_OUT = "the old instance did not serve again in time"
    DRAIN_TIMED_OUT = "the drain timeout ended"
    WINDOW_ENDED = "the rollback window ended"
    DEADLINE_PASSED = "the deadline of an instance on its way out passed"
    EXITED = "its process has ended"


class Action(enum.Enum):
    """What a driver does about it."""

    BOOT = "inherit or bind the listeners, and boot the app"
    COMMIT = "claim the parent socket's name, and tell the old instance to go"
    BEGIN_CANARY = "accept a share beside the old instance"
    ACCEPT = "accept"
    STOP_ACCEPTING = "stop accepting; connections may go to the instance that serves"
    DRAIN = "finish what is in flight, until the drain timeout"
    ACCEPT_AGAIN = "end the drain, and accept with the processes that there are"
    STAND_DOWN = "do not serve again: give up the place in the line, and the listeners"
    FINISH_DRAINING = "finish what is in flight; nothing needs to be kept for a rollback"
    ABORT = "close what is still open"
    ASK_BACK = "stand by for the name, and ask the old instance to serve again"
    KEEP_NAME = "claim the parent socket's name again if nobody answers there"
    EXIT = "shut the app down, and exit"
    EXIT_FAILED = "as EXIT, but leave the dead parent socket: the old instance serves again"
    EXIT_NOW = "log what is still running, and end the process at once"


class Transition(NamedTuple):
    """Where an event leads, and what is done on the way, in this order."""

    state: State
    actions: tuple[Action, ...] = ()


def _to(state: State, *actions: Action) -> Transition:
    return Transition(state, actions)


_S, _E, _A = State, Event, Action
_EXIT = _to(_S.LEAVING, _A.EXIT)
_END = {_E.EXITED: _to(_S.GONE), _E.DEADLINE_PASSED: _to(_S.GONE, _A.EXIT_NOW)}
_GIVE_UP = _to(_S.LEAVING, _A.STAND_DOWN, _A.EXIT)
_FINISH = _to(_S.STOOD_DOWN, _A.STAND_DOWN, _A.FINISH_DRAINING)
_SERVE_AGAIN = _to(_S.SERVING_AGAIN, _A.ACCEPT_AGAIN)
_BOW_OUT = _to(_S.STOOD_DOWN, _A.STOP_ACCEPTING, _A.DRAIN, _A.STAND_DOWN)
_MAKE_WAY = _to(_S.TOLD_TO_GO, _A.STOP_ACCEPTING, _A.DRAIN)
_FAIL = _to(_S.LEAVING, _A.EXIT_FAILED)

_SERVING: Mapping[Event, Transition] = {
    _E.REPLACED: _MAKE_WAY,
    _E.STOP_ORDERED: _EXIT,
    _E.FAILED: _FAIL,
    _E.ROLLBACK_ORDERED: _to(_S.GIVING_BACK, _A.ASK_BACK),
    # The answer to an order whose deadline has passed.
    _E.TAKEN_BACK: _BOW_OUT,
}

TABLE: Mapping[State, Mapping[Event, Transition]] = {
    _S.WAITING: {
        _E.TURN_CAME: _to(_S.STARTING, _A.BOOT),
        _E.NEWER_STARTED: _to(_S.OVERTAKEN, _A.EXIT),
        _E.TURN_TIMED_OUT: _EXIT,
        _E.FAILED: _EXIT,
        _E.STOP_ORDERED: _EXIT,
    },
    _S.OVERTAKEN: _END,
    _S.STARTING: {
        _E.READY: _to(_S.HOLDING, _A.COMMIT),
        _E.CANARY_BEGAN: _to(_S.CANARY, _A.BEGIN_CANARY),
        _E.NEWER_STARTED: _to(_S.OVERTAKEN, _A.EXIT),
        _E.READY_TIMED_OUT: _EXIT,
        _E.FAILED: _EXIT,
        _E.STOP_ORDERED: _EXIT,
    },
    _S.HOLDING: {
        _E.COMMITTED: _to(_S.ACCEPTING, _A.ACCEPT),
        _E.NEWER_STARTED: _to(_S.OVERTAKEN, _A.EXIT),
        _E.TAKEOVER_TIMED_OUT: _EXIT,
        _E.FAILED: _EXIT,
        _E.STOP_ORDERED: _EXIT,
    },
    # The old instance has not stopped accepting, so nothing needs to be asked of it.
    _S.CANARY: {
        _E.CANARY_PASSED: _to(_S.HOLDING, _A.COMMIT),
        _E.OLD_INSTANCE_ENDED: _to(_S.HOLDING, _A.COMMIT),
        _E.CANARY_FAILED: _BOW_OUT,
        _E.CANARY_TIMED_OUT: _BOW_OUT,
        _E.ROLLBACK_ORDERED: _BOW_OUT,
        _E.STOP_ORDERED: _BOW_OUT,
        _E.FAILED: _BOW_OUT,
        _E.NEWER_STARTED: _BOW_OUT,
    },
    # An old instance that was asked to serve again may have claimed the name before it ended.
    _S.ACCEPTING: {**_SERVING, _E.OLD_INSTANCE_ENDED: _to(_S.ACCEPTING, _A.KEEP_NAME)},
    _S.SERVING_AGAIN: {**_SERVING, _E.OLD_INSTANCE_ENDED: _to(_S.SERVING_AGAIN, _A.KEEP_NAME)},
    _S.GIVING_BACK: {
        _E.TAKEN_BACK: _BOW_OUT,
        _E.OLD_INSTANCE_ENDED: _to(_S.ACCEPTING, _A.KEEP_NAME),
        _E.GIVE_BACK_TIMED_OUT: _to(_S.ACCEPTING),
        _E.REPLACED: _MAKE_WAY,
        _E.STOP_ORDERED: _EXIT,
        _E.FAILED: _FAIL,
    },
    _S.TOLD_TO_GO: {
        _E.STOPPED_ACCEPTING: _to(_S.DRAINING),
        _E.NEW_INSTANCE_CRASHED: _SERVE_AGAIN,
        _E.GIVEN_BACK: _SERVE_AGAIN,
        _E.NEW_INSTANCE_LEFT: _FINISH,
        _E.WINDOW_ENDED: _FINISH,
        _E.STOP_ORDERED: _FINISH,
        _E.DRAIN_TIMED_OUT: _to(_S.STANDING_BY, _A.ABORT),
    },
    _S.DRAINING: {
        _E.DRAINED: _to(_S.STANDING_BY),
        _E.DRAIN_TIMED_OUT: _to(_S.STANDING_BY, _A.ABORT),
        _E.NEW_INSTANCE_CRASHED: _SERVE_AGAIN,
        _E.GIVEN_BACK: _SERVE_AGAIN,
        _E.NEW_INSTANCE_LEFT: _FINISH,
        _E.WINDOW_ENDED: _FINISH,
        _E.STOP_ORDERED: _FINISH,
    },
    _S.STANDING_BY: {
        _E.NEW_INSTANCE_CRASHED: _SERVE_AGAIN,
        _E.GIVEN_BACK: _SERVE_AGAIN,
        _E.NEW_INSTANCE_LEFT: _GIVE_UP,
        _E.WINDOW_ENDED: _GIVE_UP,
        _E.STOP_ORDERED: _GIVE_UP,
    },
    _S.STOOD_DOWN: {
        _E.DRAINED: _EXIT,
        _E.DRAIN_TIMED_OUT: _to(_S.LEAVING, _A.ABORT, _A.EXIT),
    },
    _S.LEAVING: _END,
    _S.GONE: {},
}
"""What happens in each state. `LATE` lists what may also come, and changes nothing."""

TIMEOUTS: Mapping[State, frozenset[Event]] = {
    _S.WAITING: frozenset({_E.TURN_TIMED_OUT}),
    _S.OVERTAKEN: frozenset({_E.DEADLINE_PASSED}),
    _S.STARTING: frozenset({_E.READY_TIMED_OUT}),
    _S.HOLDING: frozenset({_E.TAKEOVER_TIMED_OUT}),
    _S.CANARY: frozenset({_E.CANARY_TIMED_OUT}),
    _S.ACCEPTING: frozenset(),
    _S.SERVING_AGAIN: frozenset(),
    _S.GIVING_BACK: frozenset({_E.GIVE_BACK_TIMED_OUT}),
    _S.TOLD_TO_GO: frozenset({_E.WINDOW_ENDED, _E.DRAIN_TIMED_OUT}),
    _S.DRAINING: frozenset({_E.WINDOW_ENDED, _E.DRAIN_TIMED_OUT}),
    _S.STANDING_BY: frozenset({_E.WINDOW_ENDED}),
    _S.STOOD_DOWN: frozenset({_E.DRAIN_TIMED_OUT}),
    _S.LEAVING: frozenset({_E.DEADLINE_PASSED}),
    _S.GONE: frozenset(),
}
"""The deadlines that run in each state: every wait has one, only those who serve need none."""

# What changes nothing for an instance that serves: another one asked for its listeners, and ended
# before it had taken over; a newer ticket was seen just as it took over; the drain that a rollback
# has cut short ends.
_UNMOVED = {_E.NEW_INSTANCE_CRASHED, _E.NEW_INSTANCE_LEFT, _E.GIVEN_BACK, _E.NEWER_STARTED}
_DRAIN_REPORTS = {_E.STOPPED_ACCEPTING, _E.DRAINED, _E.DRAIN_TIMED_OUT}
_LATE_WHILE_SERVING = _UNMOVED | _DRAIN_REPORTS | {_E.WINDOW_ENDED, _E.GIVE_BACK_TIMED_OUT}
LATE: Mapping[State, frozenset[Event]] = {
    # A deadline may pass just as what it waited for happens.
    _S.STARTING: frozenset({_E.TURN_TIMED_OUT}),
    _S.HOLDING: frozenset({_E.READY_TIMED_OUT, _E.CANARY_TIMED_OUT, _E.OLD_INSTANCE_ENDED}),
    _S.CANARY: frozenset({_E.READY_TIMED_OUT}),
    _S.ACCEPTING: frozenset(_LATE_WHILE_SERVING | {_E.TAKEOVER_TIMED_OUT}),
    _S.SERVING_AGAIN: frozenset(_LATE_WHILE_SERVING),
    _S.GIVING_BACK: frozenset(
        _LATE_WHILE_SERVING - {_E.GIVE_BACK_TIMED_OUT} | {_E.ROLLBACK_ORDERED}
    ),
    _S.TOLD_TO_GO: frozenset({_E.GIVE_BACK_TIMED_OUT, _E.ROLLBACK_ORDERED}),
    # It had aborted what was in flight when it took the wait for its workers for lost.
    _S.STANDING_BY: frozenset(_DRAIN_REPORTS),
    _S.STOOD_DOWN: frozenset(_E) - {_E.DRAINED, _E.DRAIN_TIMED_OUT, _E.EXITED},
    # On its way out nothing else matters any more.
    _S.OVERTAKEN: frozenset(_E) - frozenset(_END),
    _S.LEAVING: frozenset(_E) - frozenset(_END),
    _S.GONE: frozenset(_E),
}
"""What may come in a state although it no longer matters there."""

SERVES = frozenset({_S.CANARY, _S.ACCEPTING, _S.SERVING_AGAIN, _S.GIVING_BACK})
"""The states in which an instance accepts."""

MAY_ACCEPT = SERVES | {_S.HOLDING, _S.TOLD_TO_GO}
"""Those in which some of its workers may: they begin and stop one after another."""

CAN_SERVE_AGAIN = frozenset({_S.TOLD_TO_GO, _S.DRAINING, _S.STANDING_BY})
"""Those in which a crash of the new instance brings this one back."""

REPLACED = CAN_SERVE_AGAIN | {_S.STOOD_DOWN}
"""Those of an instance that another one has replaced, or serves instead of."""


class Lifecycle:
    """One instance's way through the table."""

    def __init__(self, state: State = State.WAITING) -> None:
        """`state`: where it begins; a driver that is made later begins later."""
        self.state = state

    def handle(self, event: Event) -> tuple[Action, ...]:
        """Return what is to be done now that `event` has happened, and enter the next state.

        Raises LifecycleError, and changes nothing, for an event that cannot come in this state.
        """
        transition = TABLE[self.state].get(event)
        if transition is not None:
            self.state = transition.state
            return transition.actions
        if event in LATE.get(self.state, ()):
            return ()
        raise LifecycleError(
            f"an instance that is {self.state.value} got an event that cannot come there: "
            f"{event.value}"
        )

    @property
    def serves(self) -> bool:
        """Whether it accepts."""
        return self.state in SERVES

    @property
    def replaced(self) -> bool:
        """Whether another instance serves in its place, and it has not come back."""
        return self.state in REPLACED

    @property
    def can_serve_again(self) -> bool:
        """Whether a crash of the new instance brings this one back."""
        return self.state in CAN_SERVE_AGAIN
