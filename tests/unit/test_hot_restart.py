"""One side of a takeover at a time, in this process; the other side is a plain socket."""

from __future__ import annotations

import array
import logging
import os
import random
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import hotrestart_plugins
from hotrestart_plugins import ChildExitAction, HotRestart, Role, TerminatePolicy
from hotrestart_plugins.core import credentials, takeover_server
from hotrestart_plugins.core.address import Address
from hotrestart_plugins.core.datagram import Endpoint
from hotrestart_plugins.core.listeners import ListenerRegistry
from hotrestart_plugins.core.rendezvous import (
    CHILD_SOCKET,
    PARENT_SOCKET,
    RendezvousDirectory,
)
from hotrestart_plugins.errors import (
    AddressError,
    ConfigurationError,
    NoAnswer,
    TakeoverError,
    WrongDescriptor,
    WrongPeer,
)
from tests.support.processes import (
    LOOPBACK,
    Command,
    Processes,
    fill_queue,
    free_address,
    open_descriptors,
)

pytestmark = pytest.mark.usefixtures("no_leak")

STRANGER = 12345  # a uid that is neither ours nor root's


def request(address: str) -> bytes:
    return struct.pack("=BI", 1, len(address.encode())) + address.encode()


class Plain:
    """A datagram socket bound to one of the two names: whoever a test wants on the other side."""

    def __init__(self, directory: Path, name: str, to: str) -> None:
        self.to = str(directory / to)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind(str(directory / name))

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))]
        self.sock.sendmsg([data], rights if fds else [], 0, self.to)

    def receive(self) -> tuple[bytes, list[socket.socket]]:
        data, fds, _, _ = socket.recv_fds(self.sock, 2048, 4)
        return data, [socket.socket(fileno=fd) for fd in fds]


BIND = """
import os, socket, sys
name, to = sys.argv[1:3]
fds = [int(fd) for fd in sys.argv[3:]]
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind(name)
print("bound", flush=True)
"""


def plain_process(
    processes: Processes, code: str, directory: Path, name: str, fds: Sequence[int] = ()
) -> Command:
    """A process that binds `sock` to one of the two names, says so, and runs `code`.

    It inherits `fds`; `fds` is the list of their numbers in `code` as well, and `to` the path of
    the other name.
    """
    to = PARENT_SOCKET if name == CHILD_SOCKET else CHILD_SOCKET
    args = [str(directory / name), str(directory / to), *map(str, fds)]
    process = processes.python(BIND + code, *args, pass_fds=fds)
    assert process.line() == "bound"
    return process


@pytest.fixture
def impostor(no_leak: None, meet: Path) -> Iterator[Plain]:
    """A parent that answers what it likes, before it is asked."""
    made = Plain(meet, PARENT_SOCKET, CHILD_SOCKET)
    yield made
    made.sock.close()


@pytest.fixture
def child(impostor: Plain, meet: Path) -> Iterator[HotRestart]:
    hot = HotRestart(takeover_timeout=0.05)
    assert hot.initialize(meet, 1) is Role.CHILD
    yield hot
    hot.close()
    assert sorted(os.listdir(meet)) == ["lock", "tickets", PARENT_SOCKET]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def name_of(sock: socket.socket) -> str:
    return f"127.0.0.1:{sock.getsockname()[1]}"


# -- the child's side ------------------------------------------------------------------------------


