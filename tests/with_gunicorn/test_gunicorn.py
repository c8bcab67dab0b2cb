"""gunicorn with our hooks: takeovers under load, and the listeners that pass on."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import stat
import struct
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, Deploys, free_port
from demo_app.load import LoadProcess, Mix
from tests.support.gunicorns import (
    EACH_WORKER,
    INSTALL,
    QUICK,
    STOPPED,
    STOPPED_OR_GONE,
    WINDOW,
    gunicorn,
    own_config,
    start,
    successor,
    takes_over,
    up,
    workers_of,
)
from tests.support.instances import answers_once_more, finishes
from tests.support.raw import Connection, ask, request


@pytest.mark.smoke
@EACH_WORKER
def test_no_request_fails_in_takeovers_in_a_row(
    place: Deploys, address: str, tmp_path: Path, worker: str
) -> None:
    """With a new connection for each request; from the moment that an instance has stopped
    accepting, no connection begun later is answered by it. The pid file names who serves."""
    pid_file = tmp_path / "pid"
    args = gunicorn(worker, address, "--pid", str(pid_file))
    current = up(place, args)
    with LoadProcess(address, Mix(one_shot=32)) as load:
        load.wait(answers=100)
        stopped: list[tuple[set[int], float]] = []
        for _ in range(3):
            old, current = current, start(place, args, **QUICK)
            current.wait_for(TOOK_OVER)
            assert int(pid_file.read_text()) == current.pid
            stopped.append((workers_of(old), old.wait_for(*STOPPED_OR_GONE)))
            assert old.wait() == 0, old.log
            assert int(pid_file.read_text()) == current.pid
            load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    for pids, moment in stopped:
        for pid in pids & report.by_pid.keys():
            assert report.by_pid[pid].last_begun < moment
    assert current.stop() == 0
    assert not pid_file.exists()


@EACH_WORKER
def test_no_request_of_any_kind_fails(place: Deploys, address: str, worker: str) -> None:
    """Kept-alive connections, slow answers, uploads and event streams included."""
    args = gunicorn(worker, address)
    current = up(place, args)
    mix = Mix(one_shot=8, keep_alive=8, slow=1, upload=1, sse=1)
    with LoadProcess(address, mix) as load:
        load.wait(answers=100)
        for _ in range(3):
            current = successor(place, current, args)
            load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    assert not report.closed_idle, report


@pytest.mark.parametrize("worker", ["gthread", "asgi", "uvicorn"])
def test_what_is_open_is_answered_once_more(place: Deploys, address: str, worker: str) -> None:
    """Accepted and unread, half read, idle, and under way: each is answered by the old instance,
    the last answer says that the connection closes, and only then it does."""
    args = gunicorn(worker, address, "-w", "1", "--keep-alive", "30")
    old = up(place, args, **WINDOW, HOTRESTART_NO_CONNECTION_HANDOVER="1")
    with contextlib.ExitStack() as stack:
        unread, half, idle, busy = (stack.enter_context(Connection(address)) for _ in range(4))
        half.send(request()[:20])
        assert not idle.get().closes
        busy.begin_upload()
        # The last one's answer tells that the others, which came before it, are accepted.
        assert ask(address).status == 200
        new = start(place, args, **QUICK)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        unread.send(request())
        half.send(request()[20:])
        idle.send(request())
        answers_once_more(old, (unread, half, idle))
        busy.send(b"hello")
        finishes(old, busy)
        assert new.owns(ask(address).pid)
    old.signal(signal.SIGTERM)
    assert old.wait() == 0


@EACH_WORKER
def test_a_unix_socket_is_never_gone(place: Deploys, tmp_path: Path, worker: str) -> None:
    """The path outlives each instance but the last, failed ones too; its mode is gunicorn's."""
    path = tmp_path / "app.sock"
    args = gunicorn(worker, f"unix:{path}", "--umask", "0o117")
    parent = up(place, args)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    inode = path.stat().st_ino
    with LoadProcess(f"unix:{path}", Mix(one_shot=8)) as load:
        load.wait(answers=50)
        failed = start(place, args, DEMO_FAIL="import", **QUICK)
        assert failed.wait() == 3, failed.log
        child = successor(place, parent, args)
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report
    assert path.stat().st_ino == inode
    assert child.owns(ask(f"unix:{path}").pid)
    assert child.stop() == 0
    assert not path.exists()


@pytest.mark.ipv6
def test_several_addresses(place: Deploys, tmp_path: Path) -> None:
    """IPv4, IPv6, all interfaces, Unix, and a file named @like an abstract socket; what is new is
    bound fresh, and the Unix path that nobody listens on any more is gone."""
    v4, v6, every = f"127.0.0.1:{free_port()}", f"[::1]:{free_port()}", free_port()
    first, second = f"unix:{tmp_path}/first.sock", f"unix:{tmp_path}/@second.sock"
    old = up(place, gunicorn("asgi", v4, "-b", v6, "-b", f":{every}", "-b", first))
    assert (tmp_path / "first.sock").exists()
    new = successor(place, old, gunicorn("asgi", v4, "-b", v6, "-b", f":{every}", "-b", second))
    for one in (v4, v6, f"127.0.0.1:{every}", second):
        assert new.owns(ask(one).pid)
    assert not (tmp_path / "first.sock").exists()


