"""What a deploy under gunicorn is made of: the probe, USR2, the record, connections that move."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, free_port
from demo_app.load import LoadProcess, Mix
from hotrestart_plugins.core.address import parse
from hotrestart_plugins.core.rendezvous import default_directory
from tests.support.gunicorns import (
    EACH_WORKER,
    EX_CONFIG,
    INSTALL,
    QUICK,
    STOPPED,
    WINDOW,
    gunicorn,
    only_line,
    own_config,
    start,
    successor,
    takes_over,
    up,
    workers_of,
)
from tests.support.raw import Connection, ask


def record_of(place: Deploys, child: Instance | int) -> dict[str, Any]:
    return place.record_of(child if isinstance(child, int) else child.pid)


def steps_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step["by"], step["step"]) for step in record["steps"]]


# -- the record ------------------------------------------------------------------------------------


@EACH_WORKER
def test_the_record_of_a_takeover(place: Deploys, address: str, worker: str) -> None:
    """Both pids, what went over, each step; how many requests were answered while draining."""
    args = gunicorn(worker, address, "-w", "1")
    old = up(place, args, **WINDOW, HOTRESTART_NO_CONNECTION_HANDOVER="1")
    with Connection(address) as busy:
        busy.begin_upload()
        new = start(place, args, **QUICK)
        new.wait_for(UP[1])  # it has written its part of the record
        if worker != "sync":  # one that waits for its client cannot say so
            old.wait_for(STOPPED)
        busy.send(b"hello")
        assert busy.answer().status == 200
        old.wait_for(STOPPED)
    old.signal(signal.SIGTERM)
    assert old.wait() == 0, old.log
    record = record_of(place, new)
    assert record["outcome"] == "taken over"
    assert record["new"] == {"pid": new.pid, "inherited": [address], "bound": []}
    assert (record["old"]["pid"], record["old"]["given"]) == (old.pid, [address])
    assert steps_of(record) == [
        ("new", "started"),
        ("new", "listeners inherited"),
        ("new", "ready"),
        ("old", "stopped accepting"),
        ("old", "drained"),
    ]
    stats = record["old"]["drain"]
    assert stats["aborted_requests"] == 0
    if worker != "sync":
        assert (stats["requests"], stats["finished"]) == (1, 1)
        only_line(old.log, "Drained: 1 request answered")


@EACH_WORKER
def test_what_the_drain_cuts_off_is_counted(place: Deploys, address: str, worker: str) -> None:
    """At warning level, and in the record; within its time, not gunicorn's."""
    args = gunicorn(worker, address, "-w", "1")
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="1")
    with Connection(address) as busy:
        busy.begin_upload()
        new = start(place, args, **QUICK)
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0, old.log
    assert "[WARNING] The drain timeout ended: aborted 1 request" in old.log
    assert record_of(place, new)["old"]["drain"]["aborted_requests"] == 1


@pytest.mark.parametrize("worker", ["gthread", "asgi"])
def test_the_record_of_a_failure_and_of_a_rollback(
    place: Deploys, address: str, worker: str
) -> None:
    """Whoever is left says what has become of it."""
    args = gunicorn(worker, address, "-w", "1")
    parent = up(place, args, **WINDOW)
    failed = start(place, args, DEMO_FAIL="import", **QUICK)
    assert failed.wait() != 0
    record = record_of(place, failed)
    assert record["outcome"] == "failed"
    child = takes_over(place, parent, args)
    child.signal(signal.SIGKILL)
    parent.wait_for("Accepting again")
    ask(address)
    record = record_of(place, child)
    assert record["outcome"] == "rolled back"
    assert steps_of(record)[-1] == ("old", "accepting again")


# -- the probe -------------------------------------------------------------------------------------


@EACH_WORKER
@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ("/", ""),
        ("/nowhere", "the probe /nowhere was answered with 404"),
        ("checks:sick", "the probe checks:sick failed: ValueError: too old a schema"),
        ("checks:no", "the probe checks:no said no"),
    ],
)
def test_a_probe_is_asked_before_the_takeover(
    place: Deploys, address: str, tmp_path: Path, *, worker: str, probe: str, said: str
) -> None:
    """A sick child exits with 3 and says what it was asked, having accepted nothing."""
    (tmp_path / "checks.py").write_text(
        "def sick(): raise ValueError('too old a schema')\nasync def no(): return False\n"
    )
    args = gunicorn(worker, address, "-w", "1")
    old = up(place, args)
    new = start(place, args, **QUICK, HOTRESTART_PROBE=probe, PYTHONPATH=str(tmp_path))
    if said:
        assert new.wait() == 3, new.log
        assert said in new.log
        assert "Traceback" not in new.log
        assert old.owns(ask(address).pid)
    else:
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0, old.log
        assert new.owns(ask(address).pid)


