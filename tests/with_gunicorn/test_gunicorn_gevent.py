"""gunicorn's workers on event loops of others: gevent, gevent's pywsgi, tornado."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance
from demo_app.load import LoadProcess, Mix
from tests.support import certificates
from tests.support.gunicorns import (
    INSTALL,
    QUICK,
    STOPPED,
    STOPPED_OR_GONE,
    WINDOW,
    gunicorn,
    kill,
    only_line,
    own_config,
    start,
    successor,
    takes_over,
    up,
    workers_of,
)
from tests.support.instances import answers_once_more
from tests.support.raw import Connection, ask, request

pytestmark = pytest.mark.long

GEVENT = pytest.mark.parametrize("worker", ["gevent", "gevent_pywsgi"])
EACH = pytest.mark.parametrize("worker", ["gevent", "gevent_pywsgi", "tornado"])
KEEP = ("--keep-alive", "30")


def command(worker: str, address: str, *more: str) -> list[str]:
    return gunicorn("gevent", address, "-k", worker, *more)


def environ(worker: str, basis: dict[str, str]) -> dict[str, str]:
    """gunicorn's tornado worker begins with a call that tornado has deprecated."""
    return {**basis, "PYTHONWARNINGS": ""} if worker == "tornado" else basis


@EACH
def test_no_request_fails_in_takeovers_in_a_row(place: Deploys, address: str, worker: str) -> None:
    """On connections of its own or kept alive; and who has stopped accepting, has."""
    args, env = command(worker, address), environ(worker, QUICK)
    current = up(place, args, **env)
    with LoadProcess(address, Mix(one_shot=16, keep_alive=16)) as load:
        load.wait(answers=100)
        stopped: list[tuple[set[int], float]] = []
        for _ in range(3):
            old, current = current, start(place, args, **env)
            current.wait_for(TOOK_OVER)
            stopped.append((workers_of(old), old.wait_for(*STOPPED_OR_GONE)))
            assert old.wait() == 0, old.log
            load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    assert not report.closed_idle, report
    assert report.reconnects >= 16  # every kept-alive connection was told
    for pids, moment in stopped:
        for pid in pids & report.by_pid.keys():
            assert report.by_pid[pid].last_begun < moment


@EACH
def test_what_is_open_is_answered_once_more(place: Deploys, address: str, worker: str) -> None:
    """Accepted and unread, half read, idle, and under way: each is answered by the old instance,
    the last answer says that the connection closes, and only then it does."""
    env = environ(worker, WINDOW)
    old = up(place, command(worker, address, "-w", "1", *KEEP), **env)
    with contextlib.ExitStack() as stack:
        unread, half, idle, busy = (stack.enter_context(Connection(address)) for _ in range(4))
        half.send(request()[:20])
        assert not idle.get().closes
        if worker == "tornado":  # which runs a WSGI app in its loop: nothing else goes on meanwhile
            assert not busy.get().closes
        else:
            busy.send(request("/events?count=15"))
        # The last one's answer tells that the others, which came before it, are accepted.
        assert ask(address).status == 200
        new = start(place, command(worker, address, *KEEP), **env)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        unread.send(request())
        half.send(request()[20:])
        idle.send(request())
        answers_once_more(old, (unread, half, idle))
        if worker != "tornado":
            answer = busy.answer()
            assert (answer.status, old.owns(answer.pid)) == (200, True)
            assert answer.body.count(b"data:") == 15
        answer = busy.get()
        assert (answer.status, old.owns(answer.pid), answer.closes) == (200, True, True)
        assert new.owns(ask(address).pid)
    old.signal(signal.SIGTERM)
    assert old.wait() == 0


@EACH
def test_the_parent_serves_again_if_its_successor_dies(
    place: Deploys, address: str, worker: str
) -> None:
    """With the workers that it has, which keep connections alive again."""
    args, env = command(worker, address), environ(worker, WINDOW)
    parent = up(place, args, **env)
    pids = workers_of(parent)
    child = start(place, args, **env)
    child.wait_for(TOOK_OVER)
    parent.wait_for(STOPPED)
    kill(child)
    parent.wait_for("Accepting again")
    with LoadProcess(address, Mix(one_shot=4)) as load:
        load.wait(answers=100)
        with Connection(address) as connection:
            assert not connection.get().closes
            assert not connection.get().closes
        start(place, args, **environ(worker, QUICK)).wait_for(TOOK_OVER)
        parent.wait_for(STOPPED, count=2)
        load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    assert workers_of(parent) == pids  # no other was started
    parent.signal(signal.SIGTERM)
    assert parent.wait() == 0


