"""hotrestart-uvicorn: real servers, real load, real kills."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command, free_port
from demo_app.load import LoadProcess, Mix
from tests.integration import certificates
from tests.integration.instances import (
    QUICK,
    STOPPED,
    answers_once_more,
    finishes,
    successor,
    up,
)
from tests.integration.raw import Connection, ask, request
from tests.processes import eventually

ONE_OR_MORE = pytest.mark.parametrize("server", ["uvicorn", "uvicorn4"])
SERVERS = pytest.mark.parametrize("server", ["uvicorn", "uvicorn4", "gunicorn asgi"])
NO_HANDOVER = "--no-connection-handover"


# -- no client notices -----------------------------------------------------------------------------


@pytest.mark.smoke
@ONE_OR_MORE
def test_no_request_fails_in_takeovers_in_a_row(place: Deploys, address: str, server: str) -> None:
    """Every request of every client is answered, and from the moment that an instance has stopped
    accepting, no connection begun later is answered by it."""
    args = command(server, address)
    current = up(place, args)
    mix = Mix(one_shot=16, keep_alive=8, slow=1, upload=1, sse=1)
    with LoadProcess(address, mix) as load:
        load.wait(answers=100)
        stopped: list[tuple[Instance, list[int], float]] = []
        for _ in range(4):
            old, olds = current, [pid for pid in load.report().by_pid if current.owns(pid)]
            current = place.start(args, **QUICK)
            current.wait_for(TOOK_OVER)
            stopped.append((old, olds, old.wait_for(STOPPED)))
            assert old.wait() == 0, old.log
            assert "The supervisor has ended" not in old.log
            load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    assert (report.reconnects, report.closed_idle) == (0, 0), report
    for _old, olds, moment in stopped:
        for pid in olds:
            assert report.by_pid[pid].last_begun < moment


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("parser", ["h11", "httptools"])
@ONE_OR_MORE
def test_what_is_open_is_answered_once_more(
    place: Deploys, address: str, server: str, loop: str, parser: str
) -> None:
    """Accepted and unread, half read, idle, and under way: each is answered by the old instance,
    the last answer says that the connection closes, and only then it does."""
    args = command(server, address, "--loop", loop, "--http", parser, NO_HANDOVER)
    args += ["--timeout-keep-alive", "60"]
    old = up(place, args)
    with contextlib.ExitStack() as stack:
        unread, half, idle, busy, upload = (
            stack.enter_context(Connection(address)) for _ in range(5)
        )
        half.send(request()[:20])
        assert not idle.get().closes
        busy.send(request("/slow?seconds=1.5"))
        upload.send(request("/upload", "Content-Length: 8\r\n").replace(b"GET", b"POST") + b"half")
        # The last one's answer tells that the others, which came before it, are accepted.
        assert ask(address).status == 200
        new = place.start(args, **QUICK)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        unread.send(request())
        half.send(request()[20:])
        idle.send(request())
        upload.send(b"full")
        answers_once_more(old, (unread, half, idle, upload))
        finishes(old, busy)
        assert new.owns(ask(address).pid)
    assert old.wait() == 0


def test_a_websocket_opened_while_draining_works(place: Deploys, address: str) -> None:
    """A handshake on a connection that the old instance holds gets a plain 101, and an echo."""
    args = command("uvicorn", address, NO_HANDOVER)
    old = up(place, args)
    with Connection(address) as unread:
        assert ask(address).status == 200
        place.start(args, **QUICK).wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        unread.send(
            request(
                "/ws",
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            )
        )
        head = b""
        while b"\r\n\r\n" not in head:
            more = unread.sock.recv(4096)
            assert more, head
            head += more
        assert head.startswith(b"HTTP/1.1 101")
        assert b"connection: close" not in head.lower()
        unread.send(b"\x81\x82\0\0\0\0hi")
        assert unread.sock.recv(4096).endswith(b"hi")


def test_a_drain_ends_at_its_timeout(place: Deploys, address: str) -> None:
    """A client that never sends anything does not keep the old instance for ever."""
    args = command("uvicorn", address, NO_HANDOVER)
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="0.5")
    with Connection(address) as silent:
        assert ask(address).status == 200
        successor(place, old, args)
        assert silent.at_end()
    assert "cutting off 0 requests, 0 WebSockets, 1 idle connections" in old.log


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_worker_that_cannot_be_started_anew_ends_the_instance_loudly(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """The app breaks while it is served: uvicorn ends, by itself with 0; here the status says so,
    however soon uvicorn's own look at its workers comes."""
    app = tmp_path / "breaks.py"
    app.write_text("from app import app\n")
    args = command("uvicorn4", address)
    args[args.index("app:app")] = "breaks:app"
    instance = up(place, args, PYTHONPATH=str(tmp_path))
    app.write_text("import os\nos.environ['DEMO_FAIL'] = 'lifespan'\nfrom app import app\n")
    os.kill(ask(address).pid, signal.SIGKILL)
    assert instance.wait() == 3, instance.log
    assert "ended before it was ready, see above" in instance.log