def test_a_probe_of_an_app_without_a_lifespan(place: Deploys, address: str) -> None:
    """gunicorn's asgi worker may be told to have none."""
    args = gunicorn("asgi", address, "-w", "1", "--asgi-lifespan", "off")
    old = up(place, args, HOTRESTART_PROBE="/")
    sick = start(place, args, **QUICK, HOTRESTART_PROBE="/nowhere")
    assert sick.wait() == 3, sick.log
    assert "the probe /nowhere was answered with 404" in sick.log
    successor(place, old, args, HOTRESTART_PROBE="/")


def test_websockets_of_asgi_are_told_to_come_back(place: Deploys, address: str) -> None:
    """With 1012, before the drain cuts them off; gunicorn alone says 1011, or nothing."""
    args = gunicorn("asgi", address, "-w", "1")
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="3")
    with LoadProcess(address, Mix(websocket=4, one_shot=2)) as load:
        load.wait(answers=50)
        new = successor(place, old, args)
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report
    assert report.ws_restarts >= 4, report
    assert record_of(place, new)["old"]["drain"]["websockets"] == 4


# -- USR2 and HUP ----------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["gthread", "asgi"])
def test_usr2_is_the_whole_deploy(
    place: Deploys, address: str, tmp_path: Path, worker: str
) -> None:
    """The next master takes over by the same path, twice in a row; no request fails, the pid file
    names who serves, and the one before has gone."""
    pid_file = tmp_path / "pid"
    args = gunicorn(worker, address, "--pid", str(pid_file))
    first = up(place, args)
    pids = [first.pid]
    with LoadProcess(address, Mix(one_shot=8, keep_alive=8)) as load:
        load.wait(answers=50)
        for number in (1, 2):
            os.kill(pids[-1], signal.SIGUSR2)
            # All of them write to the log of the first.
            first.wait_for(TOOK_OVER, count=number)
            first.wait_for("; exiting", count=number)
            pids.append(int(pid_file.read_text()))
            load.wait(answers=50)
        report = load.stop()
    assert len(set(pids)) == 3
    assert not report.failures, report
    assert first.wait() == 0, first.log
    assert first.owns(ask(address).pid)
    assert record_of(place, pids[2])["old"]["pid"] == pids[1]


def test_a_usr2_that_fails_changes_nothing(place: Deploys, address: str, tmp_path: Path) -> None:
    """The code on disk is broken: the one that serves serves on, and the next USR2 works."""
    app = tmp_path / "changing.py"
    app.write_text("from wsgi import app\n")
    args = ["changing:app" if arg == "wsgi:app" else arg for arg in gunicorn("gthread", address)]
    parent = up(place, args, PYTHONPATH=str(tmp_path))
    app.write_text("raise RuntimeError('broken on disk')\n")
    parent.signal(signal.SIGUSR2)
    parent.wait_for("Takeover failed")
    parent.wait_for("exited before it had taken over")
    assert ask(address).status == 200
    app.write_text("from wsgi import app  # mended\n")
    parent.signal(signal.SIGUSR2)
    parent.wait_for(TOOK_OVER)
    assert parent.wait() == 0, parent.log
    assert ask(address).status == 200


def test_hup_with_other_addresses(place: Deploys, tmp_path: Path) -> None:
    """What is new is bound, what is gone is closed, what stays refuses nobody; and the next
    instance takes all of it over."""
    stays, goes, comes = (f"127.0.0.1:{free_port()}" for _ in range(3))
    path, config = tmp_path / "app.sock", tmp_path / "some.conf.py"
    config.write_text(f"bind = [{goes!r}, {stays!r}, 'unix:{path}']\n{INSTALL}")
    args = own_config("gthread", stays, config)
    del args[args.index("-b") : args.index("-b") + 2]
    parent = up(place, args)
    with LoadProcess(stays, Mix(one_shot=8, keep_alive=8)) as load:
        load.wait(answers=50)
        config.write_text(f"bind = [{stays!r}, {comes!r}]\n{INSTALL}")
        parent.signal(signal.SIGHUP)
        parent.wait_for("Booting worker with pid", count=4)
        parent.wait_for("Worker exiting", count=2)
        load.wait(answers=50)
        assert ask(comes).status == 200
        with pytest.raises(ConnectionRefusedError):
            ask(goes)
        assert not path.exists()
        child = successor(place, parent, args)
        load.wait(answers=50)
        report = load.stop()
    assert not report.failures, report
    assert child.owns(ask(comes).pid)