@pytest.mark.ipv6
def test_a_listener_is_inherited(impostor: Plain, child: HotRestart) -> None:
    """The answer is the parent's socket: its own family and protocol, non-blocking."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as theirs:
        impostor.send(b"\x02", [theirs.fileno()])
        address = f"[::1]:{theirs.getsockname()[1]}"
        sock = child.dup_parent_listener_sock(address)
        assert sock is not None
        with sock:
            assert (sock.family, sock.type, sock.proto) == (
                socket.AF_INET6,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
            )
            assert not sock.getblocking()
            assert not sock.get_inheritable()
            assert sock.getsockname() == theirs.getsockname()
    assert impostor.receive() == (request(address), [])
    assert child.inherited == {address}
    assert child.parent_pid == os.getpid()


def test_an_answer_without_a_descriptor(impostor: Plain, child: HotRestart) -> None:
    """'I have none' means: bind it fresh."""
    impostor.send(b"\x02")
    assert child.dup_parent_listener_sock("127.0.0.1:1") is None
    assert (child.inherited, child.role) == (frozenset(), Role.CHILD)


def test_many_are_asked_for_at_once(impostor: Plain, child: HotRestart) -> None:
    """Several requests are on their way before the first answer; answers come in their order."""
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    wanted = [name_of(sock) for sock in socks]
    for sock in socks:
        impostor.send(b"\x02", [sock.fileno()])
    made = child.listen(wanted)
    assert [name_of(sock) for sock in made] == wanted
    assert [impostor.receive()[0] for _ in wanted] == [request(name) for name in wanted]
    for sock in [*socks, *made]:
        sock.close()


SHORT_LIVED = """
for _ in range(3):
    sock.recv(1024)
sock.connect(to)
for fd in fds:
    socket.send_fds(sock, [b"\\x02"], [fd])