@ONE_OR_MORE
@pytest.mark.parametrize("fault", ["import", "lifespan", "hang"])
def test_a_child_that_fails_changes_nothing(
    place: Deploys, address: str, server: str, fault: str
) -> None:
    """It exits with 3 and one line that says why; no client notices; the next one takes over."""
    args = command(server, address)
    parent = up(place, args)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4)) as load:
        load.wait(answers=50)
        ready_timeout = {"HOTRESTART_READY_TIMEOUT": "1.5"} if fault == "hang" else {}
        child = place.start(args, DEMO_FAIL=fault, **QUICK, **ready_timeout)
        assert child.wait() == 3, child.log
        (line,) = [line for line in child.log.splitlines() if "Hot restart failed" in line]
        assert f"pid {parent.pid}) serves on" in line
        if fault == "hang":
            assert "not ready within 1.5 s" in line
        load.wait(answers=50)
        assert parent.owns(ask(address).pid)
        successor(place, parent, args)
        report = load.stop()
    assert not report.failures, report


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("0", "the app failed to start: it called sys.exit(0)"),
        ("7", "the app failed to start: it called sys.exit(7)"),
        ("'DATABASE_URL is not set'", "the app failed to start: DATABASE_URL is not set"),
    ],
)
def test_an_app_that_exits_in_its_import_has_failed(
    place: Deploys, address: str, tmp_path: Path, written: str, said: str
) -> None:
    """With whatever status it wanted to: a deploy script must not take it for a success."""
    (tmp_path / "exits.py").write_text(f"import sys\nsys.exit({written})\n")
    parent = up(place, command("uvicorn", address))
    args = [*command("uvicorn", address), "--app-dir", str(tmp_path)]
    args[args.index("app:app")] = "exits:app"
    child = place.start(args, **QUICK)
    assert child.wait() == 3, child.log
    assert f"Hot restart failed: {said}; the running instance" in child.log
    assert parent.owns(ask(address).pid)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_startup_that_waits_is_named(
    place: Deploys, address: str, tmp_path: Path, loop: str
) -> None:
    """The line of the loop in which it waits would say nothing to whoever is to mend it."""
    (tmp_path / "waits.py").write_text(
        "import asyncio\nasync def app(scope, receive, send):\n    await asyncio.Event().wait()\n"
    )
    args = command("uvicorn", address, "--loop", loop, "--ready-timeout", "1")
    args[args.index("app:app")] = "waits:app"
    child = place.start([*args, "--app-dir", str(tmp_path)])
    assert child.wait() == 3
    assert "not ready within 1 s, it waits in the startup of its lifespan: mend it" in child.log


def test_an_import_that_hangs_can_be_stopped(place: Deploys, address: str, tmp_path: Path) -> None:
    """By SIGTERM: nobody need wait until it is over, or kill it."""
    (tmp_path / "hangs.py").write_text(
        "import threading\nprint('in the import', flush=True)\nthreading.Event().wait()\n"
    )
    parent = up(place, command("uvicorn", address))
    args = [*command("uvicorn", address), "--app-dir", str(tmp_path)]
    args[args.index("app:app")] = "hangs:app"
    child = place.start(args, **QUICK)
    child.wait_for("in the import")
    child.signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    parent.wait_for(f"pid {child.pid} ended before it had taken over; serving on")