def test_hup_with_another_first_address(place: Deploys, tmp_path: Path) -> None:
    """It names the place where the next instance looks, and this one stays in its own: it says what
    to set, and with that it is replaced as ever."""
    before, after = (f"127.0.0.1:{free_port()}" for _ in range(2))
    stays, elsewhere = (default_directory(parse(one)[0]) for one in (before, after))
    config = tmp_path / "some.conf.py"
    args = ["env", "-u", "HOTRESTART_DIR", *own_config("gthread", before, config)]
    del args[args.index("-b") : args.index("-b") + 2]
    with contextlib.ExitStack() as stack:
        for one in (stays, elsewhere):
            stack.callback(shutil.rmtree, one, ignore_errors=True)
        config.write_text(f"bind = {before!r}\n{INSTALL}")
        parent = up(place, args)
        config.write_text(f"bind = {after!r}\n{INSTALL}")
        parent.signal(signal.SIGHUP)
        parent.wait_for(
            f"in {elsewhere}, but this one stays in {stays}: set hotrestart_dir to that"
        )
        assert start(place, args, **QUICK).wait() == EX_CONFIG
        config.write_text(f"bind = {after!r}\nhotrestart_dir = {str(stays)!r}\n{INSTALL}")
        successor(place, parent, args)


def test_hup_with_an_address_that_cannot_be_bound(place: Deploys, tmp_path: Path) -> None:
    """It is said, and keeping the previous addresses; gunicorn alone would end."""
    first, taken = f"127.0.0.1:{free_port()}", tmp_path / "no" / "such" / "place"
    config = tmp_path / "some.conf.py"
    config.write_text(f"bind = {first!r}\n{INSTALL}")
    args = own_config("gthread", first, config)
    del args[args.index("-b") : args.index("-b") + 2]
    parent = up(place, args)
    config.write_text(f"bind = [{first!r}, 'unix:{taken}']\n{INSTALL}")
    parent.signal(signal.SIGHUP)
    parent.wait_for("keeping the previous addresses")
    parent.wait_for("Booting worker with pid", count=4)
    assert ask(first).status == 200
    config.write_text(f"bind = {first!r}\n{INSTALL}")
    successor(place, parent, args)


# -- connections move ------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", ["gthread", "asgi", "uvicorn"])
def test_no_client_reconnects(place: Deploys, address: str, worker: str) -> None:
    """In takeovers in a row every request is answered, on the connection that the client had."""
    args = gunicorn(worker, address, "--keep-alive", "60")
    current = up(place, args)
    with LoadProcess(address, Mix(keep_alive=32, slow=2, upload=2)) as load:
        load.wait(answers=100)
        for _ in range(3):
            current = successor(place, current, args)
            load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    assert (report.reconnects, report.closed_idle) == (0, 0), report
    assert record_of(place, current)["old"]["drain"]["handed_over"] > 0


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_worker_without_a_descriptor_left_hands_over(
    place: Deploys, address: str, loop: str
) -> None:
    """Neither to stop accepting nor to move what is open does it need one that it has not."""
    args = gunicorn("asgi", address, "-w", "1", "--keep-alive", "60", "--asgi-loop", loop)
    old = up(place, args)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Connection(address)) for _ in range(8)]
        (pid,) = {connection.get().pid for connection in opened}
        held = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        lowest = next(number for number in itertools.count() if number not in held)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, lowest))
        new = successor(place, old, args)
        for connection in opened:
            answer = connection.get()
            assert (new.owns(answer.pid), answer.closes) == (True, False)