@pytest.mark.parametrize("worker", ["asgi", "uvicorn"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_accepted_connections_have_tcp_nodelay(
    place: Deploys, address: str, worker: str, loop: str
) -> None:
    """After a takeover too: a kept-alive answer must not wait 40 ms for an acknowledgement."""
    if worker == "asgi":
        more = ["--asgi-loop", loop]
    else:
        more = ["-k", "uvicorn_worker.UvicornH11Worker"] if loop == "asyncio" else []
    args = gunicorn(worker, address, "-w", "1", *more)
    old = up(place, args)
    new = successor(place, old, args)
    with Connection(address) as connection:
        (pid,) = workers_of(new)
        assert connection.get().pid == pid
        assert "nodelay" in _socket_options(pid, connection.sock.getsockname()[1])


def _socket_options(pid: int, client_port: int) -> set[str]:
    """TCP_NODELAY of the other process's end of a connection, asked through pidfd_getfd(2)."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=_steal(pid, int(entry.name))) as sock:
                if sock.family == socket.AF_INET and sock.getpeername()[1] == client_port:
                    on = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    return {"nodelay"} if on else set()
    raise AssertionError("no such connection")


def _steal(pid: int, fd: int) -> int:
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        found = libc.syscall(438, pidfd, fd, 0)  # pidfd_getfd
    finally:
        os.close(pidfd)
    if found < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return int(found)


@pytest.mark.parametrize("worker", ["asgi", "uvicorn"])
def test_the_backlog_stays_the_configured_one(place: Deploys, address: str, worker: str) -> None:
    """The shared listener's queue is as long as gunicorn was told, whoever called listen() last."""
    args = gunicorn(worker, address, "--backlog", "333", "-w", "1")
    old = up(place, args)
    assert _backlog(address) == 333
    successor(place, old, args)
    assert _backlog(address) == 333


def _backlog(address: str) -> int:
    """As the kernel reports it to `ss -l`: sock_diag(7), inet_diag's idiag_wqueue."""
    port = int(address.rpartition(":")[2])
    header = struct.Struct("=IHHII")
    ask_for = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 0, 1 << 10)  # TCP_LISTEN
    ask_for += bytes(48)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:  # NETLINK_SOCK_DIAG
        diag.settimeout(5)
        diag.sendto(header.pack(header.size + len(ask_for), 20, 0x301, 1, 0) + ask_for, (0, 0))
        while data := diag.recv(1 << 16):
            while len(data) >= header.size:
                length, kind, *_ = header.unpack_from(data)
                assert kind == 20, "the listener is not there"
                body = data[header.size : length]
                if struct.unpack_from(">H", body, 4)[0] == port:
                    return int(struct.unpack_from("=I", body, 60)[0])
                data = data[length:]
    raise AssertionError("the listener is not there")


# The Python that runs this may lie where nobody else can look: all is loaded before.
PRELOADED = """
preload_app = True
import hotrestart_plugins.gunicorn.adapters.asgi
import hotrestart_plugins.gunicorn.adapters.sync
import hotrestart_plugins.gunicorn.adapters.gevent
import hotrestart_plugins.gunicorn.adapters.gthread
import hotrestart_plugins.gunicorn.adapters.uvicorn_worker
import uvicorn.loops.auto
import uvicorn.loops.uvloop
import uvicorn.protocols.http.auto
import uvicorn.protocols.websockets.auto
import uvicorn.lifespan.on
"""


@pytest.mark.root
@EACH_WORKER
def test_workers_of_another_user(place: Deploys, tmp_path: Path, worker: str) -> None:
    """A master of root with workers of nobody: they pause, resume and leave; the Unix socket is
    theirs from one instance to the next, and the meeting directory stays closed to them."""
    user = pwd.getpwnam("nobody")
    path, config = tmp_path / "app.sock", tmp_path / "some.conf.py"
    config.write_text(PRELOADED + INSTALL)
    address = f"unix:{path}"
    who = ("--user", "nobody", "--group", str(user.pw_gid))
    args = own_config(worker, address, config, "-w", "1", *who)
    old = up(place, args, **WINDOW)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4)) as load:
        load.wait(answers=20)
        new = takes_over(place, old, args)
        load.wait(answers=20)
        for one in (old, new):
            (pid,) = workers_of(one)
            assert os.stat(f"/proc/{pid}").st_uid == user.pw_uid
        report = load.stop()
    assert not report.failures, report
    assert "Could not listen for connections" not in new.log  # it is not even tried
    owner = path.stat()
    assert (owner.st_uid, owner.st_gid) == (user.pw_uid, user.pw_gid)
    meet = (place.directory / "meet").stat()
    assert (meet.st_uid, stat.S_IMODE(meet.st_mode)) == (0, 0o700)
    new.signal(signal.SIGKILL)
    old.wait_for("Accepting again")
    assert old.stop() == 0
    assert not path.exists()
