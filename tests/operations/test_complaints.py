"""What users complain of elsewhere, each under the name of its complaint: it does not happen here.

Every test goes the way on which the complaint arises, with real servers, and looks at what the user
who filed it would look at.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, Deploys, Instance, command, free_port
from demo_app.load import LoadProcess, Mix
from hotrestart_plugins.settings import DEFAULTS
from tests.support import instances
from tests.support.gate import Gate
from tests.support.instances import QUICK, STOPPED, demo, kept_alive, successor, up
from tests.support.processes import open_descriptors
from tests.support.raw import Connection, ask, request

pytestmark = pytest.mark.once

WINDOW = {**QUICK, **instances.WINDOW}
CLIENTS = Mix(one_shot=4, keep_alive=4)
EX_CONFIG = 78
TAKEN_FROM = re.compile(rf"{TOOK_OVER} (\d+)")
OVERTAKEN = "Overtaken by pid"
SERVERS = pytest.mark.parametrize("server", ["uvicorn", "gunicorn gthread"])
ASYNC_TOO = pytest.mark.parametrize("server", ["uvicorn", "gunicorn gthread", "gunicorn asgi"])


def serve(server: str, address: str, *more: str) -> list[str]:
    """The demo's command line."""
    return demo(server, address, *kept_alive(server), *more)


def binding(server: str, *addresses: str) -> list[str]:
    """The same on several addresses, or on others."""
    if server.startswith("gunicorn"):
        first, *rest = addresses
        return serve(server, first, *(part for one in rest for part in ("-b", one)))
    plain = command(server, "127.0.0.1:1")[:-4]
    return [*plain, *(part for one in addresses for part in ("--bind", one))]


def refused(address: str) -> bool:
    """Whether nobody listens there."""
    try:
        ask(address)
    except ConnectionRefusedError:
        return True
    return False


