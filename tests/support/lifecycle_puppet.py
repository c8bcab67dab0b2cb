"""A driver of the lifecycle table without a server: a real `HotRestart` that takes single steps.

The code of the takeover is the product's, and it runs up to the next gate: a place where another
process can see what comes next. There it waits until it is told to go on, or to give up. Timers
end on command, so nothing here waits for time to pass.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from hotrestart_plugins import ChildExitAction, HotRestart, Role
from hotrestart_plugins.core import hot_restart, locks, rendezvous, takeover_client, takeover_server
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.datagram import Endpoint, Packet, Sender
from hotrestart_plugins.core.listeners import OwnedPath
from hotrestart_plugins.core.locks import DirectoryLocks
from hotrestart_plugins.core.parent_connection import ParentConnection
from hotrestart_plugins.core.rendezvous import RendezvousDirectory
from hotrestart_plugins.core.takeover_client import TakeoverClient
from hotrestart_plugins.core.takeover_server import TakeoverServer
from hotrestart_plugins.errors import HotRestartError, NoAnswer
from hotrestart_plugins.lifecycle.table import Action, Event, Lifecycle
from tests.support.puppet import Puppet, main

_TIMEOUT = 30.0  # seconds: longer than a test takes, since timers end on command


class LifecyclePuppet(Puppet):
    """One instance: the table, what it does about it, and the line to whoever holds the strings."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__(line)
        self.lifecycle = Lifecycle()
        self.waits_for_answer = False
        self.dropped = False
        signal.signal(signal.SIGUSR1, self._give_up)
        _put_in_gates(self)

    # -- the commands --------------------------------------------------------------------------

    def start(self, directory: str, address: str) -> str:
        """Find out whether somebody serves, and inherit or bind the listener: up to ready."""
        self.hot = _GatedHotRestart(takeover_timeout=_TIMEOUT)
        self.hot.initialize(directory, 1)
        self.socks[address] = self.hot.listen([address])[0]
        return "booted"

    def handle(self) -> str:
        """Read one message that counts."""
        role = self.hot.role
        self.dropped = True
        while self.dropped:  # what a process that has ended had sent is dropped on the way
            self.dropped = False
            self.hot.handle()
        if self.hot.role is Role.REPLACED and role is not Role.REPLACED:
            return self.event(Event.REPLACED.name)
        return "handled"

    def new_instance_ended(self) -> str:
        """The pidfd of the new instance is readable."""
        action = self.hot.child_ended()
        assert self.hot.child is None, "what it had said was still to be read"
        left = action is ChildExitAction.LEAVE
        return self.event((Event.NEW_INSTANCE_LEFT if left else Event.NEW_INSTANCE_CRASHED).name)

    def event(self, name: str) -> str:
        """Let the lifecycle hear an event, and do what it says."""
        for action in self.lifecycle.handle(Event[name]):
            self._act(action)
        if Event[name] is Event.EXITED:
            self.ended = True
        return "done"

    def claim_within(self, seconds: float) -> None:
        """From now on a claim is good for so long."""
        locks._CLAIM_TIME = seconds

    def status(self) -> dict[str, Any]:
        """How this instance stands."""
        return {
            "state": self.lifecycle.state.name,
            "accepts": self.accepting,
            "has name": self.hot.fileno() >= 0 and _has_name(self.hot),
            "has listener": bool(self.socks),
        }

    # -- what the table asks for ---------------------------------------------------------------

    def _act(self, action: Action) -> None:
        if action is Action.COMMIT:
            self.hot.ready()
        elif action in (Action.ACCEPT, Action.ACCEPT_AGAIN):
            self.accepting = True
        elif action is Action.STOP_ACCEPTING:
            self.accepting = False
        elif action is Action.STAND_DOWN:
            self.hot.stand_down()
            for address in self.hot.listeners:
                self.hot.drop(address)
            self._close_socks()
        elif action in (Action.EXIT, Action.EXIT_FAILED):
            self.close({"crashed": action is Action.EXIT_FAILED})
        elif action is Action.EXIT_NOW:
            os._exit(0)
        else:
            # The driver's own affair: the app is booted, and requests end, without a directory.
            assert action in (Action.BOOT, Action.DRAIN, Action.FINISH_DRAINING, Action.ABORT)

    # -- gates ---------------------------------------------------------------------------------

    def pause(self, gate: str) -> None:
        """Say which gate this is, and wait; raises NoAnswer if told to give up."""
        self._say("result", gate)
        while True:
            verb, *args = json.loads(self._line())
            if verb == "go":
                return
            if verb == "give_up":
                raise NoAnswer("a timeout has ended")
            assert verb in ("status", "claim_within"), verb
            self._say("result", getattr(self, verb)(*args))

    def _give_up(self, _number: int, _frame: FrameType | None) -> None:
        if self.waits_for_answer:
            raise NoAnswer("a timeout has ended")

    def go(self) -> None:
        """Only at a gate."""
        raise AssertionError("this instance is at no gate")

    # -- between two steps ---------------------------------------------------------------------

    def run(self) -> None:
        while not self.ended:
            verb, *args = json.loads(self._line())
            try:
                self._say("result", getattr(self, verb)(*args))
            except (HotRestartError, AssertionError) as error:
                self._say("error", type(error).__name__, str(error))

    def _line(self) -> bytes:
        """The next command; connections are answered meanwhile, where this instance accepts."""
        while b"\n" not in self.received:
            poll = select.poll()
            poll.register(self.line, select.POLLIN)
            if self.accepting:
                for sock in self.socks.values():
                    poll.register(sock, select.POLLIN)
            for fd, _ in poll.poll():
                if fd != self.line.fileno():
                    self._accept()
                    continue
                more = self.line.recv(65536)
                if not more:
                    os._exit(0)
                self.received += more
        first, _, self.received = self.received.partition(b"\n")
        return first


