"""Replays a trace of the lifecycle model with real processes, and compares the two."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
from pathlib import Path

from hotrestart_plugins.core.locks import _CLAIM, _LockFile
from hotrestart_plugins.core.rendezvous import LOCK, PARENT_SOCKET
from hotrestart_plugins.lifecycle.table import Event, State
from tests.support import lifecycle_model as model
from tests.support.lifecycle_model import HEAD, SIZE, STATES, Model, Options, Step, Violation
from tests.support.processes import Instance, Processes, Told, answer, connect

TODAY = Options(crashes=2, removals=1)

_STOPS_AT = {
    model.CONNECT: "connect",
    model.ASK: "ask",
    model.RECEIVE: "asked",
    model.BIND: "bind",
    model.BOOT: "booted",
    model.LOOK: "look",
    model.CHECK: "check",
    model.CLAIM: "claim",
    model.TELL: "tell",
    model.COMMIT: "done",
}
"""The gate at which an instance stands in a phase, or the answer to the last command."""

_GO = {
    Event.TURN_CAME.name,
    "connects",
    "finds nobody",
    "asks",
    "cannot ask",
    "binds",
    "looks",
    "sees no newer ticket",
    "claims the name",
    "tells the old instance to go",
}
"""The steps from one gate to the next."""

_AT_GATE = {model.CONNECT, model.ASK, model.BIND, model.LOOK, model.CLAIM, model.TELL}


class Move:
    """One step of a trace: the world before it, and after it."""

    def __init__(self, step: Step, before: bytes, after: bytes) -> None:
        self.step = step
        self.before = before
        self.after = after


def shortest_traces(options: Options) -> dict[tuple[State, Event], list[Move]]:
    """The shortest trace to the first use of each row of the table."""
    explored = Model(options)
    begin = explored.begin()
    order = [begin]
    parents: dict[bytes, tuple[bytes, Step]] = {}
    seen = {begin}
    found: dict[tuple[State, Event], list[Move]] = {}
    for world in order:
        with contextlib.suppress(Violation):
            steps = explored.steps(world)
            for number, row in explored.used:
                if row not in found:
                    step, after = steps[number]
                    found[row] = [*_moves(parents, world), Move(step, world, after)]
            for step, after in steps:
                if after not in seen:
                    seen.add(after)
                    parents[after] = (world, step)
                    order.append(after)
    return found


def _moves(parents: dict[bytes, tuple[bytes, Step]], world: bytes) -> list[Move]:
    moves = []
    while world in parents:
        before, step = parents[world]
        moves.append(Move(step, before, world))
        world = before
    return moves[::-1]


def random_trace(options: Options, seed: int, longest: int = 60) -> list[Move]:
    """A way through the model, in which instances rather go on than end."""
    chosen = random.Random(seed)
    explored = Model(options)
    world = explored.begin()
    moves: list[Move] = []
    while len(moves) < longest:
        try:
            steps = explored.steps(world)
        except Violation:
            break
        if not steps:
            break
        weights = [
            20 if step.kind == model.PROGRESS else 12 if step.what == "starts" else 1
            for step, _ in steps
        ]
        step, after = chosen.choices(steps, weights)[0]
        moves.append(Move(step, world, after))
        world = after
    return moves


class Replay:
    """The processes of one trace."""

    def __init__(self, processes: Processes, directory: Path, address: str) -> None:
        """`directory`: where they meet, not made yet. `address`: what they serve."""
        self._processes = processes
        self._directory = directory
        self._address = address
        self._instances: list[Instance] = []
        self._statuses: dict[int, int] = {}

    def play(self, move: Move) -> None:
        """Have the processes take one step; raises AssertionError if it ends otherwise."""
        step, me = move.step, move.step.instance
        if step.what == "the directory is removed":
            shutil.rmtree(self._directory)
            return
        if step.what == "starts":
            self._instances.append(
                self._processes.instance(module="tests.support.lifecycle_puppet")
            )
            self._expect(me, "turn", "start", str(self._directory), self._address)
            return
        at = HEAD + SIZE * me
        phase = move.before[at + model.PHASE]
        life = move.before[at + model.LIFE]
        if step.what == "crashes":
            self._instances[me].kill()
            self._end(me, -signal.SIGKILL)
        elif step.what in (Event.EXITED.name, Event.DEADLINE_PASSED.name):
            self._instances[me].begin("event", step.what)
            self._end(me, 0)
        else:
            self._step(move, me, life, phase)

    def _step(self, move: Move, me: int, life: int, phase: int) -> None:
        what = move.step.what
        after = _STOPS_AT.get(move.after[HEAD + SIZE * me + model.PHASE], "done")
        if what in _GO:
            self._expect(me, after, "go")
        elif what in ("inherits", "misses the old instance"):
            assert self._instances[me].end() == after
        elif what == "answers the request":
            self._expect(me, "handled", "handle")
        elif what == Event.REPLACED.name:
            self._instances[me].call("handle")
        elif what == "notices the end of the new instance":
            takes_back = move.after[HEAD + SIZE * me + model.PHASE] == model.TAKE_BACK
            self._expect(me, "claim" if takes_back else "done", "new_instance_ended")
        elif what == "takes its name back":
            self._expect(me, "done", "go")
        elif what == "cannot tell":
            self._give_up(me)
            self._expect(me, "done", "event", Event.TAKEOVER_TIMED_OUT.name)
        else:
            looks = life == model.WAITING or phase == model.CHECK
            if what == Event.NEWER_STARTED.name and looks:
                self._is_refused(me, "Overtaken")
            elif life in (model.WAITING, model.STARTING, model.HOLDING):
                self._leave_gate(move, me, life, phase)
            expected = "look" if what == Event.READY.name else "done"
            self._expect(me, expected, "event", what)

    def _is_refused(self, me: int, kind: str) -> None:
        """Let the product look, at the tickets or at the directory, and give up because of it."""
        try:
            came = self._instances[me].call("go")
        except Told as error:
            assert error.kind == kind, error  # noqa: PT017 -- a call that goes on is wrong
        else:
            raise AssertionError(f"instance {me} goes on, and is not refused ({kind}): {came}")

    def _leave_gate(self, move: Move, me: int, life: int, phase: int) -> None:
        """End what the product waits for, so that the driver hears of an event."""
        if phase == model.RECEIVE:
            os.kill(self._instances[me].pid, signal.SIGUSR1)
            with contextlib.suppress(Told):
                if self._instances[me].end() in ("connect", "look"):  # it had noticed by itself
                    self._give_up(me)
        elif self._is_homeless(move.before, me, phase):
            self._is_refused(me, "TakeoverError")
        elif life == model.WAITING or phase in _AT_GATE:
            assert phase != model.CLAIM
            self._give_up(me)

    def _is_homeless(self, before: bytes, me: int, phase: int) -> bool:
        """Whether it comes next to a name in a directory that is not that of its locks."""
        at = HEAD + SIZE * me
        return (
            phase in (model.CONNECT, model.CLAIM)
            and before[at + model.HOME] != before[model.DIRECTORY]
        )

    def _give_up(self, me: int) -> None:
        with contextlib.suppress(Told):
            raise AssertionError(self._instances[me].call("give_up"))

    def _expect(self, me: int, expected: str, verb: str, *args: object) -> None:
        came = self._instances[me].call(verb, *args)
        assert came == expected, f"instance {me}, {verb} {args}: {came}, not {expected}"

    def _end(self, me: int, status: int) -> None:
        assert self._instances[me].wait() == status
        self._statuses[me] = status

    # -- comparison ----------------------------------------------------------------------------

    def compare(self, world: bytes) -> None:
        """Raise AssertionError if the processes do not stand as the model does."""
        for me in range(len(self._instances)):
            self._compare_instance(world, me)
        self._compare_name(world[model.NAME])
        self._compare_claim(world)

    def compare_service(self, world: bytes) -> None:
        """Raise AssertionError if another instance answers than in the model, or none."""
        instances = [
            (instance.pid, world[HEAD + SIZE * me + model.OWNS])
            for me, instance in enumerate(self._instances)
        ]
        accepting = {pid for pid, owns in instances if owns & model.ACCEPTS}
        if accepting:
            with connect(self._address) as sock:
                assert answer(sock) in accepting
        elif not any(owns & (model.LISTENER | model.ANSWERED) for _, owns in instances):
            host, port = self._address.rsplit(":", 1)
            with socket.socket() as sock:
                assert sock.connect_ex((host, int(port))) != 0

    def _compare_instance(self, world: bytes, me: int) -> None:
        at = HEAD + SIZE * me
        life = world[at + model.LIFE]
        if life in model.OVER:
            crashed = life == model.CRASHED
            assert self._statuses[me] == (-signal.SIGKILL if crashed else 0)
            return
        assert me not in self._statuses
        assert self._instances[me].running
        if world[at + model.PHASE] == model.RECEIVE:
            return  # it waits in the product for an answer
        status = self._instances[me].call("status")
        assert status["state"] == STATES[life].name
        assert status["accepts"] == bool(world[at + model.OWNS] & model.ACCEPTS)
        assert status["has listener"] or not status["accepts"]
        if world[at + model.PHASE] != model.TELL:  # the name is claimed, but not yet owned
            assert status["has name"] == (world[model.NAME] == me + 1)

    def _compare_name(self, name: int) -> None:
        path = self._directory / PARENT_SOCKET
        assert path.exists() == (name != model.NOBODY)
        if name == model.NOBODY:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(str(path))
                answers = True
            except ConnectionRefusedError:
                answers = False
        assert answers == (name != model.DEAD)

    def _compare_claim(self, world: bytes) -> None:
        """Who is between a look at the name and its claim has the lock for that."""
        if not world[model.DIRECTORY]:
            return
        claiming = {
            self._instances[me].pid
            for me in range(len(self._instances))
            if world[HEAD + SIZE * me + model.HOME] == world[model.DIRECTORY]
            and world[HEAD + SIZE * me + model.OWNS] & model.CLAIMING
        }
        file = _LockFile.of(self._directory / LOCK)
        try:
            holder = file.holder(_CLAIM, 1)
        finally:
            file.close()
        assert claiming == ({holder.pid} if holder is not None else set())
