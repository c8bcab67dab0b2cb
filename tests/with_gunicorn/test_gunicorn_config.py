"""gunicorn with our hooks: config files, TLS, given descriptors, and what only one can have."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import ssl
import struct
import textwrap
from pathlib import Path

import pytest

from demo_app.deploys import HERE, TOOK_OVER, UP, Deploys, free_port
from demo_app.load import LoadProcess, Mix
from tests.support import certificates
from tests.support.gunicorns import (
    EACH_WORKER,
    EX_CONFIG,
    INSTALL,
    QUICK,
    STRICT,
    WINDOW,
    gunicorn,
    inside,
    only_line,
    own_config,
    start,
    successor,
    up,
    workers_of,
)
from tests.support.instances import drained
from tests.support.processes import eventually
from tests.support.raw import Connection, ask, request

EVERY_HOOK = """
import sys

def tell(*what):
    print("hook", *what, file=sys.stderr, flush=True)

def on_starting(server): tell("on_starting")
def on_reload(server): tell("on_reload")
def when_ready(server): tell("when_ready")
def pre_fork(server, worker): tell("pre_fork")
def post_fork(server, worker): tell("post_fork")
def post_worker_init(worker): tell("post_worker_init")
def worker_int(worker): tell("worker_int")
def worker_abort(worker): tell("worker_abort")
def pre_exec(server): tell("pre_exec")
def pre_request(worker, req): tell("pre_request", req.path)
def post_request(worker, req, environ, resp): tell("post_request")
def child_exit(server, worker): tell("child_exit")
def worker_exit(server, worker): tell("worker_exit")
def nworkers_changed(server, new_value, old_value): tell("nworkers_changed", new_value, old_value)
def on_exit(server): tell("on_exit")
def ssl_context(config, default): return default()
"""


@EACH_WORKER
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_config_that_defines_every_hook(
    place: Deploys, address: str, tmp_path: Path, worker: str, order: str
) -> None:
    """Each is called as without us, and the takeover works."""
    path = tmp_path / "some.conf.py"
    path.write_text(EVERY_HOOK + INSTALL if order == "before" else INSTALL + EVERY_HOOK)
    args = own_config(worker, address, path, "-w", "1")
    old = up(place, args)
    assert ask(address).status == 200
    successor(place, old, args)
    called = [line[len("hook ") :] for line in old.log.splitlines() if line.startswith("hook ")]
    of_requests = [] if worker == "uvicorn" else ["pre_request /", "post_request"]
    assert called == [
        "nworkers_changed 1 None",
        "on_starting",
        "when_ready",
        "pre_fork",
        "post_fork",
        "post_worker_init",
        *of_requests,
        "worker_exit",
        "child_exit",
        "on_exit",
    ]


def test_the_config_in_the_current_directory_is_read(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """With `-c python:hotrestart_plugins.gunicorn_conf`; and again on HUP."""
    path = tmp_path / "gunicorn.conf.py"
    path.write_text(
        textwrap.dedent(f"""
        bind = {address!r}
        workers = 1
        pythonpath = {str(HERE)!r}
        hotrestart_rollback_window = 0
        def on_starting(server):
            print("the user's hook", flush=True)
        """)
    )
    args = gunicorn("sync", address, "--pid", "pid")
    for option in ("-b", "-w"):
        del args[args.index(option) : args.index(option) + 2]
    environ = {**STRICT, "HOTRESTART_ROLLBACK_WINDOW": "60"}  # the file goes first
    old = start(place, inside(tmp_path, args), **environ)
    old.wait_for(*UP)
    assert "the user's hook" in old.log
    assert len(workers_of(old)) == 1
    path.write_text(path.read_text().replace("workers = 1", "workers = 3"))
    old.signal(signal.SIGHUP)
    old.wait_for("Booting worker with pid", count=4)
    new = start(place, inside(tmp_path, args), **environ)
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0, old.log
    assert new.owns(ask(address).pid)
    path.write_text(path.read_text() + "hotrestart_drain_timeout = 'soon'\n")
    new.signal(signal.SIGHUP)
    new.wait_for("hotrestart_drain_timeout: 'soon' is not")
    assert new.owns(ask(address).pid)


def test_the_command_of_the_demo(place: Deploys, address: str) -> None:
    """A bare module name after -c is a file name to gunicorn: the demo has a file of that name."""
    args = gunicorn("asgi", address)
    args = [*args[:2], "-c", "hotrestart_plugins.gunicorn_conf", "app:app", "-b", address]
    old = start(place, args, HOTRESTART_ROLLBACK_WINDOW="0")
    old.wait_for(*UP)
    assert len(workers_of(old)) == 2
    new = start(place, args, HOTRESTART_ROLLBACK_WINDOW="0")
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0
    assert new.owns(ask(address).pid)


def test_disabled(place: Deploys, address: str) -> None:
    """gunicorn as it is: a second one finds the address in use."""
    args = gunicorn("sync", address)
    first = start(place, args, HOTRESTART_DISABLE="1", **STRICT)
    first.wait_for("Booting worker with pid", count=4)
    assert first.owns(ask(address).pid)
    second = start(place, args, HOTRESTART_DISABLE="1", **STRICT)
    second.wait_for("Connection in use")
    second.signal(signal.SIGKILL)
    assert first.stop() == 0
    assert not (place.directory / "meet").exists()


def test_usr2_can_be_gunicorns_own(place: Deploys, address: str) -> None:
    """It works as without us, and says that its child takes part in no hot restart."""
    args = gunicorn("sync", address, "-w", "1")
    parent = up(place, args, HOTRESTART_MANUAL_USR2="1")
    parent.signal(signal.SIGUSR2)
    parent.wait_for(f"Started by USR2 from pid {parent.pid}")
    parent.wait_for("Booting worker with pid", count=2)
    assert parent.stop() == 0
    parent.wait_for("Master has been promoted")


OWN_WORKER = """
import os, select
from gunicorn.workers.base import Worker
class Own(Worker):
    def run(self):
        while self.alive:
            self.notify()
            for listener in select.select(self.sockets, [], [], 0.1)[0]:
                try:
                    client, _ = listener.accept()
                except BlockingIOError:
                    continue
                with client:
                    client.settimeout(30)
                    while not client.recv(65536).endswith(b"\\r\\n\\r\\n"):
                        pass
                    head = "HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nX-Served-By: %d\\r\\n\\r\\n"
                    client.sendall((head % os.getpid()).encode())