def test_connections_that_might_speak_http2_move(place: Deploys, address: str) -> None:
    """In cleartext, beside HTTP/1: one that has spoken that keeps its time; one that has not said a
    word yet, and is not moved while gunicorn waits for the preface, is moved then."""
    cleartext = ["--http-protocols", "h2,h1", "--http2-cleartext", "both"]
    args = gunicorn("asgi", address, "-w", "1", *cleartext, "--keep-alive")
    old = up(place, [*args, "60"])  # which does not end before the takeover, as the new one's may
    with Connection(address) as idle, Connection(address) as unread:
        assert not idle.get().closes
        new = successor(place, old, [*args, "2"])
        stats = record_of(place, new)["old"]["drain"]
        assert (stats["handed_over"], stats["aborted_requests"]) == (2, 0)
        assert new.owns(unread.get().pid)
        assert idle.at_end()


SAYS_ITS_NAME = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "7")])
    return [environ["SERVER_NAME"].encode()]
"""


def test_the_server_keeps_its_name(place: Deploys, tmp_path: Path) -> None:
    """To an app in gthread that is the listener's address, on connections that moved, too."""
    (tmp_path / "named.py").write_text(SAYS_ITS_NAME)
    port = free_port()
    more = ["-w", "1", "--keep-alive", "60", "--pythonpath", str(tmp_path)]
    args = gunicorn("gthread", f"0.0.0.0:{port}", *more)
    args[args.index("wsgi:app")] = "named:app"
    old = up(place, args)
    with Connection(f"127.0.0.1:{port}") as connection:
        assert connection.get().body == b"0.0.0.0"
        new = successor(place, old, args)
        assert record_of(place, new)["old"]["drain"]["handed_over"] == 1
        assert connection.get().body == b"0.0.0.0"


def test_what_waits_in_a_thread_moves(place: Deploys, address: str) -> None:
    """Accepted and unread: for five seconds a thread of gthread's waits for the request."""
    args = gunicorn("gthread", address, "-w", "1", "--keep-alive", "60")
    old = up(place, args)
    with Connection(address) as unread:
        ask(address)  # came behind it
        new = successor(place, old, args)
        assert record_of(place, new)["old"]["drain"]["handed_over"] == 1
        assert new.owns(unread.get().pid)


def test_handing_over_takes_no_threads(place: Deploys, address: str) -> None:
    """Of gthread, connection by connection: not one that sleeps for each."""
    args = gunicorn("gthread", address, "-w", "1", "--threads", "16", "--keep-alive", "60")
    old = up(place, args, **WINDOW)
    (pid,) = workers_of(old)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Connection(address)) for _ in range(16)]
        for connection in opened:
            connection.begin_upload()
        threads = Path(f"/proc/{pid}/task")
        before = len(list(threads.iterdir()))
        new = takes_over(place, old, args)
        for connection in opened:
            connection.send(b"hello")
            assert connection.answer().pid == pid
            assert new.owns(connection.get().pid)
        assert len(list(threads.iterdir())) <= before


ENDS_SLOWLY = """
import asyncio
import os
from app import app as demo

async def app(scope, receive, send):
    if scope["type"] != "lifespan":
        return await demo(scope, receive, send)
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    if "ENDS_NEVER" in os.environ:
        print("in the lifespan's shutdown", flush=True)
        await asyncio.Event().wait()
    await send({"type": "lifespan.shutdown.complete"})
"""


@pytest.mark.parametrize("why", ["SIGTERM", "max_requests"])
def test_who_ends_takes_nothing_in(place: Deploys, address: str, tmp_path: Path, why: str) -> None:
    """What the old instance still has is answered there, and does not come to a worker of the new
    one that serves no more."""
    (tmp_path / "slow_end.py").write_text(ENDS_SLOWLY)
    more = ["-w", "1", "--keep-alive", "60", "--pythonpath", str(tmp_path)]
    args = gunicorn("asgi", address, *more)
    args[args.index("app:app")] = "slow_end:app"
    old = up(place, args, **WINDOW)
    with Connection(address) as busy:
        busy.begin_upload()
        limit = ["--max-requests", "1"] if why == "max_requests" else []
        new = start(place, [*args, *limit], **QUICK, ENDS_NEVER="1")
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        if why == "SIGTERM":
            new.signal(signal.SIGTERM)
        else:
            ask(address)
        new.wait_for("in the lifespan's shutdown")
        busy.send(b"hello")
        answer = busy.answer()
        while not answer.closes:
            answer = busy.get()
        assert {answer.pid} == workers_of(old)