"""


def test_answers_of_a_parent_that_died(processes: Processes, meet: Path) -> None:
    """What it had answered before it ended is inherited; only the rest is bound fresh."""
    given = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    wanted = [*(name_of(sock) for sock in given), free_address()]
    fds = [sock.fileno() for sock in given]
    parent = plain_process(processes, SHORT_LIVED, meet, PARENT_SOCKET, fds)
    child = HotRestart(takeover_timeout=20)
    assert child.initialize(meet, 3) is Role.CHILD
    made = child.listen(wanted)
    assert parent.wait() == 0, parent.log
    assert child.inherited == set(wanted[:2])
    assert [name_of(sock) for sock in made] == wanted
    assert child.role is Role.INITIAL
    for sock in [*given, *made]:
        sock.close()
    child.close()


def test_what_was_inherited_is_closed_if_the_rest_fails(
    impostor: Plain, child: HotRestart, listener: socket.socket
) -> None:
    """If the second answer is wrong, the listener in the first one is closed here."""
    impostor.send(b"\x02", [listener.fileno()])
    impostor.send(b"\x02", [listener.fileno()])
    before = len(open_descriptors())
    with pytest.raises(WrongDescriptor):
        child.listen([name_of(listener), "127.0.0.1:1"])
    assert len(open_descriptors()) == before
    assert child.listeners == ()


def a_pipe() -> tuple[Any, int]:
    reader, writer = os.pipe()
    os.close(writer)
    return os.fdopen(reader), reader


def some_socket(family: int, kind: int = socket.SOCK_STREAM, *, listen: bool = True) -> Any:
    sock = socket.socket(family, kind)
    host = LOOPBACK.get(socket.AddressFamily(family))
    sock.bind((host, 0) if host else "")  # "": an abstract name of the kernel's choice
    if listen and kind == socket.SOCK_STREAM:
        sock.listen()
    return sock, sock.fileno()


def on_every_interface() -> tuple[Any, int]:
    sock = socket.create_server(("", 0))
    return sock, sock.fileno()


BAD_DESCRIPTORS = {
    "no socket": (a_pipe, "127.0.0.1", "a descriptor for {} that is no socket"),
    "a datagram socket": (
        lambda: some_socket(socket.AF_INET, socket.SOCK_DGRAM),
        "127.0.0.1",
        "a socket for {} that does not listen",
    ),
    "not listening": (
        lambda: some_socket(socket.AF_INET, listen=False),
        "127.0.0.1",
        "a socket for {} that does not listen",
    ),
    "elsewhere": (
        lambda: some_socket(socket.AF_INET),
        "127.0.0.2",
        "the listener of 127.0.0.1:{port} for {}",
    ),
    "TCP6 for TCP": (
        lambda: some_socket(socket.AF_INET6),
        "127.0.0.1",
        "the listener of [::1]:{port} for {}",
    ),
    "TCP for TCP6": (
        lambda: some_socket(socket.AF_INET),
        "[::1]",
        "the listener of 127.0.0.1:{port} for {}",
    ),
    "the wildcard": (on_every_interface, "127.0.0.1", "the listener of 0.0.0.0:{port} for {}"),
    "a Unix listener": (
        lambda: some_socket(socket.AF_UNIX),
        "127.0.0.1",
        "the listener of @{hidden} for {}",
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.ipv6] if kind == "TCP6 for TCP" else [])
        for kind in BAD_DESCRIPTORS
    ],
)
def test_a_wrong_descriptor(impostor: Plain, child: HotRestart, kind: str) -> None:
    """What is not the listener that was asked for is refused in one line, and closed."""
    make, host, why = BAD_DESCRIPTORS[kind]
    owner, fd = make()
    name = owner.getsockname() if isinstance(owner, socket.socket) else ""
    port = name[1] if isinstance(name, tuple) else 1
    hidden = name[1:].decode() if isinstance(name, bytes) else ""
    wanted = f"{host}:{port}"
    impostor.send(b"\x02", [fd])
    before = open_descriptors()
    with pytest.raises(WrongDescriptor) as error:
        child.dup_parent_listener_sock(wanted)
    assert str(error.value) == f"pid {os.getpid()} sent " + why.format(
        wanted, port=port, hidden=hidden
    )
    assert open_descriptors() == before
    owner.close()


def test_two_descriptors(impostor: Plain, child: HotRestart, listener: socket.socket) -> None:
    """An answer with two descriptors is refused, and both are closed."""
    impostor.send(b"\x02", [listener.fileno()] * 2)
    with pytest.raises(WrongDescriptor, match="more than one descriptor"):
        child.dup_parent_listener_sock(name_of(listener))


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\x01", b"\x03", b"\x02\x00", request("/a"), b"\xff" * 1024]
)
def test_an_answer_that_is_none(
    impostor: Plain, child: HotRestart, listener: socket.socket, data: bytes
) -> None:
    """Whatever is no PassFdResponse is refused, in one line; its descriptor is closed."""
    impostor.send(data, [listener.fileno()])
    with pytest.raises(WrongPeer) as error:
        child.dup_parent_listener_sock(name_of(listener))
    assert "\n" not in str(error.value)
    assert f"pid {os.getpid()} answered with" in str(error.value)


def test_an_answer_that_is_too_long(
    impostor: Plain, child: HotRestart, listener: socket.socket
) -> None:
    """A datagram that is longer than any message is refused."""
    impostor.send(b"\x02" * 2000, [listener.fileno()])
    with pytest.raises(WrongDescriptor, match="longer than 1024 bytes"):
        child.dup_parent_listener_sock(name_of(listener))


def test_no_answer(impostor: Plain, child: HotRestart) -> None:
    """Silence ends at the deadline, in words; after that this takeover is over.

    A late answer could not be told from the one to the next question.
    """
    with pytest.raises(NoAnswer, match=r"did not answer for 127\.0\.0\.1:1 within 0\.05 s"):
        child.dup_parent_listener_sock("127.0.0.1:1")
    impostor.send(b"\x02")
    with pytest.raises(TakeoverError, match=r"has failed .* start again"):
        child.dup_parent_listener_sock("127.0.0.1:2")
    with pytest.raises(TakeoverError, match="has failed"):
        child.listen(["127.0.0.1:0"])


def test_a_failed_question_forbids_ready(impostor: Plain, child: HotRestart) -> None:
    """An instance whose takeover failed does not tell the parent to go."""
    with pytest.raises(NoAnswer):
        child.dup_parent_listener_sock("127.0.0.1:1")
    impostor.receive()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        child.register_listener_fd(name_of(sock), sock.fileno())
        with pytest.raises(TakeoverError):
            child.ready()
    with pytest.raises(BlockingIOError):
        impostor.receive()
    assert child.role is Role.CHILD


def test_a_parent_with_a_full_queue(impostor: Plain, meet: Path) -> None:
    """If the parent cannot be told to go, it keeps its name, and the error says so."""
    child = HotRestart(takeover_timeout=0.3)
    child.initialize(meet)
    before = os.stat(meet / PARENT_SOCKET).st_ino
    assert fill_queue(meet / PARENT_SOCKET)
    with pytest.raises(NoAnswer, match="the request to go"):
        child.ready()
    assert child.role is Role.CHILD
    assert os.stat(meet / PARENT_SOCKET).st_ino == before
    child.close()
    assert sorted(os.listdir(meet)) == ["lock", "tickets", PARENT_SOCKET]


@pytest.mark.parametrize("address", ["unix:/a\0b", "", "nonsense", "/" + "x" * 200, "localhost:1x"])
def test_an_address_that_is_none(child: HotRestart, address: str) -> None:
    """An address that cannot be is refused before anybody is asked."""
    with pytest.raises(AddressError):
        child.dup_parent_listener_sock(address)


def test_an_address_too_long_to_be_asked_for(child: HotRestart) -> None:
    """An address that no message has room for is refused before anybody is asked."""
    with pytest.raises(hotrestart_plugins.MessageError, match="1019 fit"):
        child.dup_parent_listener_sock(Address(socket.AF_UNIX, "@" + "x" * 2000))


def test_ready_is_said_once(impostor: Plain, child: HotRestart, listener: socket.socket) -> None:
    """TerminateParentRequest is sent once, by ready(), and not by the last descriptor."""
    impostor.send(b"\x02", [listener.fileno()])
    address = name_of(listener)
    with pytest.raises(ConfigurationError, match="0 of 1 listeners"):
        child.ready()
    (sock,) = child.listen([address])
    assert impostor.receive()[0] == request(address)
    with pytest.raises(BlockingIOError):
        impostor.receive()
    child.ready()
    assert impostor.receive() == (b"\x03", [])
    assert child.role is Role.PARENT
    child.ready()
    with pytest.raises(BlockingIOError):
        impostor.receive()
    sock.close()
    child.close()
    impostor.sock.close()
    Path(impostor.to).with_name(PARENT_SOCKET).touch()  # what the fixture looks for


def test_the_references_moment(impostor: Plain, meet: Path) -> None:
    """With TerminatePolicy.INHERITED the parent is told to go by the last listener asked for."""
    child = HotRestart(takeover_timeout=1, terminate_policy=TerminatePolicy.INHERITED)
    child.initialize(meet, 2)
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for sock, role in zip(socks, (Role.CHILD, Role.PARENT), strict=True):
        impostor.send(b"\x02", [sock.fileno()])
        inherited = child.dup_parent_listener_sock(name_of(sock))
        assert inherited is not None
        child.register_listener_fd(name_of(sock), inherited.fileno())
        inherited.close()
        assert impostor.receive()[0] == request(name_of(sock))
        assert child.role is role
        sock.close()
    assert impostor.receive()[0] == b"\x03"
    child.ready()
    child.close()
    assert sorted(os.listdir(meet)) == ["lock", "tickets"]


STRANGE_PARENT = f"""
os.setuid({STRANGER})
line = socket.socket(fileno=fds[0])
line.recv(1)
with socket.create_server(("127.0.0.1", 0)) as listener:
    sock.connect(to)
    socket.send_fds(sock, [b"\\x02"], [listener.fileno()])
    line.send(b"x")
    line.recv(1)