def _has_name(hot: HotRestart) -> bool:
    server = hot._server
    return server is not None and server._owned_path.holds()


_puppet: LifecyclePuppet


def _put_in_gates(puppet: LifecyclePuppet) -> None:
    """Have this process, and no other, stop at gates; it handles one message at a time."""
    global _puppet  # noqa: PLW0603 -- one instance is one process
    _puppet = puppet
    gated: list[tuple[ModuleType, str, type]] = [
        (rendezvous, "DirectoryLocks", _GatedLocks),
        (hot_restart, "RendezvousDirectory", _GatedDirectory),
        (hot_restart, "TakeoverClient", _GatedClient),
        (takeover_client, "ParentConnection", _GatedConnection),
        (takeover_client, "TakeoverServer", _GatedServer),
    ]
    for module, name, kind in gated:
        assert issubclass(kind, getattr(module, name))
        setattr(module, name, kind)
    takeover_server._BATCH = 1
    locks._CLAIM_TIME = _TIMEOUT


class _GatedLocks(DirectoryLocks):
    def take_turn(
        self,
        seconds: float,
        waiting: Callable[[int], None] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        _puppet.pause("turn")
        super().take_turn(seconds, waiting, check)
        _puppet.event(Event.TURN_CAME.name)


class _GatedDirectory(RendezvousDirectory):
    def bind_child(
        self, seconds: float, check: Callable[[], None] = lambda: None
    ) -> tuple[Endpoint, OwnedPath]:
        _puppet.pause("connect")
        return super().bind_child(seconds, check)

    def claim_parent(
        self, then: Callable[[], None], check: Callable[[], None] = lambda: None
    ) -> tuple[Endpoint, OwnedPath]:
        _puppet.pause("claim")

        def tell() -> None:
            if _puppet.hot.role is Role.CHILD:
                _puppet.pause("tell")
            then()

        return super().claim_parent(tell, check)


class _GatedConnection(ParentConnection):
    def _send(self, wanted: Address, deadline: float) -> str:
        _puppet.pause("ask")
        refused = super()._send(wanted, deadline)
        if not refused:
            _puppet.waits_for_answer = True
            _puppet._say("result", "asked")
        return refused

    def _receive(self, wanted: Address, deadline: float, refused: str) -> Packet:
        try:
            return super()._receive(wanted, deadline, refused)
        finally:
            _puppet.waits_for_answer = False


class _GatedClient(TakeoverClient):
    depth = 0
    takes_over = False

    def take_over(self) -> TakeoverServer:
        _puppet.pause("look")
        self.takes_over = True
        return super().take_over()

    def _give_way(self) -> None:
        if self.takes_over and not self.depth:
            _puppet.pause("check")
        super()._give_way()

    def _parent_gone(self, connection: ParentConnection) -> None:
        _puppet.pause("connect")
        self.depth += 1
        try:
            super()._parent_gone(connection)
        finally:
            self.depth -= 1
        if self.takes_over and not self.depth:
            _puppet.pause("look")


class _GatedServer(TakeoverServer):
    def _drop(self, sender: Sender, why: str, fault: Exception | None = None) -> None:
        _puppet.dropped = True
        super()._drop(sender, why, fault)


class _GatedHotRestart(HotRestart):
    def _bind(
        self, address: Address, backlog: int, mode: int | None, *, v6only: bool | None
    ) -> socket.socket:
        _puppet.pause("bind")
        return super()._bind(address, backlog, mode, v6only=v6only)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]), LifecyclePuppet)
