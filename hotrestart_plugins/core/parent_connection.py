"""The child's connection to its parent: one request, one answer, each with a deadline."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core import credentials
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.datagram import GONE, SLICE, Endpoint, Packet
from hotrestart_plugins.core.listeners import OwnedPath
from hotrestart_plugins.core.messages import (
    PassFdRequest,
    PassFdResponse,
    TerminateParentRequest,
    parse,
)
from hotrestart_plugins.core.rendezvous import RendezvousDirectory
from hotrestart_plugins.errors import (
    MessageError,
    NoAnswer,
    ParentGone,
    TakeoverError,
    WrongDescriptor,
    WrongPeer,
)

# Requests on their way at once; fewer if the queue of the parent is shorter.
_MAX_PENDING = 8


class ParentConnection:
    """What a child asks of its parent. Owns the child's endpoint and its name."""

    def __init__(
        self,
        rendezvous: RendezvousDirectory,
        endpoint: Endpoint,
        owned_path: OwnedPath,
        timeout: float,
    ) -> None:
        """`endpoint` is bound to the child's name; `connect` comes next.

        `timeout`: seconds to wait for each answer.
        """
        self.parent_pid = 0
        """By the kernel's word, once it has answered; 0 before."""
        self._rendezvous = rendezvous
        self._endpoint = endpoint
        self._owned_path = owned_path
        self._timeout = timeout
        self._broken = ""
        self._peer: OwnedPath | None = None

    def connect(self) -> bool:
        """Turn to whoever serves now; False if nobody does."""
        # Looked at before, so that whoever comes to the name in between counts as somebody else.
        with contextlib.suppress(FileNotFoundError):
            self._peer = OwnedPath(self._rendezvous.parent_path)
        self.parent_pid = 0
        return self._rendezvous.connect_to_parent(self._endpoint)

    def parent_serves(self) -> bool:
        """Whether the instance that this is connected to still answers, and at its name."""
        return self._peer is not None and self._peer.holds() and self._rendezvous.parent_answers()

    def check(self) -> None:
        """Raise TakeoverError if an earlier question failed: its answer may still come."""
        if self._broken:
            raise TakeoverError(f"this takeover has failed ({self._broken}): start again")

    def ask(self, wanted: Sequence[Address]) -> Iterator[socket.socket | None]:
        """The parent's listener bound to each address, the caller's to close; None: it has none.

        Answers come in the order of the requests, so several of these are on their way at once: a
        takeover of many listeners does not wait for each. The length of the parent's queue is
        unknown (net.unix.max_dgram_qlen when its socket was made: 10, or 512 under systemd): a
        request that finds no room is sent after the next answer. Raises ParentGone, NoAnswer,
        WrongPeer, WrongDescriptor; what was answered before has been yielded.
        """
        self.check()
        self._broken = "it was left in the middle"
        sent = 0
        refused = ""
        try:
            for number, one in enumerate(wanted):
                deadline = time.monotonic() + self._timeout
                while not refused and sent < min(len(wanted), number + _MAX_PENDING):
                    due = sent == number
                    try:
                        refused = self._send(wanted[sent], deadline if due else 0.0)
                    except NoAnswer:
                        if due:
                            raise
                        break  # no room; an answer to what was sent will make some
                    sent += not refused
                packet = self._receive(one, deadline, refused if sent <= number else "")
                fd = self._answer(packet)
                yield None if fd < 0 else self._checked(fd, one)
        except OSError as error:
            self._broken = str(error)
            raise TakeoverError(f"the running instance cannot be asked: {error}") from error
        except TakeoverError as error:
            # Of one that has ended no answer can come any more; it may be another's turn.
            self._broken = "" if isinstance(error, ParentGone) else str(error)
            raise
        self._broken = ""

    def _send(self, one: Address, deadline: float) -> str:
        """Ask for one listener; why nobody could be asked, or empty."""
        try:
            self._endpoint.send_before(PassFdRequest(one.name).serialize(), deadline)
        except TimeoutError:
            raise self._no_answer(one.name) from None
        except GONE as error:
            return error.strerror or str(error)
        return ""

    def _receive(self, one: Address, deadline: float, refused: str) -> Packet:
        """The next answer, which the caller closes; `refused`: why it was not even asked for."""
        if refused:
            raise ParentGone(f"cannot ask for {one}: {refused}")
        packet = self._endpoint.receive()
        while packet is None:
            packet = self._endpoint.receive_within(SLICE)
            if packet is None and not self.parent_serves():
                # Its last word may have come between the wait and the look.
                packet = self._endpoint.receive()
                if packet is None:
                    raise ParentGone(f"the parent ended before it had answered for {one}")
            if packet is None and time.monotonic() >= deadline:
                raise self._no_answer(one.name)
        return packet

    def _answer(self, packet: Packet) -> int:
        """The descriptor in an answer, which the caller owns, or -1."""
        pid = packet.sender.pid
        try:
            if packet.fault:
                raise WrongDescriptor(f"the answer of pid {pid} was {packet.fault}")
            credentials.check(packet.sender.pid, packet.sender.uid)
            message = parse(packet.data)
            if not isinstance(message, PassFdResponse):
                raise WrongPeer(f"pid {pid} answered with {message}")
        except MessageError as error:
            packet.close()
            raise WrongPeer(f"pid {pid} answered with {error}") from None
        except BaseException:
            packet.close()
            raise
        self.parent_pid = pid
        return packet.fd

    def _checked(self, fd: int, wanted: Address) -> socket.socket:
        """The socket of `fd`, which this takes over; raises WrongDescriptor and closes it."""
        try:
            sock = socket.socket(fileno=fd)  # family, type and protocol by the kernel's word
        except OSError:
            os.close(fd)
            raise WrongDescriptor(
                f"pid {self.parent_pid} sent a descriptor for {wanted} that is no socket"
            ) from None
        came = f"pid {self.parent_pid} sent"
        try:
            if not addresses.is_listening(sock):
                raise WrongDescriptor(f"{came} a socket for {wanted} that does not listen")
            if sock.getsockname() != wanted.sockaddr:  # which says nothing yet: port 0, @name
                bound = addresses.of_socket(sock)
                if not wanted.is_of(bound):
                    raise WrongDescriptor(f"{came} the listener of {bound} for {wanted}")
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def tell_to_go(self, deadline: float) -> bool:
        """Send TerminateParentRequest; False if the parent has ended. Raises NoAnswer, OSError.

        `deadline`: until when to wait for room in its queue; monotonic seconds.
        """
        try:
            self._endpoint.send_before(TerminateParentRequest().serialize(), deadline)
        except TimeoutError:
            raise self._no_answer("the request to go") from None
        except GONE:
            return False
        return True

    def _no_answer(self, name: str) -> NoAnswer:
        who = f"pid {self.parent_pid}" if self.parent_pid else "the running instance"
        return NoAnswer(
            f"{who} did not answer for {name} within {self._timeout:g} s: it is stopped or hangs, "
            "or is a Volo process that has no such listener; look at it, then start again"
        )

    def close(self) -> None:
        """Close the endpoint and give the name back."""
        self._owned_path.release()
        self._endpoint.close()

    def disown(self) -> None:
        """In a forked child: close the copy; the name is the other process's."""
        self._endpoint.close()