"""


def test_a_worker_class_that_cannot_pause(place: Deploys, address: str, tmp_path: Path) -> None:
    """It is said at the start, and such workers are stopped at once."""
    (tmp_path / "own.py").write_text(OWN_WORKER)
    args = gunicorn("sync", address, "-k", "own.Own", "-w", "2")
    environ = {
        "HOTRESTART_ROLLBACK_WINDOW": "60",
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }
    current = start(place, args, **environ)
    current.wait_for(*UP)
    only_line(current.log, "cannot stop accepting without exiting")
    with Connection(address) as busy:
        busy.send(request()[:20])
        assert ask(address).status == 200  # came behind it: that one is accepted
        old, current = current, start(place, args, **environ)
        current.wait_for(TOOK_OVER)
        busy.send(request()[20:])
        answer = busy.answer()
        assert (answer.status, answer.pid in workers_of(old)) == (200, True)
    assert old.wait() == 0, old.log
    assert "aborted" not in drained(old.log)
    assert current.owns(ask(address).pid)


def test_tls(
    place: Deploys, address: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """TLS across a takeover; a certificate that does not fit its key harms nobody."""
    key, chain, ca = certificates.issue(tmp_path)
    wrong = certificates.issue(tmp_path_factory.mktemp("other")).key
    args = gunicorn("asgi", address, "--certfile", str(chain), "--keyfile", str(key))
    old = up(place, args)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4), ca_file=ca) as load:
        load.wait(answers=20)
        misfit = start(place, [*args[:-1], str(wrong)], **QUICK)
        assert misfit.wait() == EX_CONFIG
        assert "cannot be used" in only_line(misfit.log, "Takeover failed")
        successor(place, old, args)
        load.wait(answers=20)
        report = load.stop()
    assert not report.failures, report
    context = ssl.create_default_context(cafile=ca)
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port))) as sock,
        context.wrap_socket(sock, server_hostname=host),
    ):
        pass


@pytest.mark.parametrize("way", ["fd", "systemd"])
@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_given_descriptor(place: Deploys, tmp_path: Path, way: str, family: str) -> None:
    """From a service manager, by number or by LISTEN_FDS; its path is not ours to remove."""
    path = tmp_path / "given.sock"
    with contextlib.ExitStack() as stack:
        if family == "tcp":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        else:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()
            address = f"unix:{path}"
        args = gunicorn("asgi", "fd://3")
        if way == "systemd":
            del args[args.index("-b") : args.index("-b") + 2]
        variables = "LISTEN_PID=$$ LISTEN_FDS=1" if way == "systemd" else ""
        script = f'exec 3<&{listener.fileno()}; {variables} exec "$@"'
        args = ["bash", "-c", script, "bash", *args]
        old = place.start_passing((listener.fileno(),), args, **QUICK)
        old.wait_for(*UP)
        new = place.start_passing((listener.fileno(),), args, **QUICK)
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0, old.log
        assert new.owns(ask(address).pid)
        assert new.stop() == 0
        assert family == "tcp" or path.exists()


def test_the_control_socket_passes_on(place: Deploys, tmp_path: Path) -> None:
    """It belongs to who serves, also after a rollback; a failed child does not touch it."""
    address, control = f"127.0.0.1:{free_port()}", tmp_path / "ctl"
    args = gunicorn("sync", address, "--control-socket", str(control))
    args.remove("--no-control-socket")
    listening = f"Control socket listening at {control}"
    old = up(place, args)
    old.wait_for(listening)
    assert start(place, args, DEMO_FAIL="import", **QUICK).wait() == 3
    assert _listener_of(control) == old.pid
    new = start(place, args, **QUICK)
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0, old.log
    new.wait_for(listening)
    assert _listener_of(control) == new.pid
    assert new.stop() == 0
    assert not control.exists()


def _listener_of(path: Path) -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, _, _ = struct.unpack("=iII", credentials)
    return int(pid)


@pytest.mark.parametrize("way", ["takeover", "rollback"])
def test_systemd_is_told_who_the_main_process_is(
    place: Deploys, address: str, tmp_path: Path, way: str
) -> None:
    """MAINPID comes from the new master while the old one still runs, and back."""
    args = gunicorn("sync", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        environ = {**WINDOW, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        old = start(place, args, **environ)
        old.wait_for(*UP)
        new = start(place, args, **environ)
        new.wait_for(TOOK_OVER)
        _wait_for_main(notify, new.pid)
        assert old.running
        if way == "rollback":
            new.signal(signal.SIGKILL)
            _wait_for_main(notify, old.pid)


def _wait_for_main(notify: socket.socket, pid: int) -> None:
    while f"MAINPID={pid}\n" not in notify.recv(4096).decode():
        pass


def test_no_descriptor_is_left_open_by_takeovers_that_fail(place: Deploys, address: str) -> None:
    """Neither in the parent nor in its workers."""
    args = gunicorn("sync", address, "-w", "1")
    parent = up(place, args)
    (worker,) = workers_of(parent)
    before = _descriptors(parent.pid, worker)
    for number in (1, 2):
        assert start(place, args, DEMO_FAIL="import", **QUICK).wait() == 3
        parent.wait_for(
            "exited before it had taken over; this instance keeps serving", count=number
        )
    # It may still be writing the record.
    eventually(lambda: _descriptors(parent.pid, worker) == before, "its descriptors as before")


def _descriptors(*pids: int) -> list[str]:
    found = []
    for entry in (entry for pid in pids for entry in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return sorted(found)


@EACH_WORKER
def test_workers_of_a_killed_master_leave(place: Deploys, address: str, worker: str) -> None:
    """They would go on to serve the old code, on a listener that others share."""
    # An idle sync worker would look for its master after half of this time.
    args = gunicorn(worker, address, "-w", "1", "--timeout", "240")
    instance = up(place, args)
    (pid,) = workers_of(instance)
    pidfd = os.pidfd_open(pid)
    with open(pidfd, "rb", closefd=True) as watched:
        instance.signal(signal.SIGKILL)
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        assert poll.poll(30_000)


@pytest.mark.parametrize("worker", ["gthread", "gevent", "asgi", "uvicorn"])
def test_workers_of_a_killed_master_give_the_address_up(
    place: Deploys, address: str, worker: str
) -> None:
    """Who starts next need not wait for the last of their answers; which they give."""
    args = gunicorn(worker, address, "-w", "2")
    killed = up(place, args)
    with Connection(address) as busy, Connection(address) as idle:
        busy.begin_upload()
        assert idle.get().status == 200
        killed.signal(signal.SIGKILL)
        following = up(place, args)
        assert following.owns(ask(address).pid)
        busy.send(b"hello")
        answer = busy.answer()
        assert (answer.status, answer.pid in workers_of(killed)) == (200, True)
    assert following.stop() == 0