@SERVERS
def test_each_step_is_said_as_it_happens(
    place: Deploys, address: str, tmp_path: Path, server: str
) -> None:
    """What was inherited before the app starts, and for whom one waits while one waits."""
    args, latch = slow_start(server, address, tmp_path)
    parent = up(place, args, **QUICK)
    first = place.start(args, LATCH=str(latch), **QUICK)
    first.wait_for("in the startup")
    assert f"Inherited {address} from pid {parent.pid}" in first.log
    second = place.start(args, **QUICK)
    second.wait_for(f"pid {first.pid} is not ready yet: waiting for this instance's turn")
    latch.unlink()
    second.wait_for(f"{TOOK_OVER} {first.pid}")
    assert "waiting" not in first.log


def slow_start(server: str, address: str, directory: Path) -> tuple[list[str], Path]:
    """A command whose app is not ready while a file is there, if LATCH names it; and the file."""
    (directory / "slow.py").write_text(SLOW)
    latch = directory / "latch"
    latch.touch()
    args = command(server, address)
    args[args.index("app:app")] = "slow:app"
    if server.startswith("gunicorn"):
        return [*args, "--no-control-socket", "--pythonpath", str(directory)], latch
    return [*args, "--app-dir", str(directory)], latch


SLOW = """
import asyncio, os, pathlib, sys
sys.path.insert(0, os.getcwd())
from app import app as demo
async def app(scope, receive, send):
    if scope["type"] == "lifespan" and "LATCH" in os.environ:
        print("in the startup", flush=True)
        while pathlib.Path(os.environ["LATCH"]).exists():
            await asyncio.sleep(0.01)
    await demo(scope, receive, send)
"""


@ONE_OR_MORE
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_that_is_stopped_while_it_starts_changes_nothing(
    place: Deploys, address: str, tmp_path: Path, server: str, number: signal.Signals
) -> None:
    """It takes nothing over, says so in one line, and ends as at any stop; no client notices."""
    args, latch = slow_start(server, address, tmp_path)
    parent = up(place, args)
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4)) as load:
        load.wait(answers=50)
        child = place.start(args, LATCH=str(latch), **QUICK)
        child.wait_for("in the startup", count=4 if server == "uvicorn4" else 1)
        child.signal(number)
        latch.unlink()
        assert child.wait() in (0, -number), child.log
        said = f"it was stopped before it had taken over; the running instance (pid {parent.pid})"
        assert child.log.count(said) == 1
        assert TOOK_OVER not in child.log
        (record,) = (place.directory / "meet").glob(f"handover-{child.pid}.json")
        assert json.loads(record.read_text())["outcome"] == "failed"
        load.wait(answers=50)
        assert parent.owns(ask(address).pid)
        successor(place, parent, args)
        report = load.stop()
    assert not report.failures, report


@ONE_OR_MORE
def test_the_parent_serves_again_if_its_successor_dies_in_the_window(
    place: Deploys, address: str, server: str
) -> None:
    """With the processes that it has; what waited in the queue is served; the next one is fine."""
    args = command(server, address)
    window = {"HOTRESTART_ROLLBACK_WINDOW": "60"}
    parent = up(place, args, **window)
    before = ask(address).pid
    child = place.start(args, **window)
    child.wait_for(TOOK_OVER)
    parent.wait_for(STOPPED)
    child.signal(signal.SIGKILL)
    parent.wait_for("this instance serves again")
    child.wait()
    answers: set[int] = set()
    while not answers or not all(parent.owns(pid) for pid in answers):
        # The workers of a killed supervisor leave by themselves, one after the other.
        answers = {ask(address).pid for _ in range(8)}
    assert server != "uvicorn" or answers == {before}
    new = place.start(args, **QUICK)
    new.wait_for(TOOK_OVER)
    parent.signal(signal.SIGTERM)
    parent.wait()
    assert new.owns(ask(address).pid)


