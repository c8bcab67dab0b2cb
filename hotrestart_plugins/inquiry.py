"""The child's questions: one request, one answer, each with a deadline."""

from __future__ import annotations

import os
import socket
import time

from hotrestart_plugins import address as addresses
from hotrestart_plugins.address import Address
from hotrestart_plugins.errors import (
    MessageError,
    NoAnswer,
    ParentGone,
    TakeoverError,
    WrongDescriptor,
    WrongPeer,
)
from hotrestart_plugins.peers import check_sender
from hotrestart_plugins.rendezvous import Claim, MeetingPlace
from hotrestart_plugins.transport import SLICE, Endpoint, Packet
from hotrestart_plugins.wire import (
    PassFdRequest,
    PassFdResponse,
    TerminateParentRequest,
    parse,
)


class Inquiry:
    """What a child asks of its parent. Owns the child's endpoint and its name."""

    def __init__(
        self, place: MeetingPlace, endpoint: Endpoint, claim: Claim, timeout: float
    ) -> None:
        """`endpoint` is bound to the child's name and connected to the parent.

        `timeout`: seconds to wait for each answer.
        """
        self.parent_pid = 0
        """By the kernel's word, once it has answered; 0 before."""
        self._place = place
        self._endpoint = endpoint
        self._claim = claim
        self._timeout = timeout
        self._broken = ""

    def check(self) -> None:
        """Raise TakeoverError if an earlier question failed: its answer may still come."""
        if self._broken:
            raise TakeoverError(f"this takeover has failed ({self._broken}): start again")

    def ask(self, wanted: Address) -> socket.socket | None:
        """The parent's listener bound to `wanted`, the caller's to close; None: it has none.

        Raises ParentGone, NoAnswer, WrongPeer, WrongDescriptor.
        """
        self.check()
        try:
            fd = self._ask(wanted.name)
            return None if fd < 0 else self._checked(fd, wanted)
        except TakeoverError as error:
            self._broken = str(error)
            raise

    def _ask(self, name: str) -> int:
        deadline = time.monotonic() + self._timeout
        try:
            self._endpoint.send_before(PassFdRequest(name).serialize(), deadline)
        except TimeoutError:
            raise self._no_answer(name) from None
        except OSError as error:
            raise ParentGone(f"cannot ask for {name}: {error.strerror}") from error
        while True:
            packet = self._endpoint.receive_within(SLICE)
            if packet is None and not self._place.parent_answers():
                # Its last word may have come between the wait and the look.
                packet = self._endpoint.receive()
                if packet is None:
                    raise ParentGone(f"the parent ended before it had answered for {name}")
            if packet is not None:
                return self._answer(packet)
            if time.monotonic() >= deadline:
                raise self._no_answer(name)

    def _answer(self, packet: Packet) -> int:
        """The descriptor in an answer, which the caller owns, or -1."""
        pid = packet.sender.pid
        try:
            if packet.fault:
                raise WrongDescriptor(f"the answer of pid {pid} was {packet.fault}")
            check_sender(packet.sender)
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
        came = f"pid {self.parent_pid} sent"
        try:
            sock = socket.socket(fileno=fd)  # family, type and protocol by the kernel's word
        except OSError:
            os.close(fd)
            raise WrongDescriptor(f"{came} a descriptor for {wanted} that is no socket") from None
        try:
            if not addresses.is_listening(sock):
                raise WrongDescriptor(f"{came} a socket for {wanted} that does not listen")
            bound = addresses.of_socket(sock)
            if not wanted.is_of(bound):
                raise WrongDescriptor(f"{came} the listener of {bound} for {wanted}")
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def tell_to_go(self) -> bool:
        """Send TerminateParentRequest; False if the parent has ended. Raises NoAnswer."""
        try:
            self._endpoint.send_before(
                TerminateParentRequest().serialize(), time.monotonic() + self._timeout
            )
        except TimeoutError:
            raise self._no_answer("the request to go") from None
        except OSError:
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
        self._claim.release()
        self._endpoint.close()

    def disown(self) -> None:
        """In a forked child: close the copy; the name is the other process's."""
        self._endpoint.close()
