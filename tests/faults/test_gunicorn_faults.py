"""gunicorn with our hooks: what goes wrong, and who serves then."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, Deploys, free_port
from demo_app.load import LoadProcess, Mix
from tests.support.gunicorns import (
    EACH_WORKER,
    EX_CONFIG,
    INSTALL,
    QUICK,
    STOPPED,
    WINDOW,
    WORKERS,
    booted,
    gunicorn,
    holds_socket,
    kill,
    listening_inode,
    only_line,
    own_config,
    start,
    successor,
    takes_over,
    up,
    workers_of,
)
from tests.support.processes import eventually
from tests.support.raw import Connection, ask

pytestmark = pytest.mark.faults

FAULTS = [
    *((worker, fault, []) for worker in WORKERS for fault in ("import", "hang")),
    *((worker, "lifespan", []) for worker in ("asgi", "uvicorn")),
    *(
        (worker, fault, ["--preload"])
        for worker in ("sync", "asgi")
        for fault in ("import", "hang")
    ),
]


@pytest.mark.parametrize(("worker", "fault", "preload"), FAULTS)
def test_a_child_that_fails_changes_nothing(
    place: Deploys, tmp_path: Path, worker: str, fault: str, preload: list[str]
) -> None:
    """A status that is not 0 and one line that says why; no client notices, the pid file stays,
    and the next one takes over."""
    address, pid_file = f"127.0.0.1:{free_port()}", tmp_path / "pid"
    args = gunicorn(worker, address, "--pid", str(pid_file))
    parent = up(place, args)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4)) as load:
        load.wait(answers=50)
        wait = {"HOTRESTART_READY_TIMEOUT": "1.5"} if fault == "hang" else {}
        child = start(place, [*args, *preload], DEMO_FAIL=fault, **QUICK, **wait)
        status = child.wait()
        if preload:  # before it has met anybody
            line = only_line(child.log, "Start failed")
        else:
            line = only_line(child.log, "Takeover failed")
            assert f"pid {parent.pid}) keeps serving" in line
            assert "Traceback" not in child.log.rpartition("Worker exiting")[2]
        if fault == "hang":
            assert "within 1.5 s" in line
        # gunicorn itself ends with 1 if the app cannot be preloaded.
        assert status == (1 if preload and fault == "import" else 3)
        load.wait(answers=50)
        assert int(pid_file.read_text()) == parent.pid
        assert parent.owns(ask(address).pid)
        successor(place, parent, args)
        report = load.stop()
    assert not report.failures, report


@EACH_WORKER
def test_a_child_whose_worker_dies_in_its_start(
    place: Deploys, address: str, tmp_path: Path, worker: str
) -> None:
    """By a signal, say: gunicorn alone would start another one, for ever."""
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    args = gunicorn(worker, address)
    parent = up(place, args)
    app = next(arg for arg in args if arg.endswith(":app"))
    wrong = ["dies:app" if arg == app else arg for arg in args]
    child = start(place, wrong, **QUICK, PYTHONPATH=str(tmp_path))
    assert child.wait() == 3
    assert "ended before it was ready" in only_line(child.log, "Takeover failed")
    successor(place, parent, args)


@EACH_WORKER
def test_the_parent_serves_again_if_its_successor_dies_in_the_window(
    place: Deploys, address: str, tmp_path: Path, worker: str
) -> None:
    """With the workers that it has, and its pid file; the next instance takes over from it."""
    pid_file = tmp_path / "pid"
    args = gunicorn(worker, address, "--pid", str(pid_file))
    parent = up(place, args, **WINDOW)
    pids = workers_of(parent)
    child = takes_over(place, parent, args)
    kill(child)
    parent.wait_for("this instance serves again")
    parent.wait_for("Accepting again")
    assert int(pid_file.read_text()) == parent.pid
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4)) as load:
        load.wait(answers=200)
        start(place, args, **QUICK).wait_for(TOOK_OVER)
        parent.wait_for(STOPPED, count=2)
        parent.signal(signal.SIGTERM)
        assert parent.wait() == 0
        load.wait(answers=200)
        report = load.stop()
    assert not report.failures, report
    assert workers_of(parent) == pids  # no other was started
    assert pids & report.by_pid.keys()


@pytest.mark.parametrize("worker", ["gthread", "asgi", "uvicorn"])
def test_rolled_back_connections_are_kept_alive_again(
    place: Deploys, address: str, worker: str
) -> None:
    """`Connection: close` ends with the pause."""
    args = gunicorn(worker, address, "-w", "1")
    parent = up(place, args, **WINDOW)
    child = takes_over(place, parent, args)
    kill(child)
    parent.wait_for("Accepting again")
    with Connection(address) as connection:
        assert not connection.get().closes
        assert not connection.get().closes


@pytest.mark.parametrize("worker", ["gthread", "asgi", "uvicorn"])
def test_a_worker_that_leaves_does_not_accept_again(
    place: Deploys, address: str, worker: str
) -> None:
    """One less by TTOU, still busy when a takeover is rolled back: it would cut off what came."""
    patient = ("--graceful-timeout", "600", "--timeout", "600", "--keep-alive", "60")
    args = gunicorn(worker, address, "-w", "1", *patient)
    parent = up(place, args, **WINDOW)
    # One behind the other: two that start at once write their lines in any order.
    parent.signal(signal.SIGTTIN)
    parent.wait_for("Booting worker with pid", count=2)
    with contextlib.ExitStack() as stack:
        busy: dict[int, Connection] = {}
        while len(busy) < 2:
            one = stack.enter_context(Connection(address))
            busy.setdefault(one.get().pid, one)
        for one in busy.values():
            one.begin_upload()
        parent.signal(signal.SIGTTOU)
        _oldest, stays = booted(parent)
        eventually(lambda: {ask(address).pid for _ in range(8)} == {stays}, "one worker answers")
        child = takes_over(place, parent, args)
        kill(child)
        parent.wait_for("Accepting again")
        assert {ask(address).pid for _ in range(20)} == {stays}
        for one in busy.values():
            one.send(b"hello")
            assert one.answer().status == 200
    assert parent.stop() == 0


def test_a_worker_that_dies_in_the_window_is_not_replaced(place: Deploys, address: str) -> None:
    """The code on disk is the new one: a worker started now might be the broken one."""
    args = gunicorn("sync", address)
    parent = up(place, args, **WINDOW)
    pids = workers_of(parent)
    child = takes_over(place, parent, args)
    os.kill(min(pids), signal.SIGKILL)
    parent.wait_for(f"Worker (pid:{min(pids)}) was sent SIGKILL!")
    child.signal(signal.SIGKILL)
    parent.wait_for("3 of 4 workers are left")
    parent.wait_for("Accepting again")
    assert workers_of(parent) == pids
    parent.signal(signal.SIGHUP)  # the code is good again
    parent.wait_for("Booting worker with pid", count=8)


@pytest.mark.parametrize("worker", ["gthread", "gevent", "asgi"])
def test_after_the_window_whoever_connects_is_refused(
    place: Deploys, address: str, worker: str
) -> None:
    """The old instance still drains and never accepts again: if the new one is killed then, no
    client waits for it."""
    args = gunicorn(worker, address)
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="600")
    with Connection(address) as busy:
        busy.begin_upload()
        new = start(place, args, **WINDOW)
        new.wait_for(TOOK_OVER)
        masters_and_workers = {old.pid, *workers_of(old)}
        listener = listening_inode(address)
        eventually(
            lambda: not any(holds_socket(pid, listener) for pid in masters_and_workers),
            "the old instance closes its copies of the listener",
        )
        kill(new)
        with pytest.raises(ConnectionRefusedError):
            ask(address)
        busy.send(b"hello")
        assert old.owns(busy.answer().pid)
    assert old.wait() == 0
    assert "serves again" not in old.log


def test_a_successor_that_is_stopped_on_purpose_is_not_rolled_back(
    place: Deploys, address: str
) -> None:
    """Stopping the service within the rollback window stops the service."""
    args = gunicorn("asgi", address)
    parent = up(place, args, **WINDOW)
    child = takes_over(place, parent, args)
    assert child.stop() == 0
    assert parent.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        ask(address)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_the_old_master_can_be_stopped_in_the_window(
    place: Deploys, tmp_path: Path, number: signal.Signals
) -> None:
    """It ends at once, with 0, and takes nothing from its successor."""
    path, pid_file = tmp_path / "app.sock", tmp_path / "pid"
    args = gunicorn("gthread", f"unix:{path}", "--pid", str(pid_file))
    parent = up(place, args, **WINDOW)
    child = takes_over(place, parent, args)
    parent.signal(number)
    assert parent.wait() == 0, parent.log
    assert child.owns(ask(f"unix:{path}").pid)
    assert int(pid_file.read_text()) == child.pid


@pytest.mark.parametrize("name", ["HUP", "TTIN", "TTOU", "USR2"])
def test_a_replaced_master_changes_nothing_any_more(
    place: Deploys, address: str, tmp_path: Path, name: str
) -> None:
    """HUP would end it over the pid file, and start workers with the new code."""
    args = gunicorn("sync", address, "--pid", str(tmp_path / "pid"))
    parent = up(place, args, **WINDOW)
    child = takes_over(place, parent, args)
    parent.signal(signal.Signals[f"SIG{name}"])
    parent.wait_for(f"Ignored SIG{name}")
    child.signal(signal.SIGKILL)
    parent.wait_for("Accepting again")
    assert parent.running


def test_a_child_that_is_stopped_before_it_is_ready(place: Deploys, address: str) -> None:
    """The parent has its Unix paths and its signals again."""
    args = gunicorn("sync", address)
    parent = up(place, args)
    child = start(place, args, DEMO_FAIL="hang", **QUICK)
    parent.wait_for("Takeover started by pid")
    child.wait_for("Booting worker with pid", count=4)
    child.signal(signal.SIGQUIT)
    child.wait()
    assert f"pid {parent.pid}) keeps serving" in only_line(child.log, "Takeover failed")
    parent.wait_for("exited before it had taken over; this instance keeps serving")
    successor(place, parent, args)


def test_hup_in_the_middle_of_a_takeover(place: Deploys, address: str, tmp_path: Path) -> None:
    """The parent reloads as ever; the child takes over afterwards."""
    pid_file = tmp_path / "pid"
    args = gunicorn("sync", address, "--pid", str(pid_file))
    parent = up(place, args)
    hanging = start(place, args, DEMO_FAIL="hang", **QUICK)
    parent.wait_for("Takeover started by pid")
    parent.signal(signal.SIGHUP)
    parent.wait_for("Booting worker with pid", count=8)
    hanging.signal(signal.SIGKILL)
    parent.wait_for("exited before it had taken over")
    assert int(pid_file.read_text()) == parent.pid
    successor(place, parent, args)


def test_a_foreign_pid_in_the_pid_file(place: Deploys, address: str, tmp_path: Path) -> None:
    """'Already running on PID', as gunicorn says."""
    pid_file = tmp_path / "pid"
    pid_file.write_text(f"{os.getpid()}\n")
    args = gunicorn("sync", address, "--pid", str(pid_file))
    instance = start(place, args, **QUICK)
    assert instance.wait() == 1
    assert f"Already running on PID {os.getpid()}" in instance.log
    pid_file.unlink()
    parent = up(place, gunicorn("sync", address))
    pid_file.write_text(f"{os.getpid()}\n")
    child = start(place, args, **QUICK)
    assert child.wait() == 1
    assert "Already running on PID" in child.log
    assert parent.owns(ask(address).pid)


def test_the_address_is_taken_by_somebody_else(place: Deploys) -> None:
    """The line says who holds it, where was looked, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        instance = start(place, gunicorn("sync", f"127.0.0.1:{port}"))
        assert instance.wait() == EX_CONFIG
    assert f"127.0.0.1:{port} is taken by pid {os.getpid()}" in instance.log
    assert "hotrestart_dir" in instance.log
    assert "Traceback" not in instance.log


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("hotrestart_drian_timeout = 7", "hotrestart_drian_timeout is no option"),
        ("hotrestart_drain_timeout = 'soon'", "hotrestart_drain_timeout: 'soon' is not"),
        ("hotrestart_probe = 'health'", "hotrestart_probe: 'health' is neither /path nor"),
        ("reuse_port = True", "reuse_port and hot restart do not go together"),
        ("certfile = '/none.pem'", 'certfile "/none.pem" does not exist'),
        ("bind = 'fd://77'", "descriptor 77 is no socket"),
        ("bind = 'unix:' + 'x' * 120", "a Unix socket's path may have 107"),
        ("hotrestart_dir = '/proc/none'", "/proc/none cannot be used to meet in"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    place: Deploys, address: str, tmp_path: Path, config: str, said: str
) -> None:
    """With a status of its own, and without a traceback."""
    path = tmp_path / "some.conf.py"
    path.write_text(f"{config}\n{INSTALL}")
    args = own_config("sync", address, path)
    if config.startswith("bind"):
        del args[args.index("-b") : args.index("-b") + 2]
    environ = {"HOTRESTART_DIR": ""} if "_dir" in config else {}
    instance = start(place, args, **environ)
    assert instance.wait() == EX_CONFIG, instance.log
    only_line(instance.log, said)
    assert "Traceback" not in instance.log
