"""The roles of an instance, and which role may follow which.

::

    NEW ──> CHILD ──> PARENT <──> REPLACED
     │        │         ^
     │        v         │
     └────> INITIAL ────┘            each of them ──> CLOSED
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from hotrestart_plugins.errors import LifecycleError


class Role(enum.Enum):
    """Where in its life an instance is."""

    NEW = "new"
    CHILD = "child"  # found a parent, and is taking over from it
    INITIAL = "first parent"  # found nobody, and is not ready yet
    PARENT = "parent"  # serves, and answers whoever asks
    REPLACED = "replaced"  # was told to go: it drains, and stands by
    CLOSED = "closed"


TRANSITIONS: Mapping[Role, frozenset[Role]] = {
    Role.NEW: frozenset({Role.CHILD, Role.INITIAL, Role.CLOSED}),
    # The parent may end in the middle of the takeover: the child goes on alone.
    Role.CHILD: frozenset({Role.INITIAL, Role.PARENT, Role.CLOSED}),
    Role.INITIAL: frozenset({Role.PARENT, Role.CLOSED}),
    Role.PARENT: frozenset({Role.REPLACED, Role.CLOSED}),
    # The new instance may crash: the old one serves again.
    Role.REPLACED: frozenset({Role.PARENT, Role.CLOSED}),
    Role.CLOSED: frozenset(),
}
"""The roles that may follow each role."""


class TerminatePolicy(enum.Enum):
    """When the parent is told to go."""

    READY = "ready"
    """At `HotRestart.ready()`."""
    INHERITED = "inherited"
    """As soon as every listener was asked for, ready or not: what Volo does."""


class ChildExitAction(enum.Enum):
    """What the end of the child means to the instance that it took over from, or would have."""

    NOTHING = "nothing"
    """This instance serves: the child died before it had taken over."""
    RESUME = "resume"
    """Nobody serves: accept again. The parent socket is this instance's again."""
    LEAVE = "leave"
    """Somebody else serves, the new instance was stopped on purpose, or this one stood down."""


class InstanceState:
    """One instance's role, and whom it takes over from. Both sides of a takeover share it."""

    def __init__(self) -> None:
        self.role = Role.NEW
        self.parent_pid = 0
        """The pid of the instance taken over from, once it has answered; 0 if there is none."""
        self.takeover_id = 0
        """Names this instance as a child; see `RendezvousDirectory`. 0 if it is none."""

    def become(self, role: Role) -> None:
        """Enter the next role; raises LifecycleError for one that cannot follow."""
        if role not in TRANSITIONS[self.role]:
            raise LifecycleError(
                f"an instance that is {self.role.value} cannot become {role.value}"
            )
        self.role = role
