"""The new instance's side of a takeover: find the parent, ask it, claim its name, tell it to go."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from hotrestart_plugins.core import events
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.datagram import SLICE, Endpoint
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.listeners import ListenerRegistry, OwnedPath
from hotrestart_plugins.core.locks import POLL_INTERVAL, ClaimExpired
from hotrestart_plugins.core.parent_connection import ParentConnection
from hotrestart_plugins.core.rendezvous import RendezvousDirectory
from hotrestart_plugins.core.roles import InstanceState, Role
from hotrestart_plugins.core.takeover_server import TakeoverServer
from hotrestart_plugins.errors import Busy, NoAnswer, Overtaken, ParentGone


class TakeoverClient:
    """An instance that has its turn, from its start until it serves.

    Owns its ticket, the turn, and the connection to the parent if there is a parent.
    """

    def __init__(
        self,
        rendezvous: RendezvousDirectory,
        *,
        state: InstanceState,
        registry: ListenerRegistry,
        journal: Journal,
        turn_timeout: float,
        takeover_timeout: float,
    ) -> None:
        """Take a ticket, wait for this instance's turn, and connect to whoever serves.

        `turn_timeout`: seconds to wait for the turn. `takeover_timeout`: seconds to wait for each
        answer. `rendezvous` passes into the ownership of this object, unless an error is raised:
        Overtaken, Busy, NoAnswer, RendezvousError, OSError.
        """
        self.directory: Path = rendezvous.directory
        self.bind_deadline = 0.0
        """Until when a killed instance's workers may hold an address; monotonic seconds."""
        self.asked: set[str] = set()
        """The addresses that the parent was asked for."""
        self._rendezvous = rendezvous
        self._state = state
        self._registry = registry
        self._journal = journal
        self._timeout = takeover_timeout
        self._connection: ParentConnection | None = None
        self._turn_timeout = turn_timeout
        self._ticket = rendezvous.take_ticket(turn_timeout)
        try:
            self._start()
        except BaseException:
            self._ticket.close()
            raise

    def _start(self) -> None:
        rendezvous = self._rendezvous
        deadline = time.monotonic() + self._turn_timeout
        rendezvous.locks.take_turn(self._turn_timeout, waiting=self._waiting, check=self._give_way)
        endpoint, owned_path = rendezvous.bind_child(
            max(0.0, deadline - time.monotonic()), check=self._give_way
        )
        connection = ParentConnection(rendezvous, endpoint, owned_path, self._timeout)
        try:
            found = self._find_parent(connection, time.monotonic() + self._timeout)
        except BaseException:
            connection.close()
            raise
        if found:
            self._connection = connection
            self._state.takeover_id = rendezvous.child_takeover_id()
            self._state.become(Role.CHILD)
            self._journal.emit(events.INSTANCE_FOUND, directory=rendezvous.directory)
        else:
            connection.close()
            self._state.become(Role.INITIAL)
            self._journal.emit(events.NO_INSTANCE_FOUND, directory=rendezvous.directory)
            if os.path.lexists(rendezvous.parent_path):  # of an instance that was killed
                self.bind_deadline = time.monotonic() + self._timeout

    def _waiting(self, holder: int) -> None:
        self._journal.emit(events.WAITING_FOR_TURN, seconds=self._turn_timeout, pid=holder)

    def _give_way(self) -> None:
        """Raise Overtaken if a newer instance was started, and still lives."""
        pid = self._ticket.newest()
        if pid is not None:
            raise Overtaken(pid)

    def _find_parent(self, connection: ParentConnection, deadline: float) -> bool:
        """Connect to the parent; wait for one that stands by to take its name back."""
        while True:
            self._rendezvous.check_locks()
            if connection.connect():
                return True
            pid = self._rendezvous.locks.standing_by()
            if pid is None:
                return False
            if time.monotonic() >= deadline:
                raise NoAnswer(f"pid {pid} stands by to serve again, but has not in time")
            self._give_way()
            time.sleep(SLICE / 10)

    def inherit(self, wanted: list[Address], found: list[socket.socket | None]) -> None:
        """Append the parent's listener for each of `wanted` to `found`, or None: bind it fresh.

        The caller closes them, also those that were found before an error: WrongDescriptor,
        WrongPeer, NoAnswer, Overtaken, TakeoverError.
        """
        first = len(found)
        while self._connection is not None and len(found) < first + len(wanted):
            try:
                self._ask(self._connection, wanted[len(found) - first :], found)
            except ParentGone:
                self._parent_gone(self._connection)
        found.extend([None] * (first + len(wanted) - len(found)))

    def _ask(
        self,
        connection: ParentConnection,
        wanted: list[Address],
        found: list[socket.socket | None],
    ) -> None:
        """Append the answer for each to `found`, as far as the parent gives any."""
        for address, sock in zip(wanted, connection.ask(wanted), strict=True):
            found.append(sock)
            pid = self._state.parent_pid = connection.parent_pid
            self.asked.add(address.name)
            if sock is None:
                self._journal.emit(events.LISTENER_MISSING, pid=pid, address=address)
            else:
                self._registry.inherited[address.name] = address
                self._journal.emit(events.LISTENER_RECEIVED, pid=pid, address=address)

    def _parent_gone(self, connection: ParentConnection) -> None:
        """Turn to the instance that stood by and serves again, if there is one, or go on alone.

        Alone, what was inherited lives on here. Another instance is asked again for what was
        inherited, the same sockets, to let it know that they are served here too.
        """
        ended = self._state.parent_pid or "unknown"
        self.bind_deadline = time.monotonic() + self._timeout
        if self._find_parent(connection, self.bind_deadline):
            self._journal.emit(events.OLD_INSTANCE_CHANGED, pid=ended)
            again: list[socket.socket | None] = []
            try:
                self.inherit(list(self._registry.inherited.values()), again)
            finally:
                for sock in again:
                    if sock is not None:
                        sock.close()
            return
        self._journal.emit(events.OLD_INSTANCE_ENDED, pid=ended)
        connection.close()
        self._connection = None
        self._state.become(Role.INITIAL)

    def take_over(self) -> TakeoverServer:
        """Claim the parent's name, tell the parent to go, and end the turn.

        The rendezvous and the ticket pass into the ownership of what is returned, unless an error
        is raised: Overtaken if a newer instance was started; NoAnswer if the parent cannot be told,
        and then it has its name back; Busy if another instance is about to claim the name, and does
        not; TakeoverError if an earlier question failed; OSError if the name cannot be claimed.
        """
        deadline = time.monotonic() + self._timeout
        while (claimed := self._claim(deadline)) is None:
            if self._connection is None or self._connection.parent_serves():
                time.sleep(POLL_INTERVAL)  # the claim has expired: let others have their look
            else:
                self._parent_gone(self._connection)
                deadline = time.monotonic() + self._timeout
        endpoint, owned_path, told = claimed
        self._state.become(Role.PARENT)
        if self._connection is not None:
            if told:
                self._journal.emit(events.TOOK_OVER, pid=self._state.parent_pid)
            else:
                self._journal.emit(events.OLD_INSTANCE_UNTOLD, pid=self._state.parent_pid)
            self._connection.close()
        self._rendezvous.locks.end_turn()
        return TakeoverServer(
            self._rendezvous,
            self._ticket,
            endpoint,
            owned_path,
            state=self._state,
            registry=self._registry,
            journal=self._journal,
        )

    def _claim(self, deadline: float) -> tuple[Endpoint, OwnedPath, bool] | None:
        """Claim the name, and tell the parent; None: it is gone, or the claim took too long.

        Nobody else looks at the name meanwhile. An instance that stands by, and sees that the
        parent has crashed, would take the name back and never hear of this one.
        """
        connection = self._connection
        told = False
        if connection is not None:
            connection.check()
        locks = self._rendezvous.locks
        with locks.claim(max(0.0, deadline - time.monotonic())) as claim:
            if connection is not None:
                # Else nobody serves: this instance is ready, and a newer one takes over from it.
                if not connection.parent_serves():
                    return None
                self._give_way()

            def tell() -> None:
                nonlocal told
                locks.serve()
                if connection is None:
                    return
                try:
                    told = connection.tell_to_go(min(deadline, claim.expires))
                except NoAnswer:
                    if time.monotonic() >= deadline:
                        raise
                    raise ClaimExpired from None

            try:
                return (*self._rendezvous.claim_parent(tell, claim.check), told)
            except BaseException as error:
                locks.stop_serving()
                if not isinstance(error, ClaimExpired):
                    raise
                if time.monotonic() < deadline:
                    return None
                raise Busy(
                    f"{self._rendezvous.parent_path} could not be claimed within "
                    f"{self._timeout:g} s: this machine is too busy; start again when it is less so"
                ) from None

    def shares(self, name: str) -> bool:
        """Whether the parent has this listener, too."""
        return (
            self._connection is not None
            and name in self._registry.inherited
            and self._rendezvous.parent_answers()
        )

    def close(self) -> None:
        """Close the connection, and give up the turn; the parent serves on."""
        if self._connection is not None:
            self._connection.close()
        self._ticket.close()
        self._rendezvous.close()

    def disown(self) -> None:
        """In a forked child: close the copies; the names and locks are the other process's."""
        if self._connection is not None:
            self._connection.disown()
        self._ticket.close()
        self._rendezvous.close()
