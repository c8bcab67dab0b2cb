"""gunicorn's signals mean what they mean to gunicorn: before, during and after a takeover.

What a replaced master makes of them, and a reload in the midst of a takeover, is in
faults/test_gunicorn_faults.py; USR1 to both is in test_gunicorn_things.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance
from demo_app.load import LoadProcess, Mix
from tests.support.gunicorns import (
    INSTALL,
    QUICK,
    Daemons,
    children_of,
    gunicorn,
    only_line,
    parent_of,
    start,
    successor,
    up,
    wait_for_end,
)
from tests.support.processes import eventually
from tests.support.raw import Connection, ask, request

pytestmark = pytest.mark.once

BOOTING = "Booting worker with pid"
BY_SIGNAL = pytest.mark.parametrize("name", ["TERM", "INT", "QUIT"])


class Gate:
    """A pipe that workers open for reading in the app's import: that waits until it is open."""

    def __init__(self, directory: Path) -> None:
        self._path, self._directory = directory / "gate", directory
        self._fd = -1
        os.mkfifo(self._path)
        (directory / "gated.py").write_text(
            f"open({str(self._path)!r}).close()\nfrom wsgi import app\n"
        )

    def args(self, args: list[str]) -> list[str]:
        """The command line with the app behind the gate."""
        gated = ["gated:app" if arg == "wsgi:app" else arg for arg in args]
        return [*gated, "--pythonpath", str(self._directory)]

    def open(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def has_workers(instance: Instance, number: int) -> None:
    eventually(lambda: len(children_of(instance.pid)) == number, f"{number} workers")


def has_none_of(instance: Instance, workers: set[int]) -> None:
    eventually(lambda: not children_of(instance.pid) & workers, "the earlier workers end")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Holds up a new instance in its boot."""
    made = Gate(tmp_path)
    yield made
    made.close()


def send(instance: Instance, name: str) -> None:
    """Send a signal; it has been handled when the next one is."""
    instance.signal(signal.Signals[f"SIG{name}"])
    instance.wait_for(f"Handling signal: {name.lower()}")


def test_to_an_instance_that_boots(place: Deploys, address: str, gate: Gate) -> None:
    """TTIN and TTOU change the number of workers, HUP starts others; then it takes over, with
    those that it has by then."""
    args = gunicorn("gthread", address)
    old = up(place, args)
    new = start(place, gate.args(args), **QUICK)
    new.wait_for(BOOTING, count=2)
    send(new, "TTIN")
    new.wait_for(BOOTING, count=3)
    send(new, "USR1")
    send(new, "WINCH")  # for daemons
    send(new, "TTOU")
    assert old.owns(ask(address).pid)
    send(new, "HUP")
    new.wait_for(BOOTING, count=5)
    gate.open()
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0, old.log
    assert new.owns(ask(address).pid)
    has_workers(new, 2)
    assert new.stop() == 0


def test_to_the_instance_that_is_taken_over_from(place: Deploys, address: str, gate: Gate) -> None:
    """While the new one boots, it goes on as if nobody were there."""
    args = gunicorn("gthread", address)
    old = up(place, args)
    with LoadProcess(address, Mix(one_shot=4)) as load:
        load.wait(answers=20)
        new = start(place, gate.args(args), **QUICK)
        new.wait_for(BOOTING, count=2)
        for name, workers in (("TTIN", 3), ("TTOU", 2), ("USR1", 2), ("WINCH", 2), ("HUP", 2)):
            before = children_of(old.pid)
            send(old, name)
            has_workers(old, workers)
            if name == "HUP":
                has_none_of(old, before)
            load.wait(answers=10)
            assert old.owns(ask(address).pid)
        gate.open()
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0, old.log
        load.wait(answers=20)
        report = load.stop()
    assert not report.failures, report


def test_to_the_instance_that_took_over(place: Deploys, address: str, tmp_path: Path) -> None:
    """The same to the new one, whose pid file stays its own."""
    pid_file = tmp_path / "pid"
    args = gunicorn("gthread", address, "--pid", str(pid_file))
    new = successor(place, up(place, args), args)
    with LoadProcess(address, Mix(one_shot=4)) as load:
        load.wait(answers=20)
        before = children_of(new.pid)
        send(new, "HUP")
        has_none_of(new, before)
        has_workers(new, 2)
        for name, workers in (("TTIN", 3), ("TTOU", 2), ("USR1", 2), ("WINCH", 2)):
            send(new, name)
            has_workers(new, workers)
            load.wait(answers=10)
        report = load.stop()
    assert not report.failures, report
    assert int(pid_file.read_text()) == new.pid
    third = successor(place, new, args)
    assert int(pid_file.read_text()) == third.pid


@BY_SIGNAL
def test_the_old_master_is_stopped_while_the_new_one_boots(
    place: Deploys, tmp_path: Path, gate: Gate, name: str
) -> None:
    """It ends as ever; who comes meanwhile waits for the new one, which goes on alone, and ends
    by the same signal as the first one would.

    Not with gthread, whose workers hang if INT or QUIT meets them where they take up a request:
    gunicorn's handler then waits for a lock that the interrupted code holds.
    """
    path, pid_file = tmp_path / "app.sock", tmp_path / "pid"
    args = gunicorn("sync", f"unix:{path}", "-w", "2", "--pid", str(pid_file))
    old = up(place, args)
    new = start(place, gate.args(args), **QUICK)
    new.wait_for(BOOTING, count=2)
    old.signal(signal.Signals[f"SIG{name}"])
    assert old.wait() == 0, old.log
    with Connection(f"unix:{path}") as waits:
        waits.send(request())
        gate.open()
        assert new.owns(waits.answer().pid)
    eventually(pid_file.exists, "the pid file")
    assert int(pid_file.read_text()) == new.pid
    new.signal(signal.Signals[f"SIG{name}"])
    assert new.wait() == 0, new.log
    assert not path.exists()
    assert not pid_file.exists()


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_the_new_master_is_stopped_while_it_boots(
    place: Deploys, tmp_path: Path, gate: Gate, name: str
) -> None:
    """The old one has all that it had. QUIT is in faults/test_gunicorn_faults.py."""
    path, pid_file = tmp_path / "app.sock", tmp_path / "pid"
    args = gunicorn("sync", f"unix:{path}", "-w", "2", "--pid", str(pid_file))
    old = up(place, args)
    new = start(place, gate.args(args), **QUICK)
    new.wait_for(BOOTING, count=2)
    send(new, name)
    gate.open()
    new.wait()
    assert new.log.count("Worker exiting") == 2  # by themselves: not killed at the end of the grace
    assert f"pid {old.pid}) keeps serving" in only_line(new.log, "Takeover failed")
    assert old.owns(ask(f"unix:{path}").pid)
    assert int(pid_file.read_text()) == old.pid
    successor(place, old, args)


ONCE = """
import os, signal
def once():
    try:
        os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGTERM)