"""


@pytest.mark.root
def test_another_user_answers(processes: Processes, meet: Path) -> None:
    """An answer of another user is refused by the kernel's word, and its descriptor closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        fds = [theirs.fileno()]
        parent = plain_process(processes, STRANGE_PARENT, meet, PARENT_SOCKET, fds)
    child = HotRestart(takeover_timeout=5)
    child.initialize(meet, 1)
    meet.chmod(0o711)
    (meet / CHILD_SOCKET).chmod(0o777)
    ours.send(b"x")
    assert ours.recv(1) == b"x", parent.log
    before = open_descriptors()
    wrong = f"pid {parent.pid} runs as uid {STRANGER}, not as 0 or root"
    with pytest.raises(WrongPeer, match=wrong):
        child.dup_parent_listener_sock("127.0.0.1:1")
    assert open_descriptors() == before
    ours.close()
    assert parent.wait() == 0, parent.log
    child.close()


def test_listen_is_all_or_none(meet: Path) -> None:
    """If one address cannot be bound, none is, and no file or descriptor is left."""
    hot = HotRestart()
    hot.initialize(meet)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        good = free_address()
        before = open_descriptors()
        with pytest.raises(AddressError, match=f"pid {os.getpid()}, which is not to be reached in"):
            hot.listen([good, f"unix:{meet}/app.sock", name_of(taken)])
        assert open_descriptors() == before
    assert hot.listeners == ()
    assert not (meet / "app.sock").exists()
    socket.create_server(("127.0.0.1", int(good.rpartition(":")[2]))).close()
    hot.close()


