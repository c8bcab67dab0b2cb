"""gunicorn's own files, sockets and processes, each across a takeover."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from demo_app.deploys import DEADLINE, TOOK_OVER, UP, Deploys, Instance, free_port
from demo_app.load import LoadProcess, Mix
from tests.support import certificates
from tests.support.gunicorns import (
    EACH_WORKER,
    INSTALL,
    QUICK,
    STOPPED,
    WINDOW,
    Daemons,
    gunicorn,
    inside,
    only_line,
    own_config,
    parent_of,
    start,
    successor,
    takes_over,
    up,
    wait_for_end,
    workers_of,
)
from tests.support.processes import eventually
from tests.support.raw import Connection, ask, request

pytestmark = pytest.mark.once

# -- the pid file ----------------------------------------------------------------------------------


class Follower:
    """Reads a file over and over, from a thread, and keeps what it read whenever that changes."""

    def __init__(self, path: Path) -> None:
        self.seen: list[str] = []
        self._path = path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> list[str]:
        self._thread.start()
        return self.seen

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(0.0005):
            try:
                text = self._path.read_text()
            except FileNotFoundError:
                text = "no file"
            if self.seen[-1:] != [text]:
                self.seen.append(text)


def test_the_pid_file_names_who_serves_at_every_instant(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """Through a takeover, a child that fails, a rollback and the takeover after it: never no file,
    never an empty one, never another pid."""
    path = tmp_path / "pid"
    args = gunicorn("sync", address, "-w", "1", "--pid", str(path))
    first = up(place, args)
    with Follower(path) as seen:

        def names(instance: Instance) -> bool:
            return seen[-1:] == [f"{instance.pid}\n"]

        second = start(place, args, **WINDOW)
        second.wait_for(TOOK_OVER)
        assert first.wait() == 0
        assert start(place, args, DEMO_FAIL="import", **QUICK).wait() == 3
        third = takes_over(place, second, args)
        eventually(lambda: names(third), "the third named")
        third.signal(signal.SIGKILL)
        second.wait_for("Accepting again")
        eventually(lambda: names(second), "the second named")
        fourth = start(place, args, **QUICK)
        fourth.wait_for(TOOK_OVER)
        eventually(lambda: names(fourth), "the fourth named")
    assert seen == [f"{one.pid}\n" for one in (first, second, third, second, fourth)]


# -- the control socket ----------------------------------------------------------------------------


def gunicornc(control: Path, command: str = "show stats") -> dict[str, object]:
    """What gunicorn's own client is told."""
    client = Path(sysconfig.get_path("scripts")) / "gunicornc"
    done = subprocess.run(
        [sys.executable, client, "-s", control, "-c", command, "-j"],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_gunicornc_reaches_who_serves(place: Deploys, address: str, tmp_path: Path) -> None:
    """Before and after a takeover, and after a rollback, and its commands work there. A client
    that stays connected to the old master holds nobody up, and its end takes nothing away."""
    control = tmp_path / "ctl"
    args = gunicorn("sync", address, "-w", "1", "--control-socket", str(control))
    args.remove("--no-control-socket")
    listening = f"Control socket listening at {control}"
    first = start(place, args, **WINDOW)
    first.wait_for(listening)
    first.wait_for(*UP)
    assert gunicornc(control)["pid"] == first.pid
    with socket.socket(socket.AF_UNIX) as stays:
        stays.connect(str(control))
        second = start(place, args, **WINDOW)
        second.wait_for(listening)
        assert gunicornc(control)["pid"] == second.pid
    first.wait_for(STOPPED)
    assert gunicornc(control)["pid"] == second.pid
    second.signal(signal.SIGKILL)
    first.wait_for(listening, count=2)
    assert gunicornc(control)["pid"] == first.pid
    gunicornc(control, "worker add 1")
    first.wait_for("Booting worker with pid", count=2)
    third = start(place, args, **QUICK)
    third.wait_for(listening)
    assert gunicornc(control)["pid"] == third.pid
    assert third.stop() == 0
    assert not control.exists()


# -- the dirty arbiter -----------------------------------------------------------------------------

DIRTY = """
import os
import time

from gunicorn.dirty import DirtyApp, get_dirty_client

if os.environ.get("DEMO_FAIL"):
    raise RuntimeError("DEMO_FAIL")

class Pid(DirtyApp):
    def ask(self):
        time.sleep(0.05)
        return os.getpid()

def app(environ, start_response):
    pid = str(get_dirty_client().execute("dirty:Pid", "ask"))
    start_response("200 OK", [("Content-Length", str(len(pid))), ("X-Served-By", pid)])
    return [pid.encode()]
"""


def test_each_instance_has_a_dirty_arbiter_of_its_own(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """Its workers answer to the last request of its instance; a child that fails and one that dies
    in the window take nobody else's with them; each leaves nothing behind."""
    (tmp_path / "dirty.py").write_text(DIRTY)
    # Its sockets are in there, and a socket's path has no room for a long one.
    config, temporary = tmp_path / "some.conf.py", place.directory / "tmp"
    temporary.mkdir()
    # Once used, it waits until this has passed, even without a request under way.
    wait = "dirty_graceful_timeout = 1"
    config.write_text(f"dirty_apps = ['dirty:Pid']\ndirty_workers = 1\n{wait}\n{INSTALL}")
    args = own_config("gthread", address, config, "--pythonpath", str(tmp_path))
    args[args.index("wsgi:app")] = "dirty:app"
    environ = {"TMPDIR": str(temporary)}
    first = up(place, args, **environ)
    with LoadProcess(address, Mix(one_shot=4)) as load:
        load.wait(answers=20)
        assert start(place, args, DEMO_FAIL="1", **QUICK, **environ).wait() == 3
        load.wait(answers=20)
        assert first.owns(ask(address).pid)
        second = successor(place, first, args, **environ, **WINDOW)
        load.wait(answers=20)
        report = load.stop()
    assert not report.failures, report
    third = start(place, args, **environ, **WINDOW)
    third.wait_for(TOOK_OVER)
    second.wait_for(STOPPED)
    assert third.owns(ask(address).pid)
    third.signal(signal.SIGKILL)
    second.wait_for("Accepting again")
    wait_for_end(third)
    assert second.owns(ask(address).pid)
    assert second.stop() == 0
    assert list(temporary.iterdir()) == []


# -- logs and numbers ------------------------------------------------------------------------------


@EACH_WORKER
def test_usr1_reopens_the_logs_of_both(
    place: Deploys, address: str, tmp_path: Path, worker: str
) -> None:
    """Rotated while two masters live: the old one, its paused workers and the new ones let go of
    the files that were renamed, and write to new ones of the same names."""
    config, access, errors = (tmp_path / name for name in ("some.conf.py", "access", "errors"))
    config.write_text(AND_TO_STDOUT + INSTALL)
    logs = ("--access-logfile", str(access), "--error-logfile", str(errors))
    args = own_config(worker, address, config, "-w", "1", *logs)
    old = up(place, args, **WINDOW)
    assert ask(address).status == 200
    new = takes_over(place, old, args)
    for path in (access, errors):
        path.rename(f"{path}.1")
    for one in (old, new):
        one.signal(signal.SIGUSR1)
    holders = [old.pid, new.pid, *workers_of(old), *workers_of(new)]
    eventually(
        lambda: not any(holds(pid, f"{access}.1", f"{errors}.1") for pid in holders),
        "the logs opened anew",
    )
    assert all(holds(pid, str(errors)) for pid in holders)
    before = Path(f"{access}.1").read_text(), Path(f"{errors}.1").read_text()
    assert ask(address).status == 200
    old.signal(signal.SIGTERM)
    assert old.wait() == 0
    assert new.stop() == 0
    assert (Path(f"{access}.1").read_text(), Path(f"{errors}.1").read_text()) == before
    if worker != "uvicorn":  # it has an access log of its own
        assert access.read_text().count('"GET / HTTP/1.1" 200') == 1
    for one in (old, new):
        assert f"[{one.pid}] [INFO] Shutting down" in errors.read_text()


AND_TO_STDOUT = """
import logging
import sys

def on_starting(server):
    server.log.error_log.addHandler(logging.StreamHandler(sys.stdout))

"""


def holds(pid: int, *paths: str) -> bool:
    """Whether the process has one of the files open."""
    with contextlib.suppress(FileNotFoundError):
        return any(os.readlink(entry) in paths for entry in Path(f"/proc/{pid}/fd").iterdir())
    return holds(pid, *paths)  # one was closed just now


def test_statsd_hears_of_both(place: Deploys, address: str) -> None:
    """The last answers of the old instance are counted, beside those of the new one."""
    with contextlib.ExitStack() as stack:
        statsd = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        statsd.settimeout(DEADLINE)
        statsd.bind(("127.0.0.1", 0))
        to = "{}:{}".format(*statsd.getsockname())

        def args(name: str) -> list[str]:
            return gunicorn(
                *("gthread", address, "-w", "1", "--keep-alive", "30"),
                *("--statsd-host", to, "--statsd-prefix", name),
            )

        def counts(name: str) -> None:
            while not statsd.recv(4096).startswith(f"{name}.gunicorn.requests:1|c".encode()):
                pass

        old = up(place, args("old"), **WINDOW, HOTRESTART_NO_CONNECTION_HANDOVER="1")
        idle = stack.enter_context(Connection(address))
        assert idle.get().status == 200
        counts("old")
        new = start(place, args("new"), **WINDOW)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        assert ask(address).status == 200
        counts("new")
        assert old.owns(idle.get().pid)
        counts("old")


# -- places ----------------------------------------------------------------------------------------


def test_chdir_is_resolved_anew_by_each_instance(place: Deploys, tmp_path: Path) -> None:
    """Into a `current` link that is turned to the next release; what is relative there, the socket
    and the pid file in a shared directory, is still found."""
    current, shared = tmp_path / "current", tmp_path / "shared"
    shared.mkdir()
    for release in ("1", "2"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "app.py").write_text(RELEASE.format(release=release))
        (tmp_path / release / "shared").symlink_to(shared)
    current.symlink_to("1")
    args = gunicorn("sync", "unix:shared/app.sock", "--pid", "shared/pid", "--chdir", str(current))
    args[args.index("wsgi:app")] = "app:app"
    old = up(place, inside(tmp_path, args))
    address = f"unix:{shared}/app.sock"
    assert ask(address).body == b"1"
    current.unlink()
    current.symlink_to("2")
    new = successor(place, old, inside(Path("/"), args))
    assert ask(address).body == b"2"
    assert int((shared / "pid").read_text()) == new.pid
    assert new.stop() == 0
    assert list(shared.iterdir()) == []


RELEASE = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "1")])
    return [b"{release}"]