HELD_UP = """
import os, time
async def app(scope, receive, send):
    assert scope["type"] == "http"
    if scope["path"] == "/hold":
        print("held up", flush=True)
        time.sleep(3600)
    by = (b"x-served-by", str(os.getpid()).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [by]})
    await send({"type": "http.response.body", "body": b""})
"""


def held_up(address: str, tmp_path: Path) -> list[str]:
    """The command of four workers whose app can hold up the loop of one."""
    (tmp_path / "held_up.py").write_text(HELD_UP)
    args = command("uvicorn4", address, "--app-dir", str(tmp_path), "--lifespan", "off")
    args[args.index("app:app")] = "held_up:app"
    return args


def test_a_rollback_does_not_wait_for_a_worker_that_is_held_up(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """The others accept again at once; what it was told meanwhile, it need not hear."""
    args = held_up(address, tmp_path)
    window = {"HOTRESTART_ROLLBACK_WINDOW": "60"}
    old = up(place, args, **window)
    with Connection(address) as holding:
        holding.send(request("/hold"))
        old.wait_for("held up")
        new = place.start(args, **window)
        new.wait_for(TOOK_OVER)
        os.killpg(new.pid, signal.SIGKILL)
        old.wait_for("Accepting again")
        assert old.owns(ask(address).pid)


def test_a_worker_that_is_held_up_ends_at_the_drain_timeout(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """It is killed, and counts as one request cut off; the others have drained."""
    args = held_up(address, tmp_path)
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="0.5")
    with Connection(address) as holding:
        holding.send(request("/hold"))
        old.wait_for("held up")
        successor(place, old, args)
        assert old.log.count("has not drained in time: killing it") == 1
        assert "1 cut off; leaving" in old.log
        with pytest.raises(ConnectionError):
            holding.answer()


def test_no_worker_is_started_once_replaced(place: Deploys, address: str) -> None:
    """Not even where uvicorn was waiting for a worker that hangs: it would run the new code, and
    accept beside the new instance."""
    args = command("uvicorn4", address, "--timeout-worker-healthcheck", "10")
    old = up(place, args, HOTRESTART_ROLLBACK_WINDOW="15")
    hangs = ask(address).pid
    new = place.start(args, **QUICK)
    old.wait_for("asks for this instance's listeners")
    os.kill(hangs, signal.SIGSTOP)
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0
    log = old.log.partition("has taken over")[2]
    assert f"Child process [{hangs}] died" in log
    assert "Started server process" not in log


def test_after_a_rollback_there_are_as_many_workers_as_are_left(
    place: Deploys, address: str
) -> None:
    """One started in the place of one that has ended would run the code that has just failed."""
    args = command("uvicorn4", address)
    window = {"HOTRESTART_ROLLBACK_WINDOW": "60"}
    old = up(place, args, **window)
    ended = ask(address).pid
    new = place.start(args, **window)
    new.wait_for(TOOK_OVER)
    old.wait_for(STOPPED)
    os.kill(ended, signal.SIGKILL)
    os.killpg(new.pid, signal.SIGKILL)
    old.wait_for("3 of 4 workers are left")
    old.signal(signal.SIGTTIN)
    old.wait_for("Started server process", count=5)
    assert old.owns(ask(address).pid)
    assert old.log.count("Started server process") == 5


NO_WAY = """
import asyncio, os
from hotrestart_plugins.app import drain
drain.call_when_begun(lambda: 1 / 0)
async def app(scope, receive, send):
    assert scope["type"] == "http"
    if scope["path"] == "/slow":
        while not drain.is_set():
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
    by = (b"x-served-by", str(os.getpid()).encode())
    length = (b"content-length", b"0")
    await send({"type": "http.response.start", "status": 200, "headers": [by, length]})
    await send({"type": "http.response.body", "body": b""})
"""


@ONE_OR_MORE
def test_an_instance_that_fails_to_make_way_leaves(
    place: Deploys, address: str, tmp_path: Path, server: str
) -> None:
    """It says why, and finishes what it had accepted; it does not serve on beside the new one."""
    (tmp_path / "no_way.py").write_text(NO_WAY)
    args = command(server, address, "--app-dir", str(tmp_path), "--lifespan", "off", NO_HANDOVER)
    args[args.index("app:app")] = "no_way:app"
    old = up(place, args)
    with Connection(address) as busy:
        busy.send(request("/slow"))
        assert ask(address).status == 200
        successor(place, old, args)
        assert busy.answer().status == 200
    assert "ZeroDivisionError" in old.log
    assert "was never retrieved" not in old.log


@ONE_OR_MORE
def test_a_header_of_the_users_own_survives_a_rollback(
    place: Deploys, address: str, server: str
) -> None:
    """Be it the same as that of a drain."""
    args = command(server, address, "--header", "Connection:close", NO_HANDOVER)
    window = {"HOTRESTART_ROLLBACK_WINDOW": "60"}
    parent = up(place, args, **window)
    assert ask(address).closes
    child = place.start(args, **window)
    child.wait_for(TOOK_OVER)
    parent.wait_for(STOPPED)
    os.killpg(child.pid, signal.SIGKILL)
    parent.wait_for("Accepting again")
    answer = ask(address)
    assert (parent.owns(answer.pid), answer.closes) == (True, True)


@ONE_OR_MORE
def test_a_limit_of_requests_ends_none_that_may_have_to_serve_again(
    place: Deploys, address: str, server: str
) -> None:
    """--limit-max-requests, reached by the last answer of a replaced instance: that serves again,
    and ends by the requests that come then."""
    args = command(server, address, "--limit-max-requests", "1")
    window = {"HOTRESTART_ROLLBACK_WINDOW": "60"}
    parent = up(place, args, **window)
    with Connection(address) as busy:
        busy.begin_upload()
        child = place.start(args, **window)
        child.wait_for(TOOK_OVER)
        parent.wait_for(STOPPED)
        busy.send(b"hello")
        assert parent.owns(busy.answer().pid)
        record = place.directory / "meet" / f"handover-{child.pid}.json"
        eventually(lambda: '"drained"' in record.read_text(), "it has drained")
        os.killpg(child.pid, signal.SIGKILL)
        parent.wait_for("Accepting again")
        assert parent.owns(ask(address).pid)
        parent.wait_for("Maximum request limit")
    assert parent.log.index("Accepting again") < parent.log.index("Maximum request limit")


def test_a_successor_that_is_stopped_on_purpose_is_not_rolled_back(
    place: Deploys, address: str
) -> None:
    """Stopping the service within the rollback window stops the service."""
    args = command("uvicorn", address)
    window = {"HOTRESTART_ROLLBACK_WINDOW": "60"}
    parent = up(place, args, **window)
    child = place.start(args, **window)
    child.wait_for(TOOK_OVER)
    parent.wait_for(STOPPED)
    child.stop()
    assert parent.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        ask(address)


def test_the_address_is_taken_by_somebody_else(place: Deploys) -> None:
    """The line says who holds it, where was looked, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        instance = place.start(command("uvicorn", f"127.0.0.1:{port}"))
        assert instance.wait() == 78
    assert f"127.0.0.1:{port} is taken by pid {os.getpid()}" in instance.log
    assert "--hot-restart-dir" in instance.log


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reload"], "--reload and hot restart do not go together"),
        (["--drain-timeout", "soon"], "--drain-timeout: 'soon' is not a number of seconds"),
        (["--ready-timeout", "0"], "--ready-timeout: '0' is not a number of seconds"),
        (["--hot-restart-dir", ""], "--hot-restart-dir: '' is not a directory"),
        (["--bind", "nowhere:at:all"], "'nowhere:at:all' is no address"),
        (["--bind", "fd://77"], "fd://77 is no open socket"),
        (["--bind", "127.0.0.1:1", "--port", "1"], "--bind and --port do not go together"),
        (["--fd", "77"], "fd://77 is no open socket"),
        (["--hot-restart-dir", "/proc/none"], "/proc/none cannot be used to meet in"),
        (["--probe", "health"], "--probe: 'health' is neither /path nor module:function"),
        (["--probe", "http://x"], "--probe: 'http://x' is neither /path nor module:function"),
    ],
)
@ONE_OR_MORE
def test_bad_input_is_refused_in_one_line(
    place: Deploys, server: str, more: list[str], said: str
) -> None:
    """With a status of its own, and without a traceback, before the app is loaded."""
    instance = place.start([*command(server, "127.0.0.1:1")[:-4], *more], DEMO_FAIL="hang")
    assert instance.wait() == 78, instance.log
    assert [said in line for line in instance.log.splitlines()].count(True) == 1
    assert "Traceback" not in instance.log


def test_the_environment_gives_way_to_the_command_line(place: Deploys, address: str) -> None:
    """Also where it names the address under another option; what is bad in it is refused."""
    elsewhere = f"127.0.0.1:{free_port()}"
    instance = up(place, command("uvicorn", address), HOTRESTART_BIND=elsewhere)
    assert ask(address).pid == instance.pid
    assert "http://" + elsewhere not in instance.log
    plain = command("uvicorn", address)[:-4]
    new = successor(place, instance, plain, HOTRESTART_BIND=elsewhere)
    assert ask(elsewhere).pid == new.pid
    bad = place.start(plain, HOTRESTART_DISABLE="maybe")
    assert bad.wait() == 78
    assert "HOTRESTART_DISABLE: 'maybe' is not 1 or 0" in bad.log
    assert place.start([*plain, "--no-such-option"]).wait() == 2


# -- where it listens ------------------------------------------------------------------------------


@ONE_OR_MORE
def test_a_unix_socket_is_never_gone_and_keeps_its_mode(
    place: Deploys, tmp_path: Path, server: str
) -> None:
    """The path outlives each instance but the last."""
    path = tmp_path / "app.sock"
    args = command(server, f"unix:{path}")
    parent = up(place, args)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    path.chmod(0o660)
    inode = path.stat().st_ino
    failed = place.start(args, DEMO_FAIL="import", **QUICK)
    assert failed.wait() == 3
    child = successor(place, parent, args)
    assert path.stat().st_ino == inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert child.owns(ask(f"unix:{path}").pid)
    child.stop()
    assert not path.exists()


def test_several_addresses_at_once(place: Deploys, tmp_path: Path) -> None:
    """--bind as often as one likes; what is new is bound fresh, what is gone is let go."""
    v4, v6 = f"127.0.0.1:{free_port()}", f"[::1]:{free_port()}"
    first, second = f"unix:{tmp_path}/first.sock", f"unix:{tmp_path}/second.sock"

    def args(*binds: str) -> list[str]:
        plain = command("uvicorn", "127.0.0.1:1")[:-4]
        return [*plain, *(part for bind in binds for part in ("--bind", bind))]

    old = up(place, args(v4, v6, first))
    new = successor(place, old, args(v4, v6, second))
    assert {ask(one).pid for one in (v4, v6, second)} == {new.pid}
    assert not (tmp_path / "first.sock").exists()


def test_an_abstract_socket_is_named_as_one(place: Deploys) -> None:
    """It has no file, and is no host either."""
    name = f"@hotrestart-{os.getpid()}-{free_port()}"
    instance = up(place, [*command("uvicorn", "127.0.0.1:1")[:-4], "--bind", f"unix:{name}"])
    assert f"Uvicorn running on unix socket {name} " in instance.log


def test_port_0_is_the_same_port_after_a_takeover(place: Deploys) -> None:
    """Where a meeting directory is named; elsewhere it cannot be found, and a line says so."""
    args = command("uvicorn", "127.0.0.1:0")
    old = up(place, args)
    port = old.log.split("http://127.0.0.1:")[1].split()[0]
    new = successor(place, old, args)
    assert ask(f"127.0.0.1:{port}").pid == new.pid
    alone = up(place, args, HOTRESTART_DIR="")
    assert "Port 0 names no place to meet: this instance cannot be replaced" in alone.log


@pytest.mark.parametrize("way", ["--fd", "--bind", "systemd"])
def test_a_given_descriptor(place: Deploys, way: str) -> None:
    """From a service manager, by number or by LISTEN_FDS; TCP stays TCP, with TCP_NODELAY."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        plain = command("uvicorn", address)[:-4]
        more = {"--fd": "--fd 3", "--bind": "--bind fd://3", "systemd": ""}[way]
        script = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" {more}'
        args = ["bash", "-c", script, "bash", *plain]
        old = place.start_passing((listener.fileno(),), args, **QUICK)
        old.wait_for(*UP)
        new = place.start_passing((listener.fileno(),), args, **QUICK)
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0
        assert ask(address).pid == new.pid
        if way != "systemd":  # the same, bound by its own: not the one that was given
            assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@ONE_OR_MORE
def test_tls(place: Deploys, address: str, tmp_path: Path, server: str) -> None:
    """TLS works as in uvicorn, across a takeover; what is wrong with its files is said, and harms
    nobody."""
    key, chain, ca = certificates.issue(tmp_path)
    args = command(server, address, "--ssl-keyfile", str(key), "--ssl-certfile", str(chain))
    old = up(place, args)
    assert f"https://{address}" in old.log
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4), ca_file=ca) as load:
        load.wait(answers=20)
        missing = place.start([*args[:-1], str(tmp_path / "none.pem")], **QUICK)
        assert missing.wait() == 78
        assert f"--ssl-certfile: {tmp_path}/none.pem cannot be read: No such file" in missing.log
        alone = place.start(args[:-2], **QUICK)
        assert alone.wait() == 78
        assert "--ssl-keyfile needs a --ssl-certfile" in alone.log
        wrong = place.start([*args, "--ssl-keyfile", str(chain)], **QUICK)
        assert wrong.wait() == 78
        assert f"--ssl-certfile {chain} cannot be used with --ssl-keyfile {chain}: " in wrong.log
        assert "Traceback" not in missing.log + alone.log + wrong.log
        new = successor(place, old, args)
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
    assert new.running


