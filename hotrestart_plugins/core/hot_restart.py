"""HotRestart: the roles of an instance, and one takeover from either side.

The host, be it asyncio, gunicorn's arbiter or a plain loop, owns the waiting. It waits until
`HotRestart.fileno()` is readable and calls `HotRestart.handle()`; no thread and no loop runs here.
One object serves one thread. After a fork the child's copy is closed by itself and nothing of the
other process's is touched.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core import credentials
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.bind import DEFAULT_BACKLOG, bind_fresh
from hotrestart_plugins.core.datagram import SLICE, Endpoint, Packet, Sender
from hotrestart_plugins.core.events import Logger
from hotrestart_plugins.core.listeners import OwnedPath, RegisteredListener
from hotrestart_plugins.core.messages import (
    PassFdRequest,
    PassFdResponse,
    TerminateParentRequest,
    parse,
)
from hotrestart_plugins.core.rendezvous import CHILD_SOCKET, RendezvousDirectory
from hotrestart_plugins.core.takeover_client import TakeoverClient
from hotrestart_plugins.core.takeover_server import Child
from hotrestart_plugins.errors import (
    AddressError,
    ConfigurationError,
    HotRestartError,
    MessageError,
    NoAnswer,
    ParentGone,
    RendezvousError,
    WrongDescriptor,
    WrongPeer,
)

_BATCH = 64  # datagrams that one handle() reads, so that a flood cannot starve the host's loop
_LOUD_DROPS = 5  # datagrams in a row that are complained of aloud; the rest at debug level
_T = TypeVar("_T")


class Role(enum.Enum):
    """Where in its life an instance is."""

    NEW = "new"
    CHILD = "child"  # found a parent, and is taking over from it
    INITIAL = "first parent"  # found nobody, and is not ready yet
    PARENT = "parent"  # serves, and answers who asks
    REPLACED = "replaced"  # was told to go: drains, and stands by
    CLOSED = "closed"


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
    """Somebody else serves, or the successor was stopped on purpose."""


_alive: weakref.WeakSet[HotRestart] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for hot in list(_alive):
        hot.disown()


os.register_at_fork(after_in_child=_after_fork_in_child)


class HotRestart:
    """One instance's part in the handing over of listeners."""

    def __init__(
        self,
        *,
        takeover_timeout: float = 30.0,
        terminate_policy: TerminatePolicy = TerminatePolicy.READY,
        logger: Logger | None = None,
    ) -> None:
        """Nothing is opened yet.

        `takeover_timeout`: seconds to wait for this instance's turn, and for each answer.
        """
        self.role = Role.NEW
        self.child: Child | None = None
        """Who is taking over from this instance, or has. Owned here."""
        self.takeover_timeout = takeover_timeout
        self.parent_pid = 0
        """The pid of the instance taken over from, once it has answered; 0 if there is none."""
        self.takeover_id = 0
        """Names this instance as a child; see `RendezvousDirectory`. 0 if it is none."""
        self._terminate_policy = terminate_policy
        self._log: Logger = logger or logging.getLogger("hotrestart")
        self._rendezvous: RendezvousDirectory | None = None
        self._client: TakeoverClient | None = None
        self._endpoint: Endpoint | None = None
        self._owned_path: OwnedPath | None = None
        self._registered: dict[str, RegisteredListener] = {}
        self._expected = 0
        self._asked: set[str] = set()
        self._inherited: dict[str, Address] = {}
        self._passed_on: frozenset[str] = frozenset()
        self._bind_deadline = 0.0
        self._drops = 0

    # -- the child's side ----------------------------------------------------------------------

    def initialize(self, sock_dir: str | os.PathLike[str], listener_num: int = 0) -> Role:
        """Meet in `sock_dir`: become the child of who serves there, or the first parent.

        `listener_num` is how many listeners this instance will have; 0: not told, and then
        `TerminatePolicy.INHERITED` cannot be reached. Waits for its turn, `takeover_timeout`
        seconds at most. Raises RendezvousError, Busy, NoAnswer; leaves nothing open then.
        """
        if self.role is not Role.NEW:
            return self.role
        rendezvous = RendezvousDirectory(Path(sock_dir))
        deadline = time.monotonic() + self.takeover_timeout
        with contextlib.ExitStack() as undo:
            undo.callback(rendezvous.close)
            try:
                rendezvous.locks.take_turn(self.takeover_timeout, waiting=self._waiting)
                endpoint, owned_path = rendezvous.bind_child(max(0.0, deadline - time.monotonic()))
            except OSError as error:
                raise _unusable(rendezvous, error) from error
            client = TakeoverClient(rendezvous, endpoint, owned_path, self.takeover_timeout)
            undo.callback(client.close)
            found = self._find_parent(rendezvous, client, deadline)
            undo.pop_all()
        self._rendezvous, self._expected = rendezvous, listener_num
        _alive.add(self)
        if found:
            self._client = client
            self.takeover_id = rendezvous.child_takeover_id()
            self.role = Role.CHILD
            self._log.debug("An instance serves in %s: taking over from it", rendezvous.directory)
        else:
            client.close()
            self.role = Role.INITIAL
            self._log.debug("Nobody serves in %s", rendezvous.directory)
            if os.path.lexists(rendezvous.parent_path):  # of an instance that was killed
                self._bind_deadline = time.monotonic() + self.takeover_timeout
            if self._terminate_policy is TerminatePolicy.INHERITED:
                self._serve(lambda: None)
        return self.role

    def _waiting(self, holder: int) -> None:
        self._log.info("pid %s is not ready yet: waiting for this instance's turn", holder)

    def _find_parent(
        self, rendezvous: RendezvousDirectory, client: TakeoverClient, deadline: float
    ) -> bool:
        """Connect to the parent; wait for one that stands by to take its name back."""
        while not client.connect():
            pid = rendezvous.locks.standing_by()
            if pid is None:
                return False
            if time.monotonic() >= deadline:
                raise NoAnswer(f"pid {pid} stands by to serve again, but has not in time")
            time.sleep(SLICE / 10)
        return True

    def dup_parent_listener_sock(self, addr: str | Address) -> socket.socket | None:
        """The parent's listener bound to `addr`, or None: bind it fresh.

        None where this instance is the first, where the parent has no such listener, and where
        the parent has died meanwhile. The caller owns the socket: it has its own family and
        protocol, is non-blocking and close-on-exec. Register it under `addr`, or the next
        instance cannot have it.

        Raises WrongDescriptor, WrongPeer, NoAnswer; the parent is undisturbed by each.
        """
        return self._inherit([addr if isinstance(addr, Address) else _address_of(addr)])[0]

    def _inherit(self, wanted: list[Address]) -> list[socket.socket | None]:
        """The parent's listener for each, the caller's to close, or an error and none."""
        found: list[socket.socket | None] = []
        try:
            while self._client is not None and len(found) < len(wanted):
                rest = wanted[len(found) :]
                try:
                    self._ask(
                        self._client,
                        rest if self._terminate_policy is TerminatePolicy.READY else rest[:1],
                        found,
                    )
                except ParentGone:
                    self._parent_gone(self._client)
                if (
                    self._terminate_policy is TerminatePolicy.INHERITED
                    and len(self._asked) == self._expected
                ):
                    self._take_over()
        except BaseException:
            for sock in found:
                if sock is not None:
                    sock.close()
            raise
        return found + [None] * (len(wanted) - len(found))

    def _ask(
        self, client: TakeoverClient, wanted: list[Address], found: list[socket.socket | None]
    ) -> None:
        """Add the answer for each to what was `found`, as far as the parent gives any."""
        for one, sock in zip(wanted, client.ask(wanted), strict=True):
            found.append(sock)
            self.parent_pid = client.parent_pid
            self._asked.add(one.name)
            if sock is None:
                self._log.debug("pid %s has no listener on %s", self.parent_pid, one)
            else:
                self._inherited[one.name] = one
                self._log.debug("Inherited %s from pid %s", one, self.parent_pid)

    def _parent_gone(self, client: TakeoverClient) -> None:
        """Turn to the instance that stood by and serves again, if there is one, or go on alone.

        Alone, what was inherited lives on here. The other one is asked again for what was
        inherited, the same sockets, to let it know that they are served here too.
        """
        ended = self.parent_pid or "unknown"
        self._bind_deadline = time.monotonic() + self.takeover_timeout
        if self._find_parent(_open(self._rendezvous), client, self._bind_deadline):
            self._log.warning("pid %s has ended: taking over from the one that serves now", ended)
            for sock in self._inherit(list(self._inherited.values())):
                if sock is not None:
                    sock.close()
            return
        self._log.warning(
            "The instance taken over from (pid %s) has ended; this one goes on alone", ended
        )
        self._close_client()
        self.role = Role.INITIAL

    def listen(
        self,
        wanted: Iterable[str | Address],
        *,
        backlog: int = DEFAULT_BACKLOG,
        mode: int | None = None,
        v6only: bool | None = None,
    ) -> list[socket.socket]:
        """A listener for each address, inherited or bound fresh: all, or an error and none.

        Registers each; the caller owns the sockets. `backlog`, `mode` and `v6only` are for those
        bound fresh, see `bind.bind_fresh`. Raises AddressError, or what
        `dup_parent_listener_sock` raises; the parent is undisturbed then.
        """
        sought = [one if isinstance(one, Address) else _address_of(one) for one in wanted]
        found = self._inherit(sought)
        made: list[socket.socket] = []
        files: list[OwnedPath] = []
        try:
            for number, one in enumerate(sought):
                sock = found[number]
                if sock is None:
                    sock = found[number] = self._bind(one, backlog, mode, v6only=v6only)
                    if one.path is not None:
                        files.append(OwnedPath(one.path))
                self.register_listener_fd(one.name, sock.fileno())
                made.append(sock)
        except BaseException:
            for one, left in zip(sought, found, strict=True):
                self._forget(one.name)
                if left is not None:
                    left.close()
            for file in files:
                file.release()
            raise
        return made

    def _bind(
        self, one: Address, backlog: int, mode: int | None, *, v6only: bool | None
    ) -> socket.socket:
        waiting = False
        while True:
            try:
                return bind_fresh(one, backlog=backlog, mode=mode, v6only=v6only)
            except AddressError as error:
                cause = error.__cause__
                if self._rendezvous is None or getattr(cause, "errno", None) != errno.EADDRINUSE:
                    raise
                if time.monotonic() >= self._bind_deadline:
                    raise AddressError(
                        f"{error}, which is not to be reached in {self._rendezvous.directory}: "
                        "stop it, or pass the --hot-restart-dir that it was started with"
                    ) from cause
                if not waiting:
                    self._log.info("%s, which may be a worker of a killed instance: waiting", error)
            waiting = True
            time.sleep(SLICE / 10)

    def adopt(self, sock: socket.socket) -> None:
        """Register a listener that was not made here: systemd's, or one from the command line.

        The caller keeps the socket; a path that it is bound to stays with whoever made it. Raises
        WrongDescriptor if it does not listen, or if the parent serves the same address on another
        socket, whose clients would be lost.
        """
        if not addresses.is_listening(sock):
            raise WrongDescriptor(f"descriptor {sock.fileno()} is no listening stream socket")
        bound = addresses.of_socket(sock)
        theirs = self.dup_parent_listener_sock(bound)
        if theirs is not None:
            with theirs:
                if not addresses.same_socket(sock, theirs):
                    raise WrongDescriptor(
                        f"descriptor {sock.fileno()} is bound to {bound}, but pid "
                        f"{self.parent_pid} serves that address on another socket: stop it first"
                    )
        self.register_listener_fd(bound.name, sock.fileno())
        self._registered[bound.name].owned_path = None

    def register_listener_fd(self, addr: str, fd: int) -> None:
        """Hand `fd` to whoever asks for `addr`. A duplicate is kept; `fd` stays the caller's."""
        path = _address_of(addr).path if addr.startswith("/") else None
        try:
            listener = RegisteredListener(fd, path)
        except OSError as error:
            raise ConfigurationError(
                f"descriptor {fd} cannot be kept for {addr}: {error.strerror}"
            ) from error
        self._forget(addr)
        self._registered[addr] = listener

    def drop(self, addr: str) -> None:
        """No longer hand this listener on; its path goes if no other instance has the listener.

        The caller's own descriptor stays the caller's.
        """
        listener = self._registered.get(addr)
        if listener is not None and listener.owned_path is not None and self._is_last(addr):
            listener.owned_path.release()
        self._forget(addr)

    def _forget(self, name: str) -> None:
        listener = self._registered.pop(name, None)
        if listener is not None:
            listener.close()

    @property
    def inherited(self) -> frozenset[str]:
        """The addresses whose listeners came from the parent."""
        return frozenset(self._inherited)

    @property
    def listeners(self) -> tuple[str, ...]:
        """The addresses that are registered."""
        return tuple(self._registered)

    # -- becoming the parent -------------------------------------------------------------------

    def ready(self) -> None:
        """This instance serves: answer from now on, and tell the parent, if any, to go.

        Raises ConfigurationError if fewer listeners are registered than were announced, and
        NoAnswer if the parent cannot be told; the parent has its name back then. Calling it again
        does nothing.
        """
        if self.role not in (Role.CHILD, Role.INITIAL):
            return
        if len(self._registered) < self._expected:
            raise ConfigurationError(
                f"ready with {len(self._registered)} of {self._expected} listeners: "
                "register the others"
            )
        self._take_over()

    def _take_over(self) -> None:
        while self._client is not None:
            self._client.check()
            if self._client.parent_serves():
                break
            self._parent_gone(self._client)
        client = self._client
        if client is None:
            self._serve(lambda: None)
            return

        def tell() -> None:
            if client.tell_to_go():
                self._log.info("Took over from pid %s", self.parent_pid)
            else:
                self._log.warning("pid %s had ended before it was told to go", self.parent_pid)

        self._serve(tell)
        self._close_client()
        _open(self._rendezvous).locks.end_turn()

    def _serve(self, tell: Callable[[], None]) -> None:
        rendezvous = _open(self._rendezvous)
        try:
            self._endpoint, self._owned_path = rendezvous.claim_parent(tell)
        except OSError as error:
            raise _unusable(rendezvous, error) from error
        self.role = Role.PARENT
        if self._client is None:
            rendezvous.locks.end_turn()

    # -- the parent's side ---------------------------------------------------------------------

    def fileno(self) -> int:
        """The parent socket's descriptor: when it is readable, call `handle`. -1: none."""
        return -1 if self._endpoint is None else self._endpoint.fileno()

    def handle(self) -> bool:
        """Answer what has come, without waiting; whether there may be more.

        Look at `role` afterwards: `Role.REPLACED` means stop accepting, drain, and stand by. Look
        at `child`: once there is one, watch it. Never raises for anything that was received.
        """
        if self._endpoint is None:
            return False
        for _ in range(_BATCH):
            try:
                packet = self._endpoint.receive()
            except OSError as error:
                self._log.error("The parent socket cannot be read: %s", error)
                return False
            if packet is None:
                return False
            try:
                self._handle(packet)
            except HotRestartError as error:
                self._drop(packet.sender, str(error))
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
        if path != _open(self._rendezvous).child_path and os.path.basename(path) != CHILD_SOCKET:
            raise WrongPeer("a message that does not come from the child socket")
        if isinstance(message, PassFdRequest):
            self._respond(message.address, packet.sender.pid)
        elif isinstance(message, TerminateParentRequest):
            self._terminate(packet.sender.pid)
        else:
            raise MessageError("an answer to a question that was not asked")
        self._drops = 0

    def _drop(self, sender: Sender, why: str) -> None:
        self._drops += 1
        log = self._log.warning if self._drops <= _LOUD_DROPS else self._log.debug
        log("Dropped a datagram from pid %s: %s", sender.pid, why)

    def _respond(self, name: str, pid: int) -> None:
        if self.role is not Role.PARENT:
            raise WrongPeer(f"a request for {name} after this instance was replaced")
        takeover_id = _open(self._rendezvous).child_takeover_id()
        if self.child is None or (self.child.pid, self.child.takeover_id) != (pid, takeover_id):
            child = Child(pid, takeover_id, _open(self._rendezvous).succeeded)
            if not child.alive:
                # The answer would reach whoever asks from that name now.
                child.close()
                raise WrongPeer(f"its request for {name} comes from a process that has ended")
            self.forget_child()
            self.child = child
            with contextlib.suppress(OSError):
                _open(self._rendezvous).locks.stand_by()
            self._log.info("pid %s asks for this instance's listeners", pid)
            if not pid:
                self._log.warning(
                    "pid 0 is in another pid namespace: its end is noticed late; let both share one"
                )
        elif not self.child.alive:
            raise WrongPeer(f"its request for {name} comes from a process that has ended")
        listener = self._registered.get(name)
        try:
            _open(self._endpoint).send(
                PassFdResponse().serialize(),
                fd=listener.fd if listener is not None else -1,
                to=_open(self._rendezvous).child_path,
            )
        except OSError as error:
            self._log.warning("pid %s cannot be answered for %s: %s", pid, name, error.strerror)
            return
        if listener is not None:
            self.child.given.add(name)
        self._log.debug("Answered pid %s for %s: %s", pid, name, "given" if listener else "none")

    def _terminate(self, pid: int) -> None:
        if self.role is not Role.PARENT:
            return
        if self.child is None or self.child.pid != pid:
            raise WrongPeer(f"pid {pid} wants this instance to go, but never asked for a listener")
        self.role = Role.REPLACED
        self._passed_on = frozenset(self.child.given)
        self._log.info("pid %s has taken over", pid)
        for name in sorted(self._registered.keys() - self._passed_on):
            self._log.warning("pid %s does not listen on %s: it ends with this instance", pid, name)

    def forget_child(self) -> None:
        """Stop watching the child."""
        if self.child is not None:
            self.child.close()
            self.child = None

    def child_ended(self) -> ChildExitAction:
        """The child's pidfd is readable: what that means; takes back on `ChildExitAction.RESUME`.

        A dead parent socket at the name says that the successor crashed; no socket, that it was
        stopped on purpose; a live one, that somebody serves.
        """
        pid = self.child.pid if self.child is not None else 0
        if self.child is not None and self.child.alive:
            return (
                ChildExitAction.NOTHING
            )  # another asks meanwhile: it was the one before who ended
        self.forget_child()
        rendezvous = _open(self._rendezvous)
        if self.role is Role.PARENT:
            if self._owned_path is None or not self._owned_path.holds():
                self._take_back(rendezvous)  # it died between claiming the name and saying so
            rendezvous.locks.stand_down()
            self._log.warning("pid %s ended before it had taken over; serving on", pid)
            return ChildExitAction.NOTHING
        if rendezvous.parent_answers() or not os.path.lexists(rendezvous.parent_path):
            self.stand_down()
            self._log.info("pid %s has ended, and leaves nothing to serve again for", pid)
            return ChildExitAction.LEAVE
        self._take_back(rendezvous)
        rendezvous.locks.stand_down()
        self._log.error("pid %s died after it had taken over: this instance serves again", pid)
        return ChildExitAction.RESUME

    def _take_back(self, rendezvous: RendezvousDirectory) -> None:
        try:
            endpoint, owned_path = rendezvous.claim_parent(lambda: None)
        except OSError as error:
            # Serving matters more than being found: the next instance will say what is wrong.
            self._log.error("The parent socket cannot be taken back: %s", error)
            return
        self._close_endpoint()
        self._endpoint, self._owned_path = endpoint, owned_path
        self._passed_on = frozenset()
        self.role = Role.PARENT

    def stand_down(self) -> None:
        """The rollback window is over: no longer take the name back."""
        if self._rendezvous is not None:
            with contextlib.suppress(OSError):
                self._rendezvous.locks.stand_down()

    # -- the end -------------------------------------------------------------------------------

    def close(self, *, crashed: bool = False) -> None:
        """Close every descriptor; unlink what is this instance's own and nobody else's.

        Unix listeners' paths go if no other instance has the listener. `crashed`: this instance
        fails rather than ends on purpose, so one that stands by shall serve again: the dead
        parent socket stays as the sign of it.
        """
        if self.role in (Role.NEW, Role.CLOSED):
            return
        for name, listener in self._registered.items():
            if listener.owned_path is not None and self._is_last(name):
                listener.owned_path.release()
            listener.close()
        self._registered.clear()
        if crashed:
            self._owned_path = None
        self._close_client()
        self._close_endpoint()
        self.forget_child()
        _open(self._rendezvous).close()
        self._rendezvous = None
        self.role = Role.CLOSED
        _alive.discard(self)

    def _is_last(self, name: str) -> bool:
        """Whether no other instance holds, or will need, the listener."""
        if self.role is Role.CHILD and name in self._inherited:
            return not _open(self._rendezvous).parent_answers()
        if name in self._passed_on:
            return False
        return self.child is None or name not in self.child.given or not self.child.alive

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _close_endpoint(self) -> None:
        if self._owned_path is not None and self.role is not Role.REPLACED:
            self._owned_path.release()
        self._owned_path = None
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def disown(self) -> None:
        """In a forked child: close the copies; names and locks are the other process's.

        Called by itself after each fork.
        """
        for listener in self._registered.values():
            listener.close()
        self._registered.clear()
        if self._client is not None:
            self._client.disown()
        if self._endpoint is not None:
            self._endpoint.close()
        self._client = self._endpoint = self._owned_path = None
        self.forget_child()
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None
        self.role = Role.CLOSED


def _address_of(text: str) -> Address:
    """The address of a name on the wire, or of what a user writes if it names only one."""
    if text.startswith(("/", "@")):
        return addresses.unix(text)
    found = addresses.parse(text)
    if len(found) > 1:
        names = ", ".join(str(one) for one in found)
        raise AddressError(f"{text} stands for several addresses, ask for each: {names}")
    return found[0]


def _unusable(rendezvous: RendezvousDirectory, error: OSError) -> RendezvousError:
    return RendezvousError(
        f"{rendezvous.directory} cannot be used to meet in: {error.strerror}: "
        "pass another --hot-restart-dir"
    )


def _open(thing: _T | None) -> _T:
    if thing is None:
        raise ConfigurationError("call initialize() first, and nothing after close()")
    return thing


DEFAULT_HOT_RESTART = HotRestart()
"""The process-wide instance."""