def test_listen_leaves_the_parent_alone_when_it_fails(
    impostor: Plain, child: HotRestart, listener: socket.socket
) -> None:
    """What was inherited before one address failed is closed here, and only here."""
    impostor.send(b"\x02", [listener.fileno()])
    impostor.send(b"\x02")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AddressError, match="is taken by"),
    ):
        child.listen([name_of(listener), name_of(taken)])
    assert child.listeners == ()
    socket.create_connection(listener.getsockname()).close()


def test_one_name_of_several_addresses(child: HotRestart) -> None:
    """A name that stands for several listeners is not one listener; the error lists them."""
    with pytest.raises(AddressError, match="stands for several addresses, ask for each"):
        child.listen([":8000"])


def test_adopting(meet: Path, listener: socket.socket) -> None:
    """A listener from elsewhere is registered; what does not listen is refused."""
    hot = HotRestart()
    hot.initialize(meet)
    hot.adopt(listener)
    assert hot.listeners == (name_of(listener),)
    with socket.socket() as sock, pytest.raises(WrongDescriptor, match="no listening stream"):
        hot.adopt(sock)
    hot.close()
    socket.create_connection(listener.getsockname()).close()


def test_adopting_the_parents_own(
    impostor: Plain, child: HotRestart, listener: socket.socket
) -> None:
    """The same socket on both sides is fine; another one at the same address is refused."""
    impostor.send(b"\x02", [listener.fileno()])
    child.adopt(listener)
    assert child.inherited == {name_of(listener)}
    with socket.socket() as one, socket.socket() as other:
        for sock in (one, other):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", 0))
        other.bind(one.getsockname())
        one.listen()
        other.listen()
        impostor.send(b"\x02", [one.fileno()])
        with pytest.raises(WrongDescriptor, match=f"but pid {os.getpid()} serves that address on"):
            child.adopt(other)


def test_what_cannot_be_registered(meet: Path) -> None:
    """A descriptor that is not open is refused in one line."""
    hot = HotRestart()
    hot.initialize(meet)
    with pytest.raises(ConfigurationError, match="descriptor 99999 cannot be kept for"):
        hot.register_listener_fd("127.0.0.1:1", 99999)
    hot.close()


def test_nothing_before_initialize() -> None:
    """An instance that has not been initialized says so; closing it does nothing."""
    hot = HotRestart()
    assert hot.dup_parent_listener_sock("127.0.0.1:1") is None
    hot.ready()
    assert (hot.role, hot.fileno(), hot.handle()) == (Role.NEW, -1, False)
    hot.close()


# -- the parent's side -----------------------------------------------------------------------------


@pytest.fixture
def parent(no_leak: None, meet: Path, listener: socket.socket) -> Iterator[HotRestart]:
    hot = HotRestart()
    assert hot.initialize(meet) is Role.INITIAL
    hot.register_listener_fd(name_of(listener), listener.fileno())
    hot.ready()
    yield hot
    hot.close()


@pytest.fixture
def asker(parent: HotRestart, meet: Path) -> Iterator[Plain]:
    made = Plain(meet, CHILD_SOCKET, PARENT_SOCKET)
    yield made
    made.sock.close()


