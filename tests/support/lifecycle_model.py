"""A model of up to three instances, the directory where they meet, and their messages.

A state of the world is a string of bytes; `Model.steps` lists every step that can come next. Each
access to the directory is a step of its own, so that two processes can both read before either
writes. What an instance does about an event is taken from the lifecycle table itself.

What is left out, and why no order is lost by that:

- Instances are numbered in the order of their starts, which is the order of their tickets. Any
  naming of instances that have not started is as good as any other.
- An instance that has ended keeps nothing but how it ended. A request of a process that has ended
  is dropped at once: whoever reads it later drops it without a trace.
- A message to an instance that no longer answers is dropped at once, for the same reason.
- A socket that is dead is a dead socket, no matter whose it was: it can only be looked at.
- Within one process, calls that follow one another without a wait, and that no other process can
  tell apart, are one step.

Messages in a socket's queue are not lost while the receiver lives: the kernel keeps them. What can
be lost is a request that the old instance drops, or an answer that it cannot send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hotrestart_plugins.lifecycle import table as lifecycle
from hotrestart_plugins.lifecycle.table import Action, Event, State, Transition

STATES = list(State)
NUMBER = {state: number for number, state in enumerate(STATES)}
UNSTARTED, CRASHED = 20, 21  # beside the numbers of the states
(
    WAITING,
    OVERTAKEN,
    STARTING,
    HOLDING,
    CANARY,
    ACCEPTING,
    GIVING_BACK,
    TOLD_TO_GO,
    DRAINING,
    STANDING_BY,
    STOOD_DOWN,
    SERVING_AGAIN,
    LEAVING,
    GONE,
) = range(len(STATES))

# The fields of the world.
NAME, CHILD_NAME, DIRECTORY, CRASHES, STOPS, REMOVALS, LOSSES, CANARIES, ROLLBACKS, FAILURES = (
    range(10)
)
HEAD = 10
# The fields of each instance.
LIFE, PHASE, PEER, CHILD, OWNS, QUEUE, INBOX, KEPT, HOME = range(9)
SIZE = 9

NOBODY, DEAD = 0, 7  # in NAME, CHILD_NAME, PEER, KEPT: else 1 + the instance whose socket it is

# OWNS: what an instance has, one bit each.
LISTENER, STANDBY, TURN, ASKING, ANSWERED, ACCEPTS, CLAIMING = 1, 2, 4, 8, 16, 32, 64
# QUEUE of the parent socket: PassFdRequest of instance n is bit n, TerminateParentRequest 4 + n.
# INBOX: orders between instances (control socket), and reports of the instance's own workers.
GIVEN_BACK, TAKEN_BACK, STOPPED, DRAINED = 1, 2, 4, 8

# PHASE: where a process stands within its lifecycle state.
(
    IDLE,
    CONNECT,
    ASK,
    RECEIVE,
    BIND,
    BOOT,
    LOOK,
    CHECK,
    CLAIM,
    TELL,
    COMMIT,
    TAKE_BACK,
    BACK_CLAIM,
    BACK_TELL,
) = range(14)

SERVING = {ACCEPTING, SERVING_AGAIN, GIVING_BACK}
REPLACED = {TOLD_TO_GO, DRAINING, STANDING_BY}
OVER = {GONE, CRASHED, UNSTARTED}
MAY_BECOME_READY = SERVING | REPLACED | {WAITING, STARTING, HOLDING, CANARY}
"""Whose ticket counts: who serves, may serve again, or may become ready."""

PROGRESS, TIMER, OUTSIDE = range(3)
"""A step that an instance takes by itself; the end of a timeout; what comes from outside."""


class Step(NamedTuple):
    """One step of one instance; -1: of nobody."""

    instance: int
    what: str
    kind: int = PROGRESS


class Violation(Exception):
    """Something that must not be."""


@dataclass(frozen=True)
class Options:
    """How many of each may come, and what is broken on purpose."""

    instances: int = 3
    crashes: int = 1
    failures: int = 1
    """Failures of an instance that serves: its app or its workers."""
    stops: int = 1
    removals: int = 0
    losses: int = 0
    canaries: int = 0
    rollbacks: int = 0
    broken: frozenset[str] = frozenset()
    """Parts of the protocol that are left out, to see that a violation is found then."""
    table: Mapping[State, Mapping[Event, Transition]] = field(
        default_factory=lambda: lifecycle.TABLE
    )
    timeouts: Mapping[State, frozenset[Event]] = field(default_factory=lambda: lifecycle.TIMEOUTS)


Steps = list[tuple[Step, bytes]]


class Model:
    """The steps that can come next, and what must hold in each state."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.broken = options.broken
        self.rows: set[tuple[State, Event]] = set()
        """The rows of the table that were used."""
        self.used: list[tuple[int, tuple[State, Event]]] = []
        """Which of the last steps used which row: the number of the step, and the row."""
        self._out: Steps = []
        self._starts = [HEAD + SIZE * number for number in range(options.instances)]
        self._numbers = range(options.instances)
        self._rows = {
            (NUMBER[state], event): (NUMBER[row.state], row.actions)
            for state, rows in options.table.items()
            for event, row in rows.items()
        }
        self._late = {
            (NUMBER[state], event) for state, events in lifecycle.LATE.items() for event in events
        }
        self._timers = {
            NUMBER[state]: sorted(events, key=lambda event: event.name)
            for state, events in options.timeouts.items()
        }

    def begin(self) -> bytes:
        """Nobody has started, and there is no directory."""
        options = self.options
        world = bytearray(HEAD + SIZE * options.instances)
        world[CRASHES : FAILURES + 1] = bytes(
            (
                options.crashes,
                options.stops,
                options.removals,
                options.losses,
                options.canaries,
                options.rollbacks,
                options.failures,
            )
        )
        for at in self._starts:
            world[at + LIFE] = UNSTARTED
        return bytes(world)

    # -- the table -----------------------------------------------------------------------------

    def _handle(self, world: bytearray, me: int, event: Event) -> None:
        """Let the lifecycle of an instance hear an event, and do what it says."""
        at = self._starts[me]
        life = world[at + LIFE]
        row = self._rows.get((life, event))
        if row is None:
            if (life, event) not in self._late:
                raise Violation(f"{STATES[life].name} cannot hear {event.name}")
            return
        self.rows.add((STATES[life], event))
        self.used.append((len(self._out), (STATES[life], event)))
        world[at + LIFE] = row[0]
        for action in row[1]:
            self._act(world, me, action)
        if row[0] == GONE:
            self._end(world, me, GONE)

    def _act(self, world: bytearray, me: int, action: Action) -> None:
        at = self._starts[me]
        if action is Action.BOOT:
            world[at + PHASE] = CONNECT
        elif action is Action.COMMIT:
            world[at + PHASE] = LOOK
        elif action in (Action.ACCEPT, Action.ACCEPT_AGAIN, Action.BEGIN_CANARY):
            world[at + OWNS] |= ACCEPTS
            if action is not Action.ACCEPT_AGAIN:
                world[at + PHASE] = IDLE
        elif action is Action.STOP_ACCEPTING:
            world[at + OWNS] &= ~ACCEPTS
            world[at + INBOX] |= STOPPED
        elif action is Action.DRAIN:
            world[at + INBOX] |= DRAINED
        elif action is Action.STAND_DOWN:
            # Its listeners are closed, so that the clients of a later crash are refused at once.
            world[at + OWNS] &= ~(STANDBY | LISTENER | TURN | ASKING | ANSWERED)
            world[at + CHILD] = 0
            world[at + PHASE] = IDLE
            self._leave_names(world, me, 0)
        elif action in (Action.EXIT, Action.EXIT_FAILED):
            self._close(world, me, 0 if action is Action.EXIT else DEAD)
        elif action is Action.ASK_BACK:
            # It may have to take its name back, should the old instance crash on the way.
            world[at + OWNS] |= STANDBY
            old = world[at + PEER]
            # The old instance refuses an order that does not come from its new instance.
            if 0 < old < DEAD and world[self._starts[old - 1] + CHILD] == me + 1:
                world[self._starts[old - 1] + INBOX] |= GIVEN_BACK
        elif action is Action.KEEP_NAME:
            world[at + OWNS] &= ~STANDBY
            lost = world[NAME] in (NOBODY, DEAD)
            if lost and world[DIRECTORY] and self._at_home(world, me):
                self._close_parent_socket(world, me)
                world[NAME] = me + 1

    # -- ends ----------------------------------------------------------------------------------

    def _close_parent_socket(self, world: bytearray, me: int, name: int = DEAD) -> None:
        """Close the socket: its messages are lost; who is connected to it, finds it dead."""
        mine = me + 1
        world[self._starts[me] + QUEUE] = 0
        if world[NAME] == mine:
            world[NAME] = name
        for at in self._starts:
            if world[at + PEER] == mine and world[at + LIFE] not in SERVING:
                world[at + PEER] = DEAD
            if world[at + KEPT] == mine:
                world[at + KEPT] = DEAD

    def _leave_names(self, world: bytearray, me: int, name: int) -> None:
        self._close_parent_socket(world, me, name)
        if world[CHILD_NAME] == me + 1:
            world[CHILD_NAME] = NOBODY

    def _close(self, world: bytearray, me: int, name: int) -> None:
        """Close what an instance has; `name`: what is left of its name."""
        at = self._starts[me]
        self._leave_names(world, me, name)
        for field_ in (PHASE, PEER, CHILD, OWNS, QUEUE, INBOX, KEPT):
            world[at + field_] = 0
        bit = ~(1 << me)
        for other in self._starts:
            world[other + QUEUE] &= bit

    def _end(self, world: bytearray, me: int, how: int) -> None:
        """The process is gone: the kernel closes what it had."""
        self._close(world, me, DEAD)
        at = self._starts[me]
        world[at + LIFE] = how
        world[at + HOME] = 0
        for other in self._starts:
            if world[other + PEER] == me + 1:
                world[other + PEER] = DEAD

    # -- looks ---------------------------------------------------------------------------------

    def _newer(self, world: bytes | bytearray, me: int) -> bool:
        """Whether a newer ticket in the same directory counts."""
        home = world[self._starts[me] + HOME]
        for at in self._starts[me + 1 :]:
            life = world[at + LIFE]
            if world[at + HOME] == home and (
                (
                    life in MAY_BECOME_READY
                    and not ("ticket ends when serving" in self.broken and life in SERVING)
                )
                or ("ticket outlives failure" in self.broken and life == LEAVING)
                or ("ticket lasts to the end" in self.broken and life == STOOD_DOWN)
            ):
                return True
        return False

    def _turn_is_free(self, world: bytes | bytearray, home: int) -> bool:
        return not any(world[at + OWNS] & TURN and world[at + HOME] == home for at in self._starts)

    def _may_claim(self, world: bytes | bytearray, me: int) -> bool:
        """Whether no other instance is between its look at the name and its claim."""
        home = world[self._starts[me] + HOME]
        return "no lock for claims" in self.broken or not any(
            world[at + OWNS] & CLAIMING and world[at + HOME] == home
            for number, at in enumerate(self._starts)
            if number != me
        )

    def _at_home(self, world: bytes | bytearray, me: int) -> bool:
        """Whether the directory is still the one in which this instance has its locks."""
        home = world[self._starts[me] + HOME]
        return world[DIRECTORY] == home or "no look at the lock file" in self.broken

    def _standing_by(self, world: bytes, me: int) -> bool:
        home = world[self._starts[me] + HOME]
        return any(
            world[at + OWNS] & STANDBY and world[at + HOME] == home
            for number, at in enumerate(self._starts)
            if number != me
        )

    # -- the steps -----------------------------------------------------------------------------

    def steps(self, world: bytes) -> Steps:
        """Every step that can come next, and the world after it.

        Raises Violation for a step that must not be possible.
        """
        out: Steps = []
        self._out, self.used = out, []
        for me, at in enumerate(self._starts):
            life = world[at + LIFE]
            if life == UNSTARTED:
                self._start(world, me, out)
                break
            if life in OVER:
                continue
            if world[CRASHES] and life not in (LEAVING, OVERTAKEN):  # which end anyway
                self._crash(world, me, out)
            if life in SERVING or life in REPLACED:
                if world[at + PHASE]:
                    self._in_the_middle(world, me, out)
                    continue
                self._host(world, me, life, out)
            elif life == WAITING:
                self._waiting(world, me, out)
            elif life == STARTING:
                self._starting(world, me, out)
            elif life == HOLDING:
                self._holding(world, me, out)
                continue
            elif life == CANARY:
                self._canary(world, me, out)
            elif life == STOOD_DOWN:
                self._reports(world, me, out)
            elif life in (LEAVING, OVERTAKEN):
                self._event(world, me, Event.EXITED, out)
            for event in self._timers[life]:
                self._event(world, me, event, out, TIMER)
            if world[STOPS] and life not in (LEAVING, OVERTAKEN, STOOD_DOWN):
                self._event(world, me, Event.STOP_ORDERED, out, OUTSIDE, budget=STOPS)
        if world[REMOVALS] and world[DIRECTORY]:
            after = bytearray(world)
            after[NAME] = after[CHILD_NAME] = after[DIRECTORY] = 0
            after[REMOVALS] -= 1
            for at in self._starts:
                after[at + KEPT] = 0
            out.append((Step(-1, "the directory is removed", OUTSIDE), bytes(after)))
        return out

    def _event(
        self,
        world: bytes,
        me: int,
        event: Event,
        out: Steps,
        kind: int = PROGRESS,
        *,
        budget: int = -1,
    ) -> None:
        after = bytearray(world)
        if budget >= 0:
            after[budget] -= 1
        self._handle(after, me, event)
        out.append((Step(me, event.name, kind), bytes(after)))

    def _start(self, world: bytes, me: int, out: Steps) -> None:
        """Make the directory if it is missing, and take the next ticket."""
        after = bytearray(world)
        if not after[DIRECTORY]:
            after[DIRECTORY] = 1 + self.options.removals - after[REMOVALS]
        at = self._starts[me]
        after[at + LIFE] = WAITING
        after[at + HOME] = after[DIRECTORY]
        out.append((Step(me, "starts", OUTSIDE), bytes(after)))

    def _crash(self, world: bytes, me: int, out: Steps) -> None:
        after = bytearray(world)
        after[CRASHES] -= 1
        self._end(after, me, CRASHED)
        out.append((Step(me, "crashes", OUTSIDE), bytes(after)))

    def _waiting(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        # It looks for a newer ticket once it has the turn; what starts later, it sees later.
        newer = "no newer ticket" not in self.broken and self._newer(world, me)
        if self._turn_is_free(world, world[at + HOME]) and not newer:
            after = bytearray(world)
            after[at + OWNS] |= TURN
            self._handle(after, me, Event.TURN_CAME)
            out.append((Step(me, Event.TURN_CAME.name), bytes(after)))
        self._overtaken(world, me, out)
        self._event(world, me, Event.FAILED, out, OUTSIDE)

    def _overtaken(self, world: bytes, me: int, out: Steps) -> None:
        if "no newer ticket" not in self.broken and self._newer(world, me):
            if not any(world[at + LIFE] in MAY_BECOME_READY for at in self._starts[me + 1 :]):
                raise Violation(f"{me} is overtaken by an instance that cannot become ready")
            self._event(world, me, Event.NEWER_STARTED, out)

    # -- the new instance ----------------------------------------------------------------------

    def _starting(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        phase = world[at + PHASE]
        if phase == CONNECT:
            self._connect(world, me, out)
        elif phase == ASK:
            self._ask(world, me, out)
        elif phase == RECEIVE:
            self._receive(world, me, out)
        elif phase == BIND:
            others = (other for other in self._starts if other != at)
            # An answer in a queue holds the listener, too.
            if not any(world[other + OWNS] & (LISTENER | ANSWERED) for other in others):
                after = bytearray(world)
                after[at + OWNS] |= LISTENER
                after[at + PHASE] = BOOT
                out.append((Step(me, "binds"), bytes(after)))
        elif phase == BOOT:
            self._event(world, me, Event.READY, out)
            if world[CANARIES] and world[at + PEER]:
                self._event(world, me, Event.CANARY_BEGAN, out, OUTSIDE, budget=CANARIES)
        self._overtaken(world, me, out)
        self._event(world, me, Event.FAILED, out, OUTSIDE)

    def _connect(self, world: bytes, me: int, out: Steps) -> None:
        """Turn to the instance that serves; wait for one that stands by; or go on alone."""
        at = self._starts[me]
        after = bytearray(world)
        if not world[DIRECTORY] or not self._at_home(world, me):
            # Its turn is worth nothing where others meet now.
            self._event(world, me, Event.FAILED, out)
            return
        if not world[at + OWNS] & ASKING:
            after[at + OWNS] |= ASKING
            after[CHILD_NAME] = me + 1
        name = world[NAME]
        if name not in (NOBODY, DEAD):
            after[at + PEER] = name
            after[at + OWNS] &= ~ANSWERED
            after[at + PHASE] = ASK
            out.append((Step(me, "connects"), bytes(after)))
            return
        if self._standing_by(world, me):
            return
        after[at + PEER] = NOBODY
        after[at + OWNS] &= ~(ASKING | ANSWERED)
        if after[CHILD_NAME] == me + 1:
            after[CHILD_NAME] = NOBODY
        has = world[at + OWNS] & LISTENER
        if world[at + LIFE] == HOLDING:
            after[at + PHASE] = LOOK
        else:
            after[at + PHASE] = BOOT if has else BIND
        self._is_alone(world, me)
        out.append((Step(me, "finds nobody"), bytes(after)))

    def _is_alone(self, world: bytes, me: int) -> None:
        home = world[self._starts[me] + HOME]
        for number, at in enumerate(self._starts):
            life = world[at + LIFE]
            if number == me or world[at + HOME] != home or world[DIRECTORY] != home:
                continue
            if life in SERVING or life in REPLACED:
                raise Violation(f"{me} finds nobody, although {number} is {STATES[life].name}")

    def _ask(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        after = bytearray(world)
        peer = world[at + PEER]
        if peer == DEAD:
            after[at + PHASE] = CONNECT
            out.append((Step(me, "cannot ask"), bytes(after)))
            return
        other = self._starts[peer - 1]
        if world[other + LIFE] in SERVING:
            after[other + QUEUE] |= 1 << me
        after[at + PHASE] = RECEIVE
        out.append((Step(me, "asks"), bytes(after)))

    def _receive(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        after = bytearray(world)
        if world[at + OWNS] & ANSWERED:
            after[at + OWNS] = after[at + OWNS] & ~ANSWERED | LISTENER
            after[at + PHASE] = LOOK if world[at + LIFE] == HOLDING else BOOT
            out.append((Step(me, "inherits"), bytes(after)))
            if world[LOSSES]:
                after = bytearray(world)
                after[at + OWNS] &= ~ANSWERED
                after[LOSSES] -= 1
                out.append((Step(me, "loses the answer", OUTSIDE), bytes(after)))
        elif world[NAME] != world[at + PEER] or world[NAME] == DEAD:
            after[at + PHASE] = CONNECT
            out.append((Step(me, "misses the old instance"), bytes(after)))

    def _holding(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        phase = world[at + PHASE]
        if phase == CONNECT:
            self._connect(world, me, out)
        elif phase == ASK:
            self._ask(world, me, out)
        elif phase == RECEIVE:
            self._receive(world, me, out)
        elif phase == LOOK:
            if self._may_claim(world, me):
                self._look(world, me, out)
            self._event(world, me, Event.FAILED, out, OUTSIDE)
            if world[STOPS]:
                self._event(world, me, Event.STOP_ORDERED, out, OUTSIDE, budget=STOPS)
        elif phase == CHECK:
            if "no newer ticket" not in self.broken and self._newer(world, me):
                if not world[at + PEER]:
                    raise Violation(f"{me} is ready, and leaves although nobody serves")
                self._event(world, me, Event.NEWER_STARTED, out)
            else:
                after = bytearray(world)
                after[at + PHASE] = TELL if "tell before claim" in self.broken else CLAIM
                if "unlock before claim" in self.broken:
                    after[at + OWNS] &= ~TURN
                out.append((Step(me, "sees no newer ticket"), bytes(after)))
        elif phase == CLAIM:
            self._claim(world, me, out)
        elif phase == TELL:
            self._tell(world, me, out)
        elif phase == COMMIT:
            self._event(world, me, Event.COMMITTED, out)
        if phase in (CONNECT, ASK, RECEIVE, LOOK):
            for event in self._timers[HOLDING]:
                self._event(world, me, event, out, TIMER)

    def _look(self, world: bytes, me: int, out: Steps) -> None:
        """Whether the old instance still serves: only then can a newer one overtake this one."""
        at = self._starts[me]
        after = bytearray(world)
        after[at + OWNS] |= CLAIMING
        peer = world[at + PEER]
        if not peer:
            after[at + PHASE] = CHECK if "overtaken alone" in self.broken else CLAIM
        elif "no look before claim" in self.broken or (peer != DEAD and world[NAME] == peer):
            after[at + PHASE] = CHECK
        else:
            after[at + PHASE] = CONNECT
            after[at + OWNS] &= ~CLAIMING
        out.append((Step(me, "looks"), bytes(after)))

    def _claim(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        if not world[DIRECTORY] or not self._at_home(world, me):
            self._event(world, me, Event.FAILED, out)
            return
        after = bytearray(world)
        after[at + KEPT] = world[NAME]
        after[NAME] = me + 1
        if world[at + PEER] and "tell before claim" not in self.broken:
            after[at + PHASE] = TELL
        else:
            self._taken_over(after, me)
        out.append((Step(me, "claims the name"), bytes(after)))

    def _taken_over(self, after: bytearray, me: int) -> None:
        """Close the child socket, and let the next one have its turn."""
        at = self._starts[me]
        after[at + KEPT] = 0
        after[at + OWNS] &= ~(TURN | ASKING | ANSWERED | CLAIMING)
        if after[CHILD_NAME] == me + 1:
            after[CHILD_NAME] = NOBODY
        if not self.options.rollbacks:
            after[at + PEER] = NOBODY
        after[at + PHASE] = COMMIT

    def _tell(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        after = bytearray(world)
        peer = world[at + PEER]
        if peer != DEAD and world[self._starts[peer - 1] + LIFE] in SERVING:
            after[self._starts[peer - 1] + QUEUE] |= 16 << me
        if "tell before claim" in self.broken:
            after[at + PHASE] = CLAIM
        else:
            self._taken_over(after, me)
        out.append((Step(me, "tells the old instance to go"), bytes(after)))
        if peer != DEAD:  # its queue is full, since it is stopped: it gets its name back
            after = bytearray(world)
            if after[NAME] == me + 1:
                after[NAME] = world[at + KEPT]
            after[at + KEPT] = 0
            self._handle(after, me, Event.TAKEOVER_TIMED_OUT)
            out.append((Step(me, "cannot tell", TIMER), bytes(after)))

    # -- the canary ----------------------------------------------------------------------------

    def _canary(self, world: bytes, me: int, out: Steps) -> None:
        peer = world[self._starts[me] + PEER]
        if peer == DEAD:
            self._event(world, me, Event.OLD_INSTANCE_ENDED, out)
            return
        self._event(world, me, Event.CANARY_PASSED, out)
        self._event(world, me, Event.CANARY_FAILED, out, OUTSIDE)
        self._event(world, me, Event.FAILED, out, OUTSIDE)
        self._overtaken(world, me, out)
        if world[ROLLBACKS]:
            self._event(world, me, Event.ROLLBACK_ORDERED, out, OUTSIDE, budget=ROLLBACKS)

    # -- the old instance ----------------------------------------------------------------------

    def _host(self, world: bytes, me: int, life: int, out: Steps) -> None:
        """What an instance does that serves, or may serve again."""
        at = self._starts[me]
        self._reports(world, me, out)
        child = world[at + CHILD]
        # What has come is heard first: it may be of the child, from before its end.
        heard = not world[at + QUEUE] or "end before messages" in self.broken
        if (
            child
            and heard
            and self._may_claim(world, me)
            and world[self._starts[child - 1] + LIFE] in (GONE, CRASHED)
        ):
            self._child_ended(world, me, life, out)
        inbox = world[at + INBOX]
        if inbox & GIVEN_BACK and self._may_claim(world, me):
            self._given_back(world, me, life, out)
        if life not in SERVING:
            return
        # The word of an old instance that has ended counts if another one serves by now.
        ended = world[at + PEER] == DEAD
        replaced = inbox & TAKEN_BACK and (not ended or self._another_serves(world, me))
        if replaced:
            after = bytearray(world)
            after[at + INBOX] &= ~TAKEN_BACK
            self._handle(after, me, Event.TAKEN_BACK)
            out.append((Step(me, Event.TAKEN_BACK.name), bytes(after)))
        elif ended and not world[at + QUEUE] and self._may_claim(world, me):
            after = bytearray(world)
            after[at + PEER] = NOBODY
            after[at + INBOX] &= ~TAKEN_BACK
            self._handle(after, me, Event.OLD_INSTANCE_ENDED)
            out.append((Step(me, Event.OLD_INSTANCE_ENDED.name), bytes(after)))
        if world[at + QUEUE]:
            self._message(world, me, out)
        if world[FAILURES]:
            self._event(world, me, Event.FAILED, out, OUTSIDE, budget=FAILURES)
        if world[ROLLBACKS] and world[at + PEER] and life != GIVING_BACK:
            self._event(world, me, Event.ROLLBACK_ORDERED, out, OUTSIDE, budget=ROLLBACKS)

    def _reports(self, world: bytes, me: int, out: Steps) -> None:
        """What the workers report; a rollback may have come in between."""
        at = self._starts[me]
        inbox = world[at + INBOX]
        for bit, event in ((STOPPED, Event.STOPPED_ACCEPTING), (DRAINED, Event.DRAINED)):
            if inbox & bit:
                after = bytearray(world)
                after[at + INBOX] &= ~bit
                self._handle(after, me, event)
                out.append((Step(me, event.name), bytes(after)))
                return

    def _message(self, world: bytes, me: int, out: Steps) -> None:
        at = self._starts[me]
        queue = world[at + QUEUE]
        for other in self._numbers:
            there = self._starts[other]
            if queue & 1 << other:
                after = bytearray(world)
                after[at + QUEUE] &= ~(1 << other)
                if world[LOSSES]:
                    lost = bytearray(after)
                    lost[LOSSES] -= 1
                    out.append((Step(me, "drops the request", OUTSIDE), bytes(lost)))
                if world[at + CHILD] != other + 1:  # an order of another one does not count
                    after[at + INBOX] &= ~GIVEN_BACK
                after[at + CHILD] = other + 1
                if "no stand-by" not in self.broken:
                    after[at + OWNS] |= STANDBY
                if world[CHILD_NAME] == other + 1 and world[there + OWNS] & ASKING:
                    after[there + OWNS] |= ANSWERED
                out.append((Step(me, "answers the request"), bytes(after)))
                return
        for other in self._numbers:
            if queue & 16 << other:
                after = bytearray(world)
                after[at + QUEUE] &= ~(16 << other)
                if world[at + CHILD] == other + 1:
                    if other < me:
                        raise Violation(f"{me} is replaced by {other}, which started before it")
                    after[at + QUEUE] = 0
                    self._handle(after, me, Event.REPLACED)
                out.append((Step(me, Event.REPLACED.name), bytes(after)))
                return

    def _child_ended(self, world: bytes, me: int, life: int, out: Steps) -> None:
        """The new instance has ended: look what is at the name."""
        at = self._starts[me]
        after = bytearray(world)
        name = world[NAME]
        if life in SERVING:
            answers = name not in (NOBODY, DEAD) and "take back from anybody" not in self.broken
            if name == me + 1 or answers or "no take back" in self.broken:
                after[at + CHILD] = 0
                after[at + OWNS] &= ~STANDBY
                self._handle(after, me, Event.NEW_INSTANCE_CRASHED)
            else:
                after[at + PHASE] = TAKE_BACK
        elif self._is_served(world, me, name) or "no rollback" in self.broken:
            if "roll back when left" in self.broken:
                after[at + PHASE] = TAKE_BACK
            else:
                self._needs_nobody(world, me)
                self._handle(after, me, Event.NEW_INSTANCE_LEFT)
        else:
            after[at + PHASE] = TAKE_BACK
        if after[at + PHASE] == TAKE_BACK:
            after[at + OWNS] |= CLAIMING
        out.append((Step(me, "notices the end of the new instance"), bytes(after)))

    def _is_served(self, world: bytes, me: int, name: int) -> bool:
        """Whether another one serves, or the new instance was stopped on purpose.

        A dead socket at the name is the sign of a crash, if the directory was not removed. That
        another one serves is told by a lock that it holds, also after its name was lost.
        """
        if name != DEAD and self._at_home(world, me):
            return True
        return "no lock for serving" not in self.broken and self._another_serves(world, me)

    def _another_serves(self, world: bytes, me: int) -> bool:
        """What the locks tell: each instance that serves holds one, from its claim on."""
        home = world[self._starts[me] + HOME]
        return any(
            world[at + LIFE] in SERVING or self._commits(world, at)
            for number, at in enumerate(self._starts)
            if number != me and world[at + HOME] == home
        )

    def _needs_nobody(self, world: bytes, me: int) -> None:
        """Raise Violation if the new instance crashed, nobody serves, and this one gives up."""
        child = world[self._starts[me] + CHILD] - 1
        if world[self._starts[child] + LIFE] != CRASHED:
            return
        if world[STOPS] < self.options.stops:
            return  # whoever serves may have been told to stop
        others = [at for number, at in enumerate(self._starts) if number != me]
        if not any(
            world[at + LIFE] in SERVING or world[at + LIFE] in REPLACED or self._commits(world, at)
            for at in others
        ):
            raise Violation(f"{me} gives up although {child} crashed and nobody serves")

    def _excused(self, world: bytes) -> bool:
        """Whether the directory was removed: then an instance may not be found by its name."""
        return world[REMOVALS] < self.options.removals

    def _commits(self, world: bytes, at: int) -> bool:
        return world[at + LIFE] == HOLDING and world[at + PHASE] in (TELL, COMMIT)

    def _in_the_middle(self, world: bytes, me: int, out: Steps) -> None:
        """Go on after a look at the directory, or after the name was claimed."""
        at = self._starts[me]
        after = bytearray(world)
        phase = world[at + PHASE]
        after[at + PHASE] = IDLE
        if phase == TAKE_BACK:
            if world[DIRECTORY] and self._at_home(world, me):
                self._close_parent_socket(after, me)
                after[NAME] = me + 1
            after[at + CHILD] = 0
            after[at + OWNS] &= ~(STANDBY | CLAIMING)
            self._handle(after, me, Event.NEW_INSTANCE_CRASHED)
            out.append((Step(me, "takes its name back"), bytes(after)))
        elif phase == BACK_CLAIM:
            if self._at_home(world, me) and world[NAME] == world[at + CHILD]:
                self._close_parent_socket(after, me)
                after[NAME] = me + 1
                after[at + PHASE] = BACK_TELL
                self._handle(after, me, Event.GIVEN_BACK)
            else:
                after[at + OWNS] &= ~(TURN | CLAIMING)
            out.append((Step(me, Event.GIVEN_BACK.name), bytes(after)))
        else:
            giver = self._starts[world[at + CHILD] - 1]
            if world[giver + LIFE] in SERVING:
                after[giver + INBOX] |= TAKEN_BACK
            after[at + CHILD] = 0
            after[at + OWNS] &= ~(TURN | STANDBY | CLAIMING)
            out.append((Step(me, "tells the new instance to go"), bytes(after)))

    def _given_back(self, world: bytes, me: int, life: int, out: Steps) -> None:
        """The new instance asks this one to serve again: only in a turn, and only from there."""
        at = self._starts[me]
        after = bytearray(world)
        after[at + INBOX] &= ~GIVEN_BACK
        if life in REPLACED:
            free = self._turn_is_free(world, world[at + HOME])
            if world[NAME] != NOBODY and world[NAME] == world[at + CHILD] and free:
                after[at + OWNS] |= TURN | CLAIMING
                after[at + PHASE] = BACK_CLAIM
        else:
            self._handle(after, me, Event.GIVEN_BACK)
        out.append((Step(me, "is asked to serve again"), bytes(after)))

    # -- what must hold ------------------------------------------------------------------------

    def check(self, world: bytes, steps: Steps) -> None:
        """Raise Violation if something does not hold in this state, whose steps these are."""
        lives = [world[at + LIFE] for at in self._starts]
        accepting = []
        for me, at in enumerate(self._starts):
            accepts = bool(world[at + OWNS] & ACCEPTS)
            wanted = lives[me] in SERVING or lives[me] == CANARY
            after_canary = lives[me] == HOLDING and self.options.canaries
            if accepts != wanted and not after_canary:
                raise Violation(f"{me} is {STATES[lives[me]].name} and accepts: {accepts}")
            if accepts:
                accepting.append(me)
                if not world[at + OWNS] & LISTENER:
                    raise Violation(f"{me} accepts without a listener")
        settled = [me for me in accepting if lives[me] in SERVING and not self._will_go(world, me)]
        if len(settled) > 1:
            raise Violation(f"{settled} accept, and nobody has told them to go")
        self._check_service(world, lives, accepting)
        self._check_deadlines(lives, steps)
        if not any(step.kind == PROGRESS for step, _ in steps):
            self._check_rest(world, lives, accepting)

    def _will_go(self, world: bytes, me: int) -> bool:
        """Whether a message that tells it to go is on its way."""
        at = self._starts[me]
        child = world[at + CHILD]
        if child and world[at + QUEUE] & 8 << child:
            return True
        return bool(world[at + INBOX] & TAKEN_BACK) or any(
            world[other + PHASE] == BACK_TELL and world[other + CHILD] == me + 1
            for other in self._starts
        )

    def _check_service(self, world: bytes, lives: list[int], accepting: list[int]) -> None:
        """Somebody accepts, or is about to without anybody's help."""
        if accepting:
            return
        for me, at in enumerate(self._starts):
            life = lives[me]
            if life not in REPLACED:
                continue
            child = world[at + CHILD]
            new = self._starts[child - 1] if child else -1
            if new < 0:
                raise Violation(f"{me} stands by for nobody")
            after = world[new + LIFE]
            helped = (
                life == TOLD_TO_GO
                or after in (GONE, CRASHED, LEAVING, STOOD_DOWN)
                or after in REPLACED
                or self._commits(world, new)
            )
            if not helped:
                raise Violation(
                    f"nobody accepts: {me} is {STATES[life].name} for {STATES[after].name}"
                )

    def _check_deadlines(self, lives: list[int], steps: Steps) -> None:
        for me, life in enumerate(lives):
            if life in OVER or life in (ACCEPTING, SERVING_AGAIN):
                continue
            if not any(step.instance == me and step.kind != OUTSIDE for step, _ in steps):
                raise Violation(f"{me} waits without a deadline: {STATES[life].name}")

    def _check_rest(self, world: bytes, lives: list[int], accepting: list[int]) -> None:
        """Nobody can take a step by itself: the order among the instances is settled."""
        could = [me for me, life in enumerate(lives) if life in SERVING or life in REPLACED]
        if not could:
            return
        accepting = [me for me in accepting if lives[me] in SERVING]
        if len(accepting) != 1:
            raise Violation(f"{accepting} accept, and could: {could}")
        serving = accepting[0]
        if max(could) != serving:
            raise Violation(f"{serving} serves, and {max(could)} is newer")
        if not self._excused(world) and world[NAME] != serving + 1:
            raise Violation(f"{serving} serves, and the name leads to {world[NAME] - 1}")


def describe(world: bytes) -> str:
    """A state of the world in words, for a trace."""
    parts = [
        f"name={world[NAME]} child={world[CHILD_NAME]} directory={world[DIRECTORY]}",
    ]
    for at in range(HEAD, len(world), SIZE):
        life = world[at + LIFE]
        words = {UNSTARTED: "unstarted", CRASHED: "crashed"}
        text = words.get(life) or STATES[life].name
        if life not in OVER:
            text += (
                f"[{world[at + PHASE]} peer={world[at + PEER]} child={world[at + CHILD]}"
                f" owns={world[at + OWNS]:06b} queue={world[at + QUEUE]:b}"
                f" inbox={world[at + INBOX]:b}]"
            )
        parts.append(text)
    return " | ".join(parts)


class Exploration(NamedTuple):
    """What an exploration has found."""

    states: int
    transitions: int
    rows: set[tuple[State, Event]]


class Found(Exception):
    """A violation, with the shortest way to it."""

    def __init__(self, why: str, trace: list[Step], world: bytes) -> None:
        lines = [f"  {step.instance}: {step.what}" for step in trace]
        super().__init__("\n".join([why, *lines, describe(world)]))
        self.why = why
        self.trace = trace


def explore(options: Options) -> Exploration:
    """Look at every state that can be reached, nearest first; raises Found."""
    model = Model(options)
    begin = model.begin()
    found = {begin: 0}
    order = [begin]
    parents = [0]
    transitions = 0
    number = 0
    while number < len(order):
        world = order[number]
        try:
            steps = model.steps(world)
            model.check(world, steps)
        except Violation as violation:
            raise Found(str(violation), _trace(model, order, parents, number), world) from None
        for _, after in steps:
            if after not in found:
                found[after] = len(order)
                order.append(after)
                parents.append(number)
        transitions += len(steps)
        number += 1
    return Exploration(len(order), transitions, model.rows)


def _trace(model: Model, order: list[bytes], parents: list[int], number: int) -> list[Step]:
    trace: list[Step] = []
    while number:
        before = parents[number]
        trace.append(next(s for s, after in model.steps(order[before]) if after == order[number]))
        number = before
    return trace[::-1]