"""


def test_daemon(place: Deploys, address: str, tmp_path: Path) -> None:
    """The same command again, which returns at once, is the whole deploy; at the end nothing is
    left, neither a process nor a file."""
    pid_file = tmp_path / "pid"
    with Daemons(place, gunicorn("gthread", address), pid_file) as daemons:
        old, old_pid = daemons.start(UP[1])
        assert parent_of(ask(address).pid) == old_pid
        new, new_pid = daemons.start(TOOK_OVER)
        wait_for_end(old)
        assert parent_of(ask(address).pid) == new_pid != old_pid
        os.kill(new_pid, signal.SIGTERM)
        wait_for_end(new)
    assert not pid_file.exists()
    left = {path.name for path in (place.directory / "meet").iterdir() if path.suffix != ".json"}
    assert left == {"lock", "record.lock", "tickets"}  # and the record


@EACH_WORKER
def test_workers_that_are_recycled(
    place: Deploys, address: str, tmp_path: Path, worker: str
) -> None:
    """`max_requests` reached again and again, in both instances, throughout the takeovers."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    limits = ("--max-requests", "10", "--max-requests-jitter", "5")
    args = gunicorn(worker, address, *limits, "--worker-tmp-dir", str(temporary))
    current = up(place, args)
    # Not too many: `asgi` writes a line for each request that it answers beyond the limit.
    with LoadProcess(address, Mix(one_shot=8), pause=0.05) as load:
        current.wait_for("Booting worker with pid", count=6)
        current = successor(place, current, args)
        current.wait_for("Booting worker with pid", count=6)
        report = load.stop()
    assert not report.failures, report
    missing = start(place, [*args[:-1], str(tmp_path / "none")], **QUICK)
    assert missing.wait() != 0
    assert f"pid {current.pid}) keeps serving" in only_line(missing.log, "Takeover failed")
    assert ask(address).pid in workers_of(current)  # with this answer it may have gone