def test_a_request_is_answered(parent: HotRestart, asker: Plain, listener: socket.socket) -> None:
    """One request, one answer: byte 2 with the descriptor, byte 2 alone for what it has not."""
    asker.send(request(name_of(listener)))
    asker.send(request("127.0.0.1:1"))
    assert parent.handle() is False
    data, (sock,) = asker.receive()
    assert data == b"\x02"
    assert sock.getsockname() == listener.getsockname()
    sock.close()
    assert asker.receive() == (b"\x02", [])
    assert parent.child is not None
    assert parent.child.pid == os.getpid()


def takes_over(parent: HotRestart, asker: Plain, listener: socket.socket) -> None:
    """A takeover by whoever holds the child's name works."""
    asker.send(request(name_of(listener)))
    parent.handle()
    data, (sock,) = asker.receive()
    assert data == b"\x02"
    sock.close()
    asker.send(b"\x03")
    parent.handle()
    assert parent.role is Role.REPLACED


BAD_REQUESTS = {
    "empty": b"",
    "an unknown type": b"\x00",
    "an answer": b"\x02",
    "a length and no address": b"\x01\x05\x00\x00\x00",
    "a length that lies": b"\x01\xff\xff\xff\xff/a",
    "too long an address": request("/" + "x" * 1100),
    "longer than any message": b"\x03" * 5000,
    "bad UTF-8": b"\x01" + struct.pack("=I", 2) + b"/\xff",
    "to go, by one that never asked": b"\x03",
}


@pytest.mark.parametrize(
    "bad", [(kind, fds) for kind in BAD_REQUESTS for fds in range(3)], ids=lambda bad: f"{bad}"
)
def test_a_bad_request(
    parent: HotRestart,
    asker: Plain,
    listener: socket.socket,
    caplog: pytest.LogCaptureFixture,
    bad: tuple[str, int],
) -> None:
    """It is dropped with one line; its descriptors are closed; the next takeover works."""
    kind, fds = bad
    before = open_descriptors()
    asker.send(BAD_REQUESTS[kind], [0] * fds)
    parent.handle()
    assert open_descriptors() == before
    assert parent.role is Role.PARENT
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"Dropped a datagram from pid {os.getpid()}: ")
    assert "\n" not in record.getMessage()
    with pytest.raises(BlockingIOError):
        asker.receive()
    takes_over(parent, asker, listener)


def test_a_request_with_a_descriptor(
    parent: HotRestart, asker: Plain, listener: socket.socket
) -> None:
    """A request that brings descriptors is not one of ours; they are closed."""
    before = open_descriptors()
    for number in (1, 2):
        asker.send(request(name_of(listener)), [0] * number)
    parent.handle()
    assert open_descriptors() == before
    takes_over(parent, asker, listener)


def test_a_request_from_elsewhere(
    parent: HotRestart, asker: Plain, meet: Path, listener: socket.socket
) -> None:
    """Only the child's own name may ask; a socket with none, or another, is not answered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for name in ("", str(meet / "another")):
            if name:
                sock.bind(name)
            sock.sendto(request(name_of(listener)), str(meet / PARENT_SOCKET))
            sock.sendto(b"\x03", str(meet / PARENT_SOCKET))
            parent.handle()
    assert (parent.role, parent.child) == (Role.PARENT, None)
    takes_over(parent, asker, listener)


BELOW_HANDLE = [
    (credentials, "check"),
    (takeover_server, "parse"),
    (takeover_server, "ProcessWatch"),
    (RendezvousDirectory, "child_takeover_id"),
    (ListenerRegistry, "fd"),
    (Endpoint, "send"),
]


@pytest.mark.parametrize("below", BELOW_HANDLE, ids=lambda below: below[1])
def test_a_fault_of_ours(
    parent: HotRestart,
    asker: Plain,
    listener: socket.socket,
    caplog: pytest.LogCaptureFixture,
    below: tuple[object, str],
) -> None:
    """Whatever fails while it answers, the parent serves on, and the next takeover works."""

    def fail(*_args: object, **_more: object) -> None:
        raise RuntimeError("injected")

    before = open_descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*below, fail)
        for _ in range(20):
            asker.send(request(name_of(listener)))
            assert parent.handle() is False
    assert parent.role is Role.PARENT
    assert len(open_descriptors()) == len(before) + (parent.child is not None)
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(records) == 5
    assert all(record.exc_info for record in records)
    takes_over(parent, asker, listener)


def test_complaints_end(
    parent: HotRestart, asker: Plain, caplog: pytest.LogCaptureFixture, listener: socket.socket
) -> None:
    """A flood is complained of a few times aloud, not once a datagram."""
    for _ in range(100):
        asker.send(b"\xff")
        parent.handle()
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 5
    takes_over(parent, asker, listener)


@pytest.fixture(params=[1, 2, takeover_server._BATCH])
def bound(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many datagrams one handle() reads; a queue need not hold as many as ours by default."""
    number: int = request.param
    monkeypatch.setattr(takeover_server, "_BATCH", number)
    return number