@GEVENT
def test_a_full_worker_stays_paused(place: Deploys, address: str, worker: str) -> None:
    """gevent begins to accept again by itself when a connection of a full worker ends: not while
    it is paused. One that was full when it was to resume does it then."""
    args = command(worker, address, "-w", "1", "--worker-connections", "1", *KEEP)
    parent = up(place, args, **WINDOW)
    with Connection(address) as first:
        assert first.get().status == 200
        child = takes_over(place, parent, args)
        assert first.get().closes
        assert first.at_end()
    for _ in range(20):
        assert child.owns(ask(address).pid)
    kill(child)
    parent.wait_for("Accepting again")
    assert parent.owns(ask(address).pid)
    with Connection(address) as filling:
        assert parent.owns(filling.get().pid)
        child = start(place, args, **WINDOW)
        child.wait_for(TOOK_OVER)
        parent.wait_for(STOPPED, count=2)
        kill(child)
        parent.wait_for("Accepting again", count=2)
        assert parent.owns(filling.get().pid)
    assert parent.owns(ask(address).pid)


@pytest.fixture
def tls(tmp_path: Path) -> tuple[list[str], Path]:
    """The options for a server with a certificate, and who has signed it."""
    key, chain, ca = certificates.issue(tmp_path)
    return ["--certfile", str(chain), "--keyfile", str(key)], ca


@EACH
def test_tls(place: Deploys, address: str, tls: tuple[list[str], Path], worker: str) -> None:
    """The same over TLS."""
    options, ca = tls
    args, env = command(worker, address, *options), environ(worker, QUICK)
    current = up(place, args, **env)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4), ca_file=ca) as load:
        load.wait(answers=50)
        for _ in range(2):
            current = successor(place, current, args, **env)
            load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report


@EACH
@pytest.mark.parametrize("how", ["replaced", "stopped"])
def test_a_handshake_that_comes_after_the_listener_was_closed(
    place: Deploys, address: str, tls: tuple[list[str], Path], worker: str, how: str
) -> None:
    """Accepted is accepted: gunicorn alone drops who has not finished it when a worker stops."""
    options, ca = tls
    args, env = command(worker, address, "-w", "1", *options, *KEEP), environ(worker, QUICK)
    old = up(place, args, **env)
    (pid,) = workers_of(old)
    host, port = address.split(":")
    context = ssl.create_default_context(cafile=ca)
    with socket.create_connection((host, int(port)), 30) as sock:
        # Its answer tells that the other, which came before it, is accepted.
        with tls_connection(address, context) as answered:
            answered.sendall(request())
            assert answered.recv(65536).startswith(b"HTTP/1.1 200")
        listener = inode_of_listener(int(port))
        if how == "replaced":
            start(place, args, **env).wait_for(TOOK_OVER)
        else:
            old.signal(signal.SIGTERM)
        while listener in open_sockets(pid):
            pass
        with context.wrap_socket(sock, server_hostname=host) as secure:
            secure.sendall(request())
            assert secure.recv(65536).startswith(b"HTTP/1.1 200")
    assert old.wait() == 0, old.log


@contextlib.contextmanager
def tls_connection(address: str, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), 30) as sock,
        context.wrap_socket(sock, server_hostname=host) as secure,
    ):
        yield secure


def inode_of_listener(port: int) -> str:
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = {one[9] for one in lines if one[3] == "0A" and one[1].endswith(f":{port:04X}")}
    return inode


