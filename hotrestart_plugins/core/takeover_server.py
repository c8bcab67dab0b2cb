"""The running instance's side of a takeover: answer, watch the new instance, take the name back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hotrestart_plugins.core import credentials, events
from hotrestart_plugins.core.datagram import Endpoint, Packet, Sender
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.core.listeners import ListenerRegistry, OwnedPath
from hotrestart_plugins.core.locks import Ticket
from hotrestart_plugins.core.messages import (
    PassFdRequest,
    PassFdResponse,
    TerminateParentRequest,
    parse,
)
from hotrestart_plugins.core.platform import ProcessWatch
from hotrestart_plugins.core.rendezvous import CHILD_SOCKET, RendezvousDirectory
from hotrestart_plugins.core.roles import ChildExitAction, InstanceState, Role
from hotrestart_plugins.errors import (
    Busy,
    HotRestartError,
    MessageError,
    TakeoverError,
    WrongPeer,
)

_BATCH = 64  # datagrams that one handle() reads, so that a flood cannot starve the host's loop
_QUEUE = 4096  # datagrams after which a child's last word was read: a queue is shorter (512 at most
# by default), so that those who flood it meanwhile cannot keep this instance here
_LOUD_DROPS = 5  # datagrams in a row that are complained of aloud; the rest at debug level


class Child:
    """The process that asks this one for its listeners. Owns a pidfd of it, if there is one."""

    def __init__(self, pid: int, takeover_id: int, succeeded: Callable[[], bool]) -> None:
        """`pid`: 0 for a process of another pid namespace, which cannot be watched.

        `takeover_id`: see `RendezvousDirectory.child_takeover_id`. `succeeded`: for a process that
        cannot be watched, see `RendezvousDirectory.succeeded`.
        """
        self.pid = pid
        self.takeover_id = takeover_id
        self.given: set[str] = set()
        """The addresses whose listeners it was given."""
        self._watch = ProcessWatch(pid)
        self._succeeded = succeeded
        self._gone = False

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends.

        -1 if there is none: then look at `alive` now and then.
        """
        return self._watch.fileno()

    @property
    def alive(self) -> bool:
        """Whether the process still runs; if it cannot be watched, whether anybody came after."""
        if not self._gone:
            ended = self._watch.ended()
            self._gone = not self._succeeded() if ended is None else ended
        return not self._gone

    def close(self) -> None:
        """Close the pidfd."""
        self._watch.close()