def test_one_handle_reads_a_bounded_number(
    parent: HotRestart, asker: Plain, listener: socket.socket, bound: int
) -> None:
    """handle() returns to the host in the middle of a flood and says that there may be more."""
    waiting = fill_queue(asker.to)
    assert waiting
    full = waiting // bound
    assert [parent.handle() for _ in range(full + 1)] == [True] * full + [False]
    takes_over(parent, asker, listener)


def test_random_datagrams(parent: HotRestart, asker: Plain, listener: socket.socket) -> None:
    """Thousands of random datagrams leave role, descriptors and answers as they were."""
    chance = random.Random(1)
    before = open_descriptors()
    logging.getLogger("hotrestart").setLevel(logging.ERROR)
    for _ in range(5000):
        asker.send(chance.randbytes(chance.choice([0, 1, 2, 5, 6, 40, 1024, 1025])))
        parent.handle()
        with pytest.raises(BlockingIOError):
            asker.receive()
    logging.getLogger("hotrestart").setLevel(logging.NOTSET)
    assert open_descriptors() == before
    takes_over(parent, asker, listener)


def test_a_request_of_a_process_that_has_ended(
    processes: Processes, parent: HotRestart, asker: Plain, meet: Path, listener: socket.socket
) -> None:
    """It is not answered: the answer would reach the next child, as one to its own question."""
    asker.sock.close()
    os.unlink(meet / CHILD_SOCKET)
    ask = f"sock.sendto({request(name_of(listener))!r}, to)"
    ended = plain_process(processes, ask, meet, CHILD_SOCKET)
    assert ended.wait() == 0, ended.log
    os.unlink(meet / CHILD_SOCKET)
    after = Plain(meet, CHILD_SOCKET, PARENT_SOCKET)
    parent.handle()
    with pytest.raises(BlockingIOError):
        after.receive()
    assert parent.child is None
    takes_over(parent, after, listener)
    after.sock.close()


def test_the_end_of_the_child_before(
    parent: HotRestart, asker: Plain, listener: socket.socket
) -> None:
    """A host that learns of an earlier child's end while another asks loses nothing by it."""
    asker.send(request(name_of(listener)))
    parent.handle()
    assert parent.child_ended() is ChildExitAction.NOTHING
    assert parent.child is not None
    asker.receive()[1][0].close()
    asker.send(b"\x03")
    parent.handle()
    assert parent.role is Role.REPLACED
    assert parent.child_ended() is ChildExitAction.NOTHING


def test_a_look_that_fails(
    processes: Processes, parent: HotRestart, asker: Plain, meet: Path, listener: socket.socket
) -> None:
    """Without a descriptor to look with nothing is decided; the next look decides."""
    asker.sock.close()
    os.unlink(meet / CHILD_SOCKET)
    messages = [request(name_of(listener)), b"\x03"]
    take_over = f"""
import signal
for message in {messages}:
    sock.sendto(message, to)
print("sent", flush=True)
signal.pause()
"""
    child = plain_process(processes, take_over, meet, CHILD_SOCKET)
    assert child.line() == "sent"
    parent.handle()
    assert parent.role is Role.REPLACED
    (meet / PARENT_SOCKET).unlink()
    dead = Endpoint()
    dead.bind(str(meet / PARENT_SOCKET))  # the new instance's, which has crashed
    dead.close()
    child.kill()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            parent.child_ended()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert parent.child_ended() is ChildExitAction.RESUME
    assert parent.child is None