def processes_of(instance: Instance) -> list[int]:
    """Every process of its session that has not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid = int(status.parent.name)
            if instance.owns(pid) and "State:\tZ" not in status.read_text():
                found.append(pid)
    return found


@pytest.fixture
def tmp() -> Iterator[Path]:
    """A short path, as that of a Unix socket has to be."""
    with Deploys() as place:
        yield place.directory


@ASYNC_TOO
def test_accepted_but_unread_connection_closed(place: Deploys, address: str, server: str) -> None:
    """uvicorn#2757, #3023: a connection that was accepted, and sends its request after the
    restart has begun, is answered; so is one of which half a request was read."""
    args = serve(server, address)
    old = up(place, args, **WINDOW)
    with contextlib.ExitStack() as stack:
        unread = [stack.enter_context(Connection(address)) for _ in range(8)]
        for connection in unread[:4]:
            connection.send(request()[:20])
        # Those behind them in the queue are answered: they are accepted.
        assert all(old.owns(ask(address).pid) for _ in range(16))
        new = place.start(args, **QUICK)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        for connection in unread[:4]:
            connection.send(request()[20:])
        for connection in unread[4:]:
            connection.send(request())
        for connection in unread:
            assert connection.answer().status == 200
    old.signal(signal.SIGTERM)
    assert old.wait() in (0, -signal.SIGTERM)


@SERVERS
def test_old_killed_before_the_app_loads(
    place: Deploys, address: str, tmp: Path, server: str
) -> None:
    """gunicorn#2443, #1199: while the new app is being imported, the old one answers everything,
    for as long as that takes."""
    gate = Gate(tmp, serve(server, address))
    with contextlib.closing(gate):
        old = up(place, gate.args, **gate.open)
        new = place.start(gate.args, **QUICK, **gate.closed)
        gate.wait()
        with LoadProcess(address, CLIENTS) as load:
            report = load.wait(answers=300)
            assert all(old.owns(pid) for pid in report.by_pid)
            assert STOPPED not in old.log
            new.signal(signal.SIGKILL)
            new.wait()
            report = load.wait(answers=100)
            assert all(old.owns(pid) for pid in report.by_pid)
            assert not load.stop().failures


@pytest.mark.parametrize(
    ("server", "workers"), [("uvicorn", 1), ("uvicorn4", 4), ("gunicorn gthread", 2)]
)
def test_fixed_sleep_taken_for_readiness(
    place: Deploys, address: str, tmp: Path, *, server: str, workers: int
) -> None:
    """gunicorn#1757, #2196: the takeover comes when the last worker has loaded the app, neither
    earlier nor by the clock."""
    gate = Gate(tmp, serve(server, address))
    with contextlib.closing(gate):
        old = up(place, gate.args, **gate.open)
        new = place.start(gate.args, **QUICK, **gate.closed)
        with LoadProcess(address, CLIENTS) as load:
            for _ in range(workers):
                gate.wait()
            for _ in range(workers - 1):
                gate.let_one_through()
            load.wait(answers=300)
            assert TOOK_OVER not in new.log
            assert STOPPED not in old.log
            gate.let_one_through()
            new.wait_for(TOOK_OVER)
            assert old.wait() == 0
            load.wait(answers=100)
            report = load.stop()
    assert not report.failures, report


@ASYNC_TOO
def test_backlog_reset_on_sigterm(place: Deploys, address: str, tmp: Path, server: str) -> None:
    """What waits in the listener's queue when the old instance is told to go, by its successor
    and by SIGTERM at once, is answered."""
    gate = Gate(tmp, serve(server, address))
    with contextlib.closing(gate), contextlib.ExitStack() as stack:
        old = up(place, gate.args, **gate.open, **WINDOW)
        new = place.start([*gate.args, *_one_worker(server)], **WINDOW, **gate.closed)
        gate.wait()
        os.killpg(old.pid, signal.SIGSTOP)
        queued = [stack.enter_context(Connection(address)) for _ in range(32)]
        for connection in queued:
            connection.send(request())
        gate.let_one_through()
        new.wait_for(TOOK_OVER)
        old.signal(signal.SIGTERM)
        os.killpg(old.pid, signal.SIGCONT)
        assert all(connection.answer().status == 200 for connection in queued)
        stack.close()  # no idle client keeps the old one
        old.wait()
        assert new.owns(ask(address).pid)


def _one_worker(server: str) -> list[str]:
    return ["-w", "1"] if server.startswith("gunicorn") else []


@pytest.mark.ipv6
@SERVERS
@pytest.mark.parametrize("kept", ["127.0.0.1", "[::1]"])
def test_wrong_socket_handed_over_same_port_tcp_and_tcp6(
    place: Deploys, server: str, kept: str
) -> None:
    """envoy#8427, #20584: of two listeners on one port, the one that was asked for goes over, and
    the other ends with its last instance."""
    port = free_port()
    both = [f"127.0.0.1:{port}", f"[::1]:{port}"]
    old = up(place, binding(server, *both))
    assert all(old.owns(ask(one).pid) for one in both)
    one = f"{kept}:{port}"
    (other,) = {*both} - {one}
    new = successor(place, old, binding(server, one))
    assert new.owns(ask(one).pid)
    assert refused(other)
    newest = successor(place, new, binding(server, *reversed(both)))
    assert all(newest.owns(ask(address).pid) for address in both)


@SERVERS
@pytest.mark.parametrize(("first", "second"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
def test_wrong_socket_handed_over_wildcard_and_specific_address(
    place: Deploys, server: str, first: str, second: str
) -> None:
    """A listener on every address is none on this one, nor the other way round: it is not handed
    over for it. Both at once there cannot be, which is said, and nobody is disturbed."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    args = binding(server, f"{first}:{port}")
    old = up(place, args)
    with LoadProcess(address, CLIENTS) as load:
        load.wait(answers=50)
        wrong = place.start(binding(server, f"{second}:{port}"), **QUICK)
        assert wrong.wait() == EX_CONFIG
        assert f"{second}:{port} is taken by pid" in wrong.log
        load.wait(answers=50)
        assert old.owns(ask(address).pid)
        successor(place, old, args)
        report = load.stop()
    assert not report.failures, report


@SERVERS
def test_rapid_restarts_wedge(place: Deploys, address: str, server: str) -> None:
    """envoy#1537, tableflip#52: several are started at once. Each takes over or is overtaken, one
    serves in the end, and it can itself be replaced."""
    args = serve(server, address)
    patient = {**QUICK, "HOTRESTART_TAKEOVER_TIMEOUT": "60"}
    instances = [up(place, args)]
    with LoadProcess(address, CLIENTS) as load:
        load.wait(answers=50)
        instances += [place.start(args, **patient) for _ in range(4)]
        for instance in instances[1:]:
            instance.wait_for(TOOK_OVER, OVERTAKEN)
        replaced = {int(pid) for each in instances for pid in TAKEN_FROM.findall(each.log)}
        overtaken = {each.pid for each in instances if OVERTAKEN in each.log}
        assert not replaced & overtaken
        (last,) = (each for each in instances if each.pid not in replaced | overtaken)
        assert all(each.wait() == 0 for each in instances if each is not last)
        assert last.owns(ask(address).pid)
        successor(place, last, args)
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report