class TakeoverServer:
    """An instance that serves, or has been replaced.

    Owns the parent socket and its name, and keeps its ticket as long as it can serve.
    """

    def __init__(
        self,
        rendezvous: RendezvousDirectory,
        ticket: Ticket,
        endpoint: Endpoint,
        owned_path: OwnedPath,
        *,
        state: InstanceState,
        registry: ListenerRegistry,
        journal: Journal,
    ) -> None:
        """Take `rendezvous`, `ticket` and `endpoint` into this object's ownership.

        `endpoint` is bound to `owned_path`, the parent's name.
        """
        self.directory: Path = rendezvous.directory
        self.child: Child | None = None
        """The process that is taking over from this instance, or has. Owned here."""
        self._rendezvous = rendezvous
        self._ticket = ticket
        self._endpoint = endpoint
        self._owned_path = owned_path
        self._state = state
        self._registry = registry
        self._journal = journal
        self._passed_on: frozenset[str] = frozenset()
        self._stood_down = False
        self._drops = 0

    # -- answers -------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The parent socket's descriptor."""
        return self._endpoint.fileno()

    def handle(self) -> bool:
        """Answer what has come, without waiting; whether there may be more."""
        return all(self._handle_next() for _ in range(_BATCH))

    def _handle_next(self) -> bool:
        """Answer the next datagram; False if there is none."""
        try:
            packet = self._endpoint.receive()
        except OSError as error:
            self._journal.emit(events.SOCKET_UNREADABLE, error=error)
            return False
        if packet is None:
            return False
        try:
            self._handle(packet)
        except HotRestartError as error:
            self._drop(packet.sender, str(error))
        except Exception as error:  # noqa: BLE001 -- whatever it is, this instance serves on
            self._drop(packet.sender, repr(error), fault=error)
        finally:
            packet.close()
        return True

    def _handle(self, packet: Packet) -> None:
        if packet.fault:
            raise MessageError(packet.fault)
        credentials.check(packet.sender.pid, packet.sender.uid)
        message = parse(packet.data)
        if packet.fd >= 0:
            raise MessageError("a descriptor that nobody asked for")
        path = packet.sender.path
        # By its last part: a Volo process may have been told of the directory by another path.
        if path != self._rendezvous.child_path and os.path.basename(path) != CHILD_SOCKET:
            raise WrongPeer("a message that does not come from the child socket")
        if isinstance(message, PassFdRequest):
            self._respond(message.address, packet.sender.pid)
        elif isinstance(message, TerminateParentRequest):
            self._terminate(packet.sender.pid)
        else:
            raise MessageError("an answer to a question that was not asked")
        self._drops = 0

    def _drop(self, sender: Sender, why: str, fault: Exception | None = None) -> None:
        self._drops += 1
        if self._drops <= _LOUD_DROPS and fault is not None:
            self._journal.emit(events.REQUEST_FAILED, pid=sender.pid, traceback=fault)
        elif self._drops <= _LOUD_DROPS:
            self._journal.emit(events.DATAGRAM_DROPPED, pid=sender.pid, reason=why)
        else:
            self._journal.emit(events.DATAGRAM_DROPPED_AGAIN, pid=sender.pid, reason=why)

    def _respond(self, name: str, pid: int) -> None:
        if self._state.role is not Role.PARENT:
            raise WrongPeer(f"a request for {name} after this instance was replaced")
        child = self._child_who_asks(name, pid)
        fd = self._registry.fd(name)
        try:
            self._endpoint.send(PassFdResponse().serialize(), fd=fd, to=self._rendezvous.child_path)
        except OSError as error:
            self._journal.emit(events.ANSWER_FAILED, pid=pid, address=name, error=error.strerror)
            return
        if fd >= 0:
            child.given.add(name)
            self._journal.emit(events.LISTENER_GIVEN, pid=pid, address=name)
        else:
            self._journal.emit(events.LISTENER_REFUSED, pid=pid, address=name)

    def _child_who_asks(self, name: str, pid: int) -> Child:
        """The process that asks for `name`; raises WrongPeer if it has ended.

        The answer to one that has ended would reach whoever asks from the child's name now.
        """
        takeover_id = self._rendezvous.child_takeover_id()
        child = self.child
        if child is not None and (child.pid, child.takeover_id) == (pid, takeover_id):
            if not child.alive:
                raise WrongPeer(f"its request for {name} comes from a process that has ended")
            return child
        child = Child(pid, takeover_id, self._rendezvous.succeeded)
        if not child.alive:
            child.close()
            raise WrongPeer(f"its request for {name} comes from a process that has ended")
        self.forget_child()
        self.child = child
        with contextlib.suppress(OSError):
            self._rendezvous.locks.stand_by()
        self._journal.emit(events.TAKEOVER_STARTED, pid=pid)
        if not pid:
            self._journal.emit(events.OTHER_PID_NAMESPACE)
        return child

    def _terminate(self, pid: int) -> None:
        if self._state.role is not Role.PARENT:
            return
        if self.child is None or self.child.pid != pid:
            raise WrongPeer(f"pid {pid} wants this instance to go, but never asked for a listener")
        self._state.become(Role.REPLACED)
        self._rendezvous.locks.stop_serving()
        self._passed_on = frozenset(self.child.given)
        self._journal.emit(events.REPLACED, pid=pid)
        for name in sorted(set(self._registry.names) - self._passed_on):
            self._journal.emit(events.ADDRESS_DROPPED, pid=pid, address=name)

    # -- the new instance's end ----------------------------------------------------------------

    def forget_child(self) -> None:
        """Stop watching the child."""
        if self.child is not None:
            self.child.close()
            self.child = None

    def child_ended(self) -> ChildExitAction:
        """Say what the end of the child means; take the name back on `ChildExitAction.RESUME`.

        A dead parent socket at the name says that the new instance crashed; no socket, that it was
        stopped on purpose, if the directory was not removed; a live one, that somebody serves. What
        the child said before its end is handled first: if it had told this instance to go, `role`
        is REPLACED from here on, and the next call says what its end means. Raises OSError or
        RendezvousError, and changes nothing, while there is no telling: call it again.
        """
        if self.child is not None and self.child.alive:
            return ChildExitAction.NOTHING  # another one asks by now: an earlier child has ended
        if self._state.role is Role.PARENT:
            return self._child_ended_early()
        pid = self.child.pid if self.child is not None else 0
        if self._stood_down:
            self.forget_child()
            self._journal.emit(events.NEW_INSTANCE_ENDED_LATE, pid=pid)
            return ChildExitAction.LEAVE
        with self._claim():
            # While that cannot be known (no descriptor is left to look with), the host calls again.
            left = self._is_served()
            failure = "" if left else self._take_back()
            if not left:
                self._rendezvous.locks.serve()
        self.forget_child()
        if left:
            self.stand_down()
            self._journal.emit(events.NEW_INSTANCE_LEFT, pid=pid)
            return ChildExitAction.LEAVE
        # Serving matters more than being found: this instance serves, whether it gets the name
        # or not, and the next instance says what is wrong with the directory.
        self._state.become(Role.PARENT)
        self._passed_on = frozenset()
        self._rendezvous.locks.stand_down()
        self._complain(failure)
        self._journal.emit(events.NEW_INSTANCE_CRASHED, pid=pid)
        return ChildExitAction.RESUME

    def _child_ended_early(self) -> ChildExitAction:
        """The child has ended, and this instance was not replaced, as far as it has heard."""
        for _ in range(_QUEUE):
            if not self._handle_next():
                break
        if self._state.role is not Role.PARENT or (self.child is not None and self.child.alive):
            return ChildExitAction.NOTHING
        if not self._owned_path.holds():
            with self._claim():
                # It died between claiming the name and saying so, and nobody took over from it.
                failure = "" if self._rendezvous.parent_answers() else self._take_back()
            self._complain(failure)
        pid = self.child.pid if self.child is not None else 0
        self.forget_child()
        self._rendezvous.locks.stand_down()
        self._journal.emit(events.NEW_INSTANCE_FAILED, pid=pid)
        return ChildExitAction.NOTHING

    @contextlib.contextmanager
    def _claim(self) -> Iterator[None]:
        """Let no new instance claim the name between a look at it and what is done about it.

        A process that was stopped in the middle of its own claim is not waited for: by then its
        claim has expired, and it looks again when it goes on.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._rendezvous.locks.claim())
            except (Busy, OSError) as error:
                self._journal.emit(events.CLAIM_NOT_EXCLUSIVE, error=error)
            yield

    def _is_served(self) -> bool:
        """Whether somebody serves, or the new instance was stopped on purpose."""
        rendezvous = self._rendezvous
        if rendezvous.parent_answers() or rendezvous.locks.another_serves():
            return True
        # A name that went with its directory says nothing of how the new instance has ended.
        return not os.path.lexists(rendezvous.parent_path) and rendezvous.locks.are_current()

    def _take_back(self) -> str:
        """Claim the name again; why that failed, or empty."""
        try:
            endpoint, owned_path = self._rendezvous.claim_parent(lambda: None)
        except (OSError, TakeoverError) as error:
            return str(error)
        self._endpoint.close()
        self._endpoint, self._owned_path = endpoint, owned_path
        return ""

    def _complain(self, failure: str) -> None:
        if failure:
            self._journal.emit(events.NAME_NOT_TAKEN_BACK, error=failure)

    def stand_down(self) -> None:
        """Never serve again, whatever becomes of the new instance.

        Its ticket goes too, so that it overtakes no older instance that can serve. An instance that
        has not been replaced serves on, and keeps its ticket; it only gives up its place in the
        line of those that stand by.
        """
        self._stood_down = self._state.role is Role.REPLACED
        if self._stood_down:
            self._ticket.close()
        with contextlib.suppress(OSError):
            self._rendezvous.locks.stand_down()

    # -- the end -------------------------------------------------------------------------------

    def shares(self, name: str) -> bool:
        """Whether another instance has this listener, or will need it."""
        if name in self._passed_on:
            return True
        return self.child is not None and name in self.child.given and self.child.alive

    def close(self, *, crashed: bool) -> None:
        """Close the parent socket. Its name goes, unless it is another instance's by now.

        `crashed`: the name stays, as the sign that an instance that stands by shall serve again.
        """
        if not crashed and self._state.role is not Role.REPLACED:
            self._owned_path.release()
        self.disown()

    def disown(self) -> None:
        """In a forked child: close the copies; the names and locks are the other process's."""
        self._endpoint.close()
        self.forget_child()
        self._ticket.close()
        self._rendezvous.close()
