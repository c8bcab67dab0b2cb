"""Listeners that are bound fresh, and what is known of one."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotrestart_plugins.core import address as addresses
from hotrestart_plugins.core.address import Address, of_socket, parse, same_socket
from hotrestart_plugins.core.bind import bind_fresh, holder
from hotrestart_plugins.errors import AddressError
from tests.support.processes import Processes, free_address

pytestmark = pytest.mark.usefixtures("no_leak")


V6 = pytest.param("[::1]:0", marks=pytest.mark.ipv6)


@pytest.fixture(params=["127.0.0.1:0", V6, "unix:{meet}/app.sock", "unix:@hotrestart-{meet.name}"])
def bound(request: pytest.FixtureRequest, meet: Path) -> Iterator[socket.socket]:
    with bind_fresh(parse(request.param.format(meet=meet))[0]) as sock:
        yield sock


def test_what_is_bound_fresh(bound: socket.socket) -> None:
    """A fresh listener listens, does not block, is close-on-exec, and knows its protocol."""
    assert addresses.is_listening(bound)
    assert not bound.getblocking()
    assert fcntl.fcntl(bound, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert of_socket(bound).family == bound.family
    if bound.family != socket.AF_UNIX:
        assert bound.proto == socket.IPPROTO_TCP
    with socket.socket(bound.family) as client:
        client.connect(bound.getsockname())


def test_it_can_be_bound_again_at_once() -> None:
    """An address whose connections are in TIME_WAIT is free."""
    (address,) = parse(free_address())
    for _ in range(2):
        with bind_fresh(address) as sock, socket.create_connection(sock.getsockname()) as client:
            sock.setblocking(True)
            sock.accept()[0].close()
            assert client.recv(1) == b""


def test_an_address_that_is_taken(processes: Processes) -> None:
    """The error about a taken address names the process that has it."""
    code = (
        "import socket, sys\n"
        "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "s.accept()"
    )
    process = processes.python(code)
    (address,) = parse(f"127.0.0.1:{process.line()}")
    with pytest.raises(AddressError) as error:
        bind_fresh(address)
    assert str(error.value) == f"{address} is taken by pid {process.pid}"


def test_a_holder_that_cannot_be_found() -> None:
    """Where nobody is seen at an address, no pid is made up."""
    assert holder(parse(free_address())[0]) == "another process"


@pytest.mark.parametrize("where", ["192.0.2.1:0", "[2001:db8::1]:0", "unix:/nonexistent/app.sock"])
def test_an_address_that_cannot_be_bound(where: str) -> None:
    """Another machine's address, or a directory that is not there, is one line."""
    with pytest.raises(AddressError, match="cannot listen on"):
        bind_fresh(parse(where)[0])


def test_a_stale_socket_file_is_replaced(meet: Path) -> None:
    """The file of a listener that has ended is replaced, and keeps its permissions."""
    address = addresses.unix(str(meet / "app.sock"))
    bind_fresh(address, mode=0o640).close()
    with bind_fresh(address) as sock:
        assert stat.S_IMODE(os.stat(address.host).st_mode) == 0o640
        assert of_socket(sock) == address
    with bind_fresh(address, mode=0o600):  # for a new file; this one was given its own by somebody
        assert stat.S_IMODE(os.stat(address.host).st_mode) == 0o640


def test_a_live_socket_file_is_refused(meet: Path, processes: Processes) -> None:
    """A path where another process listens is left alone, and the process named."""
    path = str(meet / "app.sock")
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1)\n"
        "print('up', flush=True); s.accept(); s.accept(); s.accept(); s.accept()"
    )
    process = processes.python(code, path)
    process.line()
    before = os.stat(path).st_ino
    with pytest.raises(AddressError) as error:
        bind_fresh(addresses.unix(path))
    assert str(error.value) == f"{path} is taken by pid {process.pid}"
    assert os.stat(path).st_ino == before


def test_a_live_socket_with_a_full_queue_is_refused(meet: Path) -> None:
    """A listener that is too busy to take another connection is alive."""
    path = str(meet / "app.sock")
    with bind_fresh(addresses.unix(path), backlog=0), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        with pytest.raises(AddressError, match="is taken by"):
            bind_fresh(addresses.unix(path))


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_a_path_that_is_no_socket_is_left_alone(meet: Path, kind: str) -> None:
    """A file, a directory or a symbolic link in the place of the socket is never removed."""
    path = meet / "app.sock"
    if kind == "file":
        path.write_text("mine")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(meet / "elsewhere")
    with pytest.raises(AddressError, match="is no socket: remove it or choose another path"):
        bind_fresh(addresses.unix(str(path)))
    assert os.path.lexists(path)


@pytest.mark.ipv6
def test_v6only() -> None:
    """`[::]` leaves IPv4 alone where that is asked for, so that both can be bound."""
    (v4,) = parse(free_address().replace("127.0.0.1", "0.0.0.0"))
    (v6,) = parse(f"[::]:{v4.port}")
    with bind_fresh(v4), bind_fresh(v6, v6only=True) as sock:
        assert of_socket(sock) == v6


def test_what_listens() -> None:
    """Only a stream socket that listens is a listener."""
    with (
        socket.socket() as unbound,
        socket.socket(type=socket.SOCK_DGRAM) as datagram,
        bind_fresh(Address(socket.AF_INET, "127.0.0.1")) as listener,
    ):
        assert [addresses.is_listening(s) for s in (unbound, datagram, listener)] == [
            False,
            False,
            True,
        ]


def test_the_same_socket(bound: socket.socket) -> None:
    """Two descriptors are the same socket by the kernel's word, not by their address."""
    with bound.dup() as copy, socket.socket(bound.family) as other:
        assert same_socket(bound, copy)
        assert not same_socket(bound, other)