# -- as uvicorn ------------------------------------------------------------------------------------


def test_options_of_uvicorn_work(place: Deploys, address: str, tmp_path: Path) -> None:
    """--factory, --app-dir, --env-file, --header, --root-path and the rest are uvicorn's own."""
    (tmp_path / "made.py").write_text(
        "import os\n"
        "async def app(scope, receive, send):\n"
        "    assert scope['type'] == 'http'\n"
        "    body = (scope['root_path'] + os.environ['FROM_FILE']).encode()\n"
        "    await send({'type': 'http.response.start', 'status': 200,"
        " 'headers': [(b'x-served-by', str(os.getpid()).encode())]})\n"
        "    await send({'type': 'http.response.body', 'body': body})\n"
        "def make():\n"
        "    return app\n"
    )
    (tmp_path / "env").write_text("FROM_FILE=told\nHOTRESTART_ROLLBACK_WINDOW=0\n")
    more = ["--factory", "--app-dir", str(tmp_path), "--env-file", str(tmp_path / "env")]
    more += ["--root-path", "/under", "--lifespan", "off", "--header", "X-More: 1"]
    args = ["made:make" if part == "app:app" else part for part in command("uvicorn", address)]
    old = place.start([*args, *more])
    old.wait_for(*UP)
    new = place.start([*args, *more])
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0  # at once: the window of the env file is 0
    answer = ask(address)
    assert (answer.pid, answer.body) == (new.pid, b"/undertold")