def test_a_worker_that_is_used_up_in_the_window_is_not_replaced(
    place: Deploys, address: str
) -> None:
    """By `max_requests`: one started in its place would run the code that is on disk by now."""
    args = gunicorn("gthread", address, "--keep-alive", "30", "--max-requests", "2")
    old = up(place, args, **WINDOW, HOTRESTART_NO_CONNECTION_HANDOVER="1")
    pids = workers_of(old)
    with Connection(address) as idle:
        pid = idle.get().pid
        new = takes_over(place, old, args)
        assert idle.get().pid == pid
    old.wait_for(f"Worker exiting (pid: {pid})")
    new.signal(signal.SIGKILL)
    old.wait_for("1 of 2 workers are left")
    old.wait_for("Accepting again")
    assert workers_of(old) == pids


# -- listeners -------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["sync", "gthread", "uvicorn"])
def test_tls_of_each_worker(place: Deploys, address: str, tmp_path: Path, worker: str) -> None:
    """The takeover of `asgi` is in test_gunicorn_config.py."""
    key, chain, ca = certificates.issue(tmp_path)
    args = gunicorn(worker, address, "--certfile", str(chain), "--keyfile", str(key))
    # The worker passes a deprecated constant of gunicorn's defaults on to uvicorn.
    environ = {"PYTHONWARNINGS": "default"} if worker == "uvicorn" else {}
    old = up(place, args, **environ)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4), ca_file=ca) as load:
        load.wait(answers=20)
        successor(place, old, args, **environ)
        load.wait(answers=20)
        report = load.stop()
    assert not report.failures, report
    assert not report.closed_idle, report