@pytest.mark.root
def test_another_user_asks(
    processes: Processes, parent: HotRestart, asker: Plain, meet: Path, listener: socket.socket
) -> None:
    """Another user, even one that was let into the directory, gets nothing and ends nothing."""
    asker.sock.close()
    os.unlink(meet / CHILD_SOCKET)
    meet.chmod(0o777)
    (meet / PARENT_SOCKET).chmod(0o777)
    messages = [request(name_of(listener)), b"\x03"]
    ask = f"os.setuid({STRANGER})\nfor message in {messages}:\n    sock.sendto(message, to)"
    stranger = plain_process(processes, ask, meet, CHILD_SOCKET)
    assert stranger.wait() == 0, stranger.log
    parent.handle()
    assert (parent.role, parent.child) == (Role.PARENT, None)
    os.unlink(meet / CHILD_SOCKET)
    meet.chmod(0o700)
    after = Plain(meet, CHILD_SOCKET, PARENT_SOCKET)
    takes_over(parent, after, listener)
    after.sock.close()


def test_after_it_was_replaced(parent: HotRestart, asker: Plain, listener: socket.socket) -> None:
    """An instance that was told to go hands out nothing more, and hears it only once."""
    takes_over(parent, asker, listener)
    asker.send(request(name_of(listener)))
    asker.send(b"\x03")
    parent.handle()
    with pytest.raises(BlockingIOError):
        asker.receive()
    assert parent.role is Role.REPLACED


def test_a_child_that_does_not_read(
    parent: HotRestart, asker: Plain, meet: Path, listener: socket.socket
) -> None:
    """A child whose queue is full costs the parent no waiting and no descriptor."""
    before = open_descriptors()
    for number in range(50):
        if number == 2:  # the answers so far wait in the queue
            fill_queue(meet / CHILD_SOCKET)
        asker.send(request(name_of(listener)))
        parent.handle()
    assert set(before.values()) <= set(open_descriptors().values())
    while True:
        try:
            for sock in asker.receive()[1]:
                sock.close()
        except BlockingIOError:
            break
    takes_over(parent, asker, listener)


def test_both_roles_in_one_process(parent: HotRestart, meet: Path, listener: socket.socket) -> None:
    """A second instance in the same process finds the first, and its end takes nothing with it."""
    second = HotRestart(takeover_timeout=0.05)
    assert second.initialize(meet) is Role.CHILD
    with pytest.raises(hotrestart_plugins.Busy, match=f"pid {os.getpid()}"):
        HotRestart(takeover_timeout=0.05).initialize(meet)
    second.close()
    asker = Plain(meet, CHILD_SOCKET, PARENT_SOCKET)
    takes_over(parent, asker, listener)
    asker.sock.close()


def test_the_references_verbs() -> None:
    """The process-wide instance and its three verbs serve as those of Volo do its users."""
    code = f"""
import os, socket, tempfile
from hotrestart_plugins import (
    DEFAULT_HOT_RESTART, Role, dup_parent_listener_sock, initialize, register_listener_fd)
with tempfile.TemporaryDirectory() as meet:
    initialize(meet, 1)
    assert initialize(meet, 1) is Role.INITIAL
    assert dup_parent_listener_sock({free_address()!r}) is None
    sock = socket.create_server(("127.0.0.1", 0))
    register_listener_fd("127.0.0.1:%d" % sock.getsockname()[1], sock.fileno())
    DEFAULT_HOT_RESTART.ready()
    assert DEFAULT_HOT_RESTART.role is Role.PARENT
    DEFAULT_HOT_RESTART.close()
    sock.close()
    assert sorted(os.listdir(meet)) == ["lock", "tickets"]
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False,
        cwd=Path(hotrestart_plugins.__file__).parent.parent,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("done\n", "")
