"""What may be handed over: connections, and nothing else that a descriptor can be."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from demo_app.deploys import Deploys, Instance
from hotrestart_plugins.handover import frames
from hotrestart_plugins.handover.frames import ConnectionState
from tests.support.instances import WINDOW, demo, takes_over, up
from tests.support.processes import DEADLINE, eventually, open_descriptors
from tests.support.raw import Connection, request

REFUSED = "Closed descriptors that are not TCP or Unix connections"
RESET = struct.pack("ii", 1, 0)  # struct linger: close(2) sends a reset


def of_pair(stack: ExitStack, family: int, kind: int) -> list[int]:
    return [stack.enter_context(sock).fileno() for sock in socket.socketpair(family, kind)]


def of_socket(stack: ExitStack, *args: int) -> list[int]:
    return [stack.enter_context(socket.socket(*args)).fileno()]


def connected_udp(stack: ExitStack) -> list[int]:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.connect(("127.0.0.1", 9))
    return [sock.fileno()]


def listening(stack: ExitStack) -> list[int]:
    return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno()]


def listening_unix(stack: ExitStack) -> list[int]:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind("")  # an abstract name, of the kernel's choice
    sock.listen()
    return [sock.fileno()]


def pipe(stack: ExitStack) -> list[int]:
    fds = list(os.pipe())
    for fd in fds:
        stack.callback(os.close, fd)
    return fds


def file(stack: ExitStack) -> list[int]:
    return [stack.enter_context(open(os.devnull)).fileno()]


KINDS: dict[str, Callable[[ExitStack], list[int]]] = {
    "AF_NETLINK SOCK_RAW": lambda stack: of_socket(stack, socket.AF_NETLINK, socket.SOCK_RAW),
    "AF_UNIX SOCK_DGRAM": lambda stack: of_pair(stack, socket.AF_UNIX, socket.SOCK_DGRAM),
    "AF_UNIX SOCK_SEQPACKET": lambda stack: of_pair(stack, socket.AF_UNIX, socket.SOCK_SEQPACKET),
    "AF_INET SOCK_DGRAM": connected_udp,
    "AF_INET SOCK_STREAM, not connected": lambda stack: [
        *listening(stack),
        *of_socket(stack, socket.AF_INET),
    ],
    "AF_UNIX SOCK_STREAM, not connected": lambda stack: [
        *listening_unix(stack),
        *of_socket(stack, socket.AF_UNIX),
    ],
    "no socket": lambda stack: [*pipe(stack), *file(stack)],
}
"""What each is called in the log."""


def was_reset(stack: ExitStack) -> int:
    """A connection whose client has gone without a word of farewell."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    stack.enter_context(accepted)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    return accepted.fileno()


def hand_over(path: Path, fds: list[int]) -> None:
    """Through the real channel, from a process of the same user."""
    with frames.connect(path) as channel:
        channel.settimeout(DEADLINE)
        frames.send(channel, 1, [(fd, ConnectionState.IDLE) for fd in fds])
        assert frames.acknowledged(channel) == 1


@pytest.mark.parametrize(
    "server", ["uvicorn", "gunicorn asgi", "gunicorn gthread", "gunicorn uvicorn"]
)
def test_only_connections_are_adopted(place: Deploys, address: str, server: str) -> None:
    """Whatever else comes is closed and logged; the worker lives, leaks nothing, and serves the
    connection that came in the same batch."""
    args = demo(server, address, *(["-w", "1"] if server.startswith("gunicorn") else []))
    new = takes_over(place, up(place, args, **WINDOW), args)
    (path,) = (place.directory / "meet").glob("to-new.*.*")
    worker = int(path.suffix[1:])
    with Connection(address) as kept:
        assert kept.get().pid == worker
        before = sorted(open_descriptors(worker).values())
        send_everything(path, new)
        eventually(
            lambda: sorted(open_descriptors(worker).values()) == before,
            f"the descriptors that were open before, {before}",
        )
        assert kept.get().pid == worker
    assert new.log.count(REFUSED) == len(KINDS)
    assert new.log.count("speaks version") == 1
    assert "Traceback" not in new.log


def send_everything(path: Path, new: Instance) -> None:
    for kind, make in KINDS.items():
        with ExitStack() as stack:
            client, ours = (stack.enter_context(sock) for sock in socket.socketpair())
            client.settimeout(DEADLINE)
            fds = make(stack)
            hand_over(path, [*fds, ours.fileno(), *fds])
            ours.close()
            client.sendall(request())
            assert client.recv(4096).startswith(b"HTTP/1.1 200"), kind
        assert f"{REFUSED}: {2 * len(fds)} x {kind}\n" in new.log
    for _ in range(3):
        with ExitStack() as stack:
            hand_over(path, [was_reset(stack)])
    with frames.connect(path) as channel, ExitStack() as stack:
        channel.settimeout(DEADLINE)
        fds = of_pair(stack, socket.AF_UNIX, socket.SOCK_STREAM)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fds[0]))
        channel.sendmsg([struct.pack("=BI", frames.VERSION + 1, 1) + b"i"], [rights])
        assert channel.recv(8) == b"", "another version was acknowledged"