@SERVERS
def test_a_failed_upgrade_leaves_the_server_deaf_to_the_next(
    place: Deploys, address: str, server: str
) -> None:
    """haproxy#3229: after one that broke, one that was killed, and one that was stopped, the next
    good one takes over."""
    args = serve(server, address)
    if server.startswith("gunicorn"):
        args += ["--graceful-timeout", "600"]  # its workers that hang in the import need none of it
    old = up(place, args)
    with LoadProcess(address, CLIENTS) as load:
        broken = place.start(args, DEMO_FAIL="import", **QUICK)
        assert broken.wait() == 3
        for count, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=2):
            hanging = place.start(args, DEMO_FAIL="hang", **QUICK)
            old.wait_for("Takeover started by pid", count=count)
            hanging.signal(number)
            hanging.wait()
        load.wait(answers=50)
        new = successor(place, old, args)
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report
    assert new.owns(ask(address).pid)


@SERVERS
@pytest.mark.parametrize("stopped", [False, True])
def test_the_dying_process_deletes_the_new_ones_socket_file(
    place: Deploys, tmp: Path, *, server: str, stopped: bool
) -> None:
    """gunicorn#476, #1298, mosn#2205: neither the socket that clients use nor the one on which
    the next instance asks goes with the old one, whether it leaves by itself or is stopped."""
    path = tmp / "app.sock"
    args = serve(server, f"unix:{path}")
    old = up(place, args, **(WINDOW if stopped else {}))
    inode = path.stat().st_ino
    new = place.start(args, **QUICK)
    new.wait_for(TOOK_OVER)
    if stopped:
        old.wait_for(STOPPED)
        old.signal(signal.SIGTERM)
    assert old.wait() in (0, -signal.SIGTERM), old.log
    assert path.stat().st_ino == inode
    assert new.owns(ask(f"unix:{path}").pid)
    newest = successor(place, new, args)
    assert newest.owns(ask(f"unix:{path}").pid)
    newest.stop()
    assert not path.exists()


@ASYNC_TOO
def test_old_processes_pile_up(place: Deploys, address: str, server: str) -> None:
    """haproxy#155: clients that never leave keep no old instance beyond its drain timeout, and
    none of its workers."""
    args = serve(server, address)
    limited = {**QUICK, "HOTRESTART_DRAIN_TIMEOUT": "2"}
    instances = [up(place, args, **limited)]
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            holding = [stack.enter_context(Connection(address)) for _ in range(3)]
            holding[0].send(request("/events?count=100000"))
            assert holding[0].sock.recv(1)
            holding[1].send(request("/slow?seconds=60"))
            instances.append(place.start(args, **limited))
            instances[-1].wait_for(TOOK_OVER)
        *olds, last = instances
        assert [old.wait() for old in olds] == [0, 0, 0]
        assert [processes_of(old) for old in olds] == [[], [], []]
        assert last.owns(ask(address).pid)


@ASYNC_TOO
@pytest.mark.parametrize("way", ["takeover", "SIGTERM"])
def test_unset_graceful_timeout_hangs_for_ever(
    place: Deploys, address: str, *, server: str, way: str
) -> None:
    """uvicorn#2943: without --timeout-graceful-shutdown, one endless answer keeps no instance
    from its end. Ours has a default, which is finite, and is shorter here for the test's sake."""
    default = DEFAULTS["drain_timeout"]
    assert isinstance(default, float)
    assert 0 < default < math.inf
    args = serve(server, address)
    if server.startswith("gunicorn"):
        args += ["--graceful-timeout", "2"]
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="2")
    with Connection(address) as endless:
        endless.send(request("/events?count=1000000"))
        assert endless.sock.recv(1)
        if way == "takeover":
            place.start(args, **QUICK).wait_for(TOOK_OVER)
        else:
            old.signal(signal.SIGTERM)
        assert old.wait() in (0, -signal.SIGTERM)


@SERVERS
def test_unused_inherited_descriptors_leak(place: Deploys, server: str) -> None:
    """A listener that the new instance does not have is open in none of its processes; and of
    that which it has there are no more descriptors than in the first instance."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(4)]
    args = binding(server, addresses[0])
    current = up(place, args)
    first = listeners_of(current)
    for _ in range(2):
        current = successor(place, current, binding(server, *addresses))
        assert len({*listeners_of(current)}) == len(addresses)
        current = successor(place, current, args)
        assert all(refused(one) for one in addresses[1:])
        assert listeners_of(current) == first


def listeners_of(instance: Instance) -> list[str]:
    """The TCP listener that each descriptor of its processes leads to, if it leads to one."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = {f"socket:[{line.split()[9]}]" for line in lines if line.split()[3] == "0A"}
    opened = [open_descriptors(pid).values() for pid in processes_of(instance)]
    return sorted(one for found in opened for one in found if one in listening)