@EACH_WORKER
def test_preload(place: Deploys, address: str, worker: str) -> None:
    """The app is loaded by the master: that of the new instance is the new version."""
    args = gunicorn(worker, address, "--preload")
    old = up(place, args)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4)) as load:
        load.wait(answers=50)
        assert json.loads(ask(address).body)["version"] == "1"
        successor(place, old, args, DEMO_VERSION="2")
        assert json.loads(ask(address).body)["version"] == "2"
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report
    assert not report.closed_idle, report


@pytest.mark.parametrize("worker", ["sync", "asgi"])
def test_an_abstract_socket(place: Deploys, worker: str, tmp_path: Path) -> None:
    """gunicorn binds none, but can be given one; its own stop stumbles over the name."""
    name = f"\0{tmp_path}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        fd = listener.fileno()
        args = gunicorn(worker, f"fd://{fd}")
        old = place.start_passing((fd,), args, **QUICK)
        old.wait_for(*UP)
        new = place.start_passing((fd,), args, **QUICK)
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0, old.log
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE)
            client.connect(name)
            client.sendall(request(more="Connection: close\r\n"))
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 200 OK\r\n")
        assert new.stop() == 0, new.log


def test_other_addresses_than_before(place: Deploys, tmp_path: Path) -> None:
    """One is kept, which never refuses; one is new; one is dropped: nobody listens there once the
    old instance has gone, and not before it is sure that it will go."""
    kept, dropped, added = (f"127.0.0.1:{free_port()}" for _ in range(3))
    path, gone = f"unix:{tmp_path}/kept.sock", tmp_path / "gone.sock"
    before = gunicorn("gthread", kept, "-b", dropped, "-b", path, "-b", f"unix:{gone}")
    after = gunicorn("gthread", added, "-b", path, "-b", kept)
    old = up(place, before, **WINDOW)
    with (
        LoadProcess(kept, Mix(one_shot=4, keep_alive=4)) as load,
        LoadProcess(path, Mix(one_shot=4)) as over_path,
    ):
        load.wait(answers=50)
        assert start(place, after, DEMO_FAIL="import", **QUICK).wait() == 3
        with pytest.raises(ConnectionRefusedError):
            ask(added)
        new = start(place, after, **WINDOW)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        for one in (kept, path, added):
            assert new.owns(ask(one).pid)
        load.wait(answers=50)
        over_path.wait(answers=50)
        assert gone.exists()
        with Connection(dropped) as waits:
            waits.send(request())
            old.signal(signal.SIGTERM)
            assert old.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            ask(dropped)
        assert not gone.exists()
        load.wait(answers=50)
        reports = load.stop(), over_path.stop()
    assert not any(report.failures for report in reports), reports