def test_every_option_of_uvicorns_command_is_there() -> None:
    """Taken from uvicorn's own definition, whatever its version; ours beside them."""
    text = subprocess.run(
        [*command("uvicorn", "127.0.0.1:1")[:2], "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    module = importlib.import_module("uvicorn.main")
    for parameter in module.main.params:
        for option in parameter.opts:
            assert parameter.param_type_name == "argument" or option in text
    for flag in ("--bind", "--hot-restart-dir", "--takeover-timeout", "--no-hot-restart"):
        assert flag in text


@pytest.mark.parametrize(
    ("server", "number", "status"),
    [
        ("uvicorn", signal.SIGTERM, -signal.SIGTERM),
        ("uvicorn", signal.SIGINT, 130),
        ("uvicorn4", signal.SIGTERM, 0),
        ("uvicorn4", signal.SIGINT, 0),
    ],
)
def test_a_stop_without_a_successor_is_uvicorns(
    place: Deploys, address: str, server: str, number: signal.Signals, status: int
) -> None:
    """The same status as plain uvicorn gives, and nothing is left in the meeting directory."""
    plain = place.start(command(server, address, plain=True))
    plain.wait_for("Application startup complete", count=4 if server == "uvicorn4" else 1)
    plain.wait_for("Uvicorn running on")
    plain.signal(number)
    expected = plain.wait()
    ours = up(place, command(server, address))
    ours.signal(number)
    assert ours.wait() == expected, ours.log
    assert "The supervisor has ended" not in ours.log
    assert expected in (status, 0)
    assert [one.name for one in (place.directory / "meet").iterdir()] == ["lock"]


def test_without_hot_restart_it_is_uvicorn(place: Deploys, address: str) -> None:
    """--no-hot-restart: a second instance finds the address taken."""
    args = command("uvicorn", address, "--no-hot-restart")
    first = up(place, args)
    second = place.start(args)
    assert second.wait() == 78
    assert f"is taken by pid {first.pid}" in second.log
    assert not (place.directory / "meet").exists()


def test_workers_of_a_killed_supervisor_leave(place: Deploys, address: str) -> None:
    """They would go on serving old code beside whatever is started next."""
    args = command("uvicorn4", address)
    first = up(place, args)
    workers = {ask(address).pid for _ in range(20)}
    watches = [os.pidfd_open(pid) for pid in workers]
    first.signal(signal.SIGKILL)
    first.wait()
    for pidfd in watches:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(30_000)
        os.close(pidfd)
    assert "The supervisor has ended" in first.log
    second = up(place, args)
    assert second.owns(ask(address).pid)


EMBEDDED = """
import asyncio, sys, uvicorn
from hotrestart_plugins.uvicorn import Server
sys.path.insert(0, ".")
async def main():
    server = Server(uvicorn.Config("app:app", port=int(sys.argv[1])))
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)
    ticking = asyncio.create_task(tick())
    await server.serve()
    ticking.cancel()
    print("the program goes on", ticks > 3, flush=True)
asyncio.run(main())
"""
CALLED = """
import sys
from hotrestart_plugins.uvicorn import run
sys.path.insert(0, ".")
run("app:app", port=int(sys.argv[1]), workers=int(sys.argv[2]))
print("returned", flush=True)
"""


def test_embedded_in_a_program(place: Deploys, address: str) -> None:
    """A `Server` beside the program's own tasks is replaced, and the program goes on."""
    port = address.split(":")[1]
    args = [sys.executable, "-c", EMBEDDED, port]
    old = up(place, args)
    new = successor(place, old, args)
    assert "the program goes on True" in old.log
    assert ask(address).pid == new.pid


@pytest.mark.parametrize("workers", ["1", "2"])
def test_called_as_a_function(place: Deploys, address: str, tmp_path: Path, workers: str) -> None:
    """`run` has `uvicorn.run`'s signature, and returns once it was replaced."""
    script = tmp_path / "serve.py"
    guarded = CALLED.replace("run(", "if __name__ == '__main__': run(", 1)
    script.write_text(guarded.replace("print(", "if __name__ == '__main__': print("))
    args = [sys.executable, str(script), address.split(":")[1], workers]
    old = up(place, args)
    new = successor(place, old, args)
    assert "returned" in old.log
    assert new.owns(ask(address).pid)
