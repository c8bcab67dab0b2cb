"""HotRestart: one instance's part in a takeover of listeners, from either side.

The host, be it asyncio, gunicorn's arbiter or a plain loop, owns the waiting. It waits until
`HotRestart.fileno()` is readable and calls `HotRestart.handle()`; no thread and no loop runs here.
One object serves one thread. After a fork the child's copy closes itself, and touches nothing of
the other process's.

A new instance is a `TakeoverClient` until it serves, and a `TakeoverServer` from then on.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable
from pathlib import Path

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.bind import DEFAULT_BACKLOG, bind_before, bind_fresh
from hotrestart_plugins.core.events import Logger
from hotrestart_plugins.core.journal import Journal, journal_of
from hotrestart_plugins.core.listeners import ListenerRegistry, OwnedPath
from hotrestart_plugins.core.rendezvous import RendezvousDirectory
from hotrestart_plugins.core.roles import ChildExitAction, InstanceState, Role, TerminatePolicy
from hotrestart_plugins.core.takeover_client import TakeoverClient
from hotrestart_plugins.core.takeover_server import Child, TakeoverServer
from hotrestart_plugins.errors import (
    AddressError,
    ConfigurationError,
    RendezvousError,
    WrongDescriptor,
)

__all__ = ["DEFAULT_HOT_RESTART", "ChildExitAction", "HotRestart", "Role", "TerminatePolicy"]

_alive: weakref.WeakSet[HotRestart] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for hot in list(_alive):
        hot.disown()


os.register_at_fork(after_in_child=_after_fork_in_child)


class HotRestart:
    """One instance's part in a takeover of listeners."""

    def __init__(
        self,
        *,
        takeover_timeout: float = 30.0,
        turn_timeout: float | None = None,
        terminate_policy: TerminatePolicy = TerminatePolicy.READY,
        logger: Logger | Journal | None = None,
    ) -> None:
        """Nothing is opened yet.

        `takeover_timeout`: seconds to wait for each answer. `turn_timeout`: seconds to wait for
        this instance's turn, while another one takes over; None: as long as for an answer.
        `logger`: where events are logged, or the journal that they are emitted to.
        """
        self.takeover_timeout = takeover_timeout
        self.turn_timeout = takeover_timeout if turn_timeout is None else turn_timeout
        self._terminate_policy = terminate_policy
        self._journal = journal_of(logger)
        self._state = InstanceState()
        self._registry = ListenerRegistry()
        self._expected = 0
        # At most one of them is there: neither before `initialize`, nor after `close`.
        self._client: TakeoverClient | None = None
        self._server: TakeoverServer | None = None

    @property
    def role(self) -> Role:
        """Where in its life this instance is."""
        return self._state.role

    @property
    def parent_pid(self) -> int:
        """The pid of the instance taken over from, once it has answered; 0 if there is none."""
        return self._state.parent_pid

    @property
    def takeover_id(self) -> int:
        """Names this instance as a child; see `RendezvousDirectory`. 0 if it is none."""
        return self._state.takeover_id

    @property
    def inherited(self) -> frozenset[str]:
        """The addresses whose listeners came from the parent."""
        return frozenset(self._registry.inherited)

    @property
    def listeners(self) -> tuple[str, ...]:
        """The addresses that are registered."""
        return self._registry.names

    # -- the new instance ----------------------------------------------------------------------

    def initialize(self, sock_dir: str | os.PathLike[str], listener_num: int = 0) -> Role:
        """Meet in `sock_dir`: become the child of the instance that serves, or the first parent.

        `listener_num` is how many listeners this instance will have; 0: not told, and then
        `TerminatePolicy.INHERITED` cannot be reached. Waits for its turn, `turn_timeout` seconds
        at most. Raises Overtaken if a newer instance was started meanwhile, RendezvousError, Busy,
        NoAnswer; leaves nothing open then.
        """
        if self._state.role is not Role.NEW:
            return self.role
        rendezvous = RendezvousDirectory(Path(sock_dir))
        try:
            self._client = TakeoverClient(
                rendezvous,
                state=self._state,
                registry=self._registry,
                journal=self._journal,
                turn_timeout=self.turn_timeout,
                takeover_timeout=self.takeover_timeout,
            )
        except OSError as error:
            rendezvous.close()
            raise _unusable(rendezvous.directory, error) from error
        except BaseException:
            rendezvous.close()
            raise
        self._expected = listener_num
        _alive.add(self)
        if self.role is Role.INITIAL and self._terminate_policy is TerminatePolicy.INHERITED:
            self._take_over(self._client)
        return self.role

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
            if self._terminate_policy is TerminatePolicy.READY and self._client is not None:
                self._client.inherit(wanted, found)
            for address in wanted[len(found) :]:
                client = self._client
                if client is None:
                    break
                client.inherit([address], found)
                if 0 < self._expected == len(client.asked):
                    self._take_over(client)
        except BaseException:
            for sock in found:
                if sock is not None:
                    sock.close()
            raise
        return found + [None] * (len(wanted) - len(found))

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
        sought = [text if isinstance(text, Address) else _address_of(text) for text in wanted]
        found = self._inherit(sought)
        made: list[socket.socket] = []
        files: list[OwnedPath] = []
        try:
            for number, address in enumerate(sought):
                sock = found[number]
                if sock is None:
                    sock = found[number] = self._bind(address, backlog, mode, v6only=v6only)
                    if address.path is not None:
                        files.append(OwnedPath(address.path))
                self.register_listener_fd(address.name, sock.fileno())
                made.append(sock)
        except BaseException:
            for address, opened in zip(sought, found, strict=True):
                self._registry.forget(address.name)
                if opened is not None:
                    opened.close()
            for file in files:
                file.release()
            raise
        return made

    def _bind(
        self, address: Address, backlog: int, mode: int | None, *, v6only: bool | None
    ) -> socket.socket:
        deadline, directory = 0.0, Path()
        if self._client is not None:
            deadline, directory = self._client.bind_deadline, self._client.directory
        elif self._server is not None:
            directory = self._server.directory
        else:
            return bind_fresh(address, backlog=backlog, mode=mode, v6only=v6only)
        return bind_before(
            deadline, directory, self._journal, address, backlog=backlog, mode=mode, v6only=v6only
        )

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
        self._registry.disclaim_path(bound.name)

    def register_listener_fd(self, addr: str, fd: int) -> None:
        """Hand `fd` to whoever asks for `addr`. A duplicate is kept; `fd` stays the caller's."""
        path = _address_of(addr).path if addr.startswith("/") else None
        self._registry.register(addr, fd, path)

    def drop(self, addr: str) -> None:
        """No longer hand this listener on; its path goes if no other instance has the listener.

        The caller's own descriptor stays the caller's.
        """
        self._registry.drop(addr, self._shares)

    def _shares(self, name: str) -> bool:
        """Whether another instance has the listener, or will need it."""
        side = self._client or self._server
        return side is not None and side.shares(name)

    # -- from the new instance to the running one ----------------------------------------------

    def ready(self) -> None:
        """This instance serves: answer from now on, and tell the parent, if any, to go.

        Raises Overtaken if a newer instance was started, and somebody serves: close this one, the
        newer one takes over. Raises ConfigurationError if fewer listeners are registered than were
        announced, and NoAnswer if the parent cannot be told; the parent has its name back then.
        Calling it again does nothing.
        """
        if self._client is None:
            return
        registered = len(self._registry.names)
        if registered < self._expected:
            raise ConfigurationError(
                f"ready with {registered} of {self._expected} listeners: register the others"
            )
        self._take_over(self._client)

    def _take_over(self, client: TakeoverClient) -> None:
        try:
            self._server = client.take_over()
        except OSError as error:
            raise _unusable(client.directory, error) from error
        self._client = None

    # -- the running instance ------------------------------------------------------------------

    @property
    def child(self) -> Child | None:
        """The process that is taking over from this instance, or has. Owned here."""
        return None if self._server is None else self._server.child

    def fileno(self) -> int:
        """The parent socket's descriptor: when it is readable, call `handle`. -1: none."""
        return -1 if self._server is None else self._server.fileno()

    def handle(self) -> bool:
        """Answer what has come, without waiting; whether there may be more.

        Look at `role` afterwards: `Role.REPLACED` means stop accepting, drain, and stand by. Look
        at `child`: once there is one, watch it. Never raises for anything that was received.
        """
        return self._server is not None and self._server.handle()

    def forget_child(self) -> None:
        """Stop watching the child."""
        if self._server is not None:
            self._server.forget_child()

    def child_ended(self) -> ChildExitAction:
        """Say what the end of the child means; take the name back on `ChildExitAction.RESUME`.

        Call it when `child.fileno()` is readable, or `child.alive` is false. Raises OSError or
        RendezvousError, and changes nothing, while there is no telling: call it again later.
        """
        return ChildExitAction.NOTHING if self._server is None else self._server.child_ended()

    def stand_down(self) -> None:
        """The rollback window is over: never take the name back, and never serve again.

        From then on `child_ended` returns `ChildExitAction.LEAVE`, also after a crash.
        """
        if self._server is not None:
            self._server.stand_down()

    # -- the end -------------------------------------------------------------------------------

    def close(self, *, crashed: bool = False) -> None:
        """Close every descriptor; unlink what is this instance's own and nobody else's.

        Unix listeners' paths go if no other instance has the listener. `crashed`: this instance
        fails rather than ends on purpose, so one that stands by shall serve again: the dead
        parent socket stays as the sign of it.
        """
        if self.role in (Role.NEW, Role.CLOSED):
            return
        self._registry.close(self._shares)
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            self._server.close(crashed=crashed)
        self._end()

    def disown(self) -> None:
        """In a forked child: close the copies; names and locks are the other process's.

        Called by itself after each fork.
        """
        if self.role is Role.CLOSED:
            return
        self._registry.disown()
        if self._client is not None:
            self._client.disown()
        if self._server is not None:
            self._server.disown()
        self._end()

    def _end(self) -> None:
        self._client = self._server = None
        self._state.become(Role.CLOSED)
        _alive.discard(self)


def _address_of(text: str) -> Address:
    """The address of a name on the wire, or of what a user writes if it names only one."""
    if text.startswith(("/", "@")):
        return addresses.unix(text)
    found = addresses.parse(text)
    if len(found) > 1:
        names = ", ".join(str(address) for address in found)
        raise AddressError(f"{text} stands for several addresses, ask for each: {names}")
    return found[0]


def _unusable(directory: Path, error: OSError) -> RendezvousError:
    return RendezvousError(
        f"{directory} cannot be used to meet in: {error.strerror}: pass another --hot-restart-dir"
    )


DEFAULT_HOT_RESTART = HotRestart()
"""The process-wide instance."""