def open_sockets(pid: int) -> set[str]:
    """The inodes of the sockets that the process has."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(entry.path).removeprefix("socket:[").removesuffix("]"))
    return found


@EACH
def test_a_plain_stop_takes_the_same_care(
    place: Deploys, address: str, tmp_path: Path, worker: str
) -> None:
    """SIGTERM without a successor, and a master that is killed: what is open is answered once
    more, and the app hears of it."""
    (tmp_path / "waits.py").write_text(WAITS)
    args = command(worker, address, "-w", "1", *KEEP)
    args[args.index("wsgi:app")] = "waits:app"
    env = {**environ(worker, QUICK), "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    for number in (signal.SIGTERM, signal.SIGKILL):
        instance = up(place, args, **env)
        (pid,) = workers_of(instance)
        listener = inode_of_listener(int(address.rpartition(":")[2]))
        with Connection(address) as unread, Connection(address) as idle:
            assert not idle.get().closes
            instance.signal(number)
            while listener in open_sockets(pid):
                pass
            for connection in (unread, idle):
                answer = connection.get()
                assert (answer.status, answer.closes, answer.body) == (200, True, b"True")
                assert connection.at_end()
        assert instance.wait() in (0, -signal.SIGKILL)


WAITS = """
from hotrestart_plugins.app import drain
def app(environ, start_response):
    if environ["PATH_INFO"] == "/wait":
        drain.wait(60)
    body = str(drain.is_set()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@GEVENT
@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["", "preload"])
def test_the_app_hears_of_the_drain(
    place: Deploys, address: str, tmp_path: Path, worker: str, preload: list[str]
) -> None:
    """A greenlet that waits for it holds up nobody else, also where the app was loaded before
    gevent patched the process; and after a rollback there is no drain any more."""
    (tmp_path / "waits.py").write_text(WAITS)
    args = command(worker, address, "-w", "1", *preload, *KEEP)
    args[args.index("wsgi:app")] = "waits:app"
    env = {**WINDOW, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    old = up(place, args, **env)
    with Connection(address) as waiting, Connection(address) as idle:
        waiting.send(request("/wait"))
        assert idle.get().body == b"False"
        new = start(place, args, **env)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        assert waiting.answer().body == b"True"
        assert idle.get().body == b"True"
    kill(new)
    old.wait_for("Accepting again")
    assert ask(address).body == b"False"


@EACH
def test_preload_and_a_unix_socket(place: Deploys, tmp_path: Path, worker: str) -> None:
    """The app loaded in the master, the clients on a path."""
    address = f"unix:{tmp_path}/app.sock"
    args, env = command(worker, address, "--preload"), environ(worker, QUICK)
    current = up(place, args, **env)
    with LoadProcess(address, Mix(one_shot=8, keep_alive=8)) as load:
        load.wait(answers=50)
        for _ in range(2):
            current = successor(place, current, args, **env)
            load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report


def test_a_config_file_that_patches_the_master(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """As is done for `preload_app`: the master takes over, is replaced, and serves again."""
    config = tmp_path / "patches.conf.py"
    config.write_text(f"import gevent.monkey\ngevent.monkey.patch_all()\n{INSTALL}")
    args = own_config("gevent", address, config, "--preload")
    parent = up(place, args, **WINDOW)
    child = takes_over(place, parent, args)
    kill(child)
    parent.wait_for("Accepting again")
    assert parent.owns(ask(address).pid)
    with LoadProcess(address, Mix(one_shot=8, keep_alive=8)) as load:
        load.wait(answers=100)
        start(place, args, **QUICK).wait_for(TOOK_OVER)
        parent.wait_for(STOPPED, count=2)
        parent.signal(signal.SIGTERM)
        assert parent.wait() == 0, parent.log
        load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report


def test_from_one_worker_class_to_another(place: Deploys, address: str) -> None:
    """They share the listener's state: nobody's way to accept must block another's."""
    current: Instance | None = None
    with contextlib.ExitStack() as stack:
        load = None
        for worker in ("gevent", "gthread", "gevent", "asgi", "gevent", "sync", "gevent"):
            args = gunicorn(worker, address)
            current = up(place, args) if current is None else successor(place, current, args)
            load = load or stack.enter_context(LoadProcess(address, Mix(one_shot=8)))
            load.wait(answers=100)
        assert load is not None
        report = load.stop()
    assert not report.failures, report


OWN_SERVER = """
from functools import partial
import gevent, gevent.server
from gunicorn.workers.ggevent import GeventWorker
class Worker(GeventWorker):
    def run(self):
        (listener,) = self.sockets
        server = gevent.server.StreamServer(listener, handle=partial(self.handle, listener))
        server.start()
        while self.alive:
            self.notify()
            gevent.sleep(0.1)
        server.stop()
"""


def test_a_derived_worker_with_a_server_of_its_own(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """It is not mistaken for the one that it is derived from: it says so, and stops at once."""
    (tmp_path / "own.py").write_text(OWN_SERVER)
    args = command("own.Worker", address, "-w", "1")
    env = {**WINDOW, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    old = start(place, args, **env)
    old.wait_for(*UP)
    assert "own.Worker" in only_line(old.log, "make their own servers")
    new = start(place, args, **env)
    new.wait_for(TOOK_OVER)
    old.wait_for("Worker exiting")
    old.wait_for(STOPPED)
    assert new.owns(ask(address).pid)
    assert new.stop() == 0
    assert old.wait() == 0