"""
BEHIND_THE_FORK = """
from gunicorn.glogging import Logger
class logger_class(Logger):
    def info(self, message, *args, **more):
        super().info(message, *args, **more)
        if message.startswith("Booting"):
            once()
"""
IN_AN_EXCEPT = """
try:
    once()
except BaseException:
    pass
from wsgi import app
"""


@pytest.mark.parametrize("worker", ["sync", "gthread", "gevent", "asgi"])
@pytest.mark.parametrize("moment", ["behind the fork", "in a bare except"])
def test_a_worker_that_is_told_to_end_before_it_serves_ends(
    place: Deploys, address: str, tmp_path: Path, worker: str, moment: str
) -> None:
    """gunicorn has no handler yet, or the app has swallowed what ended it: another one serves."""
    once = ONCE.format(mark=str(tmp_path / "mark"))
    args = gunicorn(worker, address, "-w", "1", "--pythonpath", str(tmp_path))
    if moment == "behind the fork":
        config = tmp_path / "conf.py"
        config.write_text(INSTALL + once + BEHIND_THE_FORK)
        args[args.index("-c") + 1] = str(config)
    else:
        app = next(arg for arg in args if arg.endswith(":app"))
        swallows = IN_AN_EXCEPT.replace("wsgi", app.removesuffix(":app"))
        (tmp_path / "swallows.py").write_text(once + swallows)
        args[args.index(app)] = "swallows:app"
    instance = up(place, args)
    (serves,) = children_of(instance.pid)
    booted = [line.split()[-1] for line in instance.log.splitlines() if BOOTING in line]
    assert len(booted) == 2
    assert f"Worker exiting (pid: {booted[0]})" in instance.log
    assert ask(address).pid == serves == int(booted[1])


def test_workers_of_a_config_that_no_longer_installs_us_can_be_stopped(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """HUP has read it: nobody of ours is in the worker to let the signals in."""
    config = tmp_path / "conf.py"
    config.write_text(INSTALL)
    args = gunicorn("sync", address, "-w", "1")
    args[args.index("-c") + 1] = str(config)
    instance = up(place, args)
    config.write_text("")
    send(instance, "HUP")
    instance.wait_for(BOOTING, count=2)
    eventually(lambda: instance.log.count("Worker exiting") == 1, "the first worker ends")
    assert ask(address).status == 200
    assert instance.stop() == 0
    assert instance.log.count("Worker exiting") == 2


OWN_HANDLER = """
import signal
def mine(number, frame):
    raise SystemExit(0)
signal.signal(signal.SIGINT, mine)
def app(environ, start_response):
    now = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    body = " ".join(one.__qualname__ for one in now).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


def test_a_handler_of_the_app_s_own_stays(place: Deploys, address: str, tmp_path: Path) -> None:
    """As with gunicorn alone: the others are gunicorn's once the app is loaded."""
    (tmp_path / "handles.py").write_text(OWN_HANDLER)
    args = gunicorn("sync", address, "-w", "1", "--pythonpath", str(tmp_path))
    args[args.index("wsgi:app")] = "handles:app"
    instance = up(place, args)
    assert ask(address).body == b"mine Worker.handle_exit"
    assert instance.stop() == 0


def test_winch_to_a_daemon(place: Deploys, address: str, tmp_path: Path) -> None:
    """It stops the workers; a master that has none is taken over from like any other."""
    with Daemons(place, gunicorn("gthread", address), tmp_path / "pid") as daemons:
        old, old_pid = daemons.start(UP[1])
        os.kill(old_pid, signal.SIGWINCH)
        eventually(lambda: not children_of(old_pid), "its workers end")
        with Connection(address) as waits:
            waits.send(request())
            new, new_pid = daemons.start(TOOK_OVER)
            assert parent_of(waits.answer().pid) == new_pid
        wait_for_end(old)
        os.kill(new_pid, signal.SIGTERM)
        wait_for_end(new)
