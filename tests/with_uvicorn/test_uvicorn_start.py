"""hotrestart-uvicorn's start: what fails there, what is said of it, and that it harms nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from demo_app.deploys import DEADLINE, TOOK_OVER, Deploys, command, free_port
from demo_app.load import LoadProcess, Mix
from tests.support.instances import ONE_OR_MORE, QUICK, successor, up
from tests.support.processes import eventually, pending
from tests.support.raw import ask

SERVERS = pytest.mark.parametrize("server", ["uvicorn", "uvicorn4", "gunicorn asgi"])


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
        (line,) = [line for line in child.log.splitlines() if "Takeover failed" in line]
        assert f"pid {parent.pid}) keeps serving" in line
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
    assert f"Takeover failed: {said}; the running instance" in child.log
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
    assert "not ready within 1 s, it waits in the startup of its lifespan: fix it" in child.log


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
    parent.wait_for(f"pid {child.pid} exited before it had taken over; this instance keeps serving")


@pytest.mark.once
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
    second.wait_for(f"for pid {first.pid} to finish its takeover")
    latch.unlink()
    assert first.wait() == 0, first.log
    assert f"Overtaken by pid {second.pid}" in first.log
    second.wait_for(f"{TOOK_OVER} {parent.pid}")
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
        eventually(lambda: number not in pending(child.pid), "the signal is delivered")
        latch.unlink()
        assert child.wait() in (0, -number), child.log
        said = f"it was stopped before it had taken over; the running instance (pid {parent.pid})"
        assert child.log.count(said) == 1
        assert TOOK_OVER not in child.log
        assert place.record_of(child.pid)["outcome"] == "failed"
        load.wait(answers=50)
        assert parent.owns(ask(address).pid)
        successor(place, parent, args)
        report = load.stop()
    assert not report.failures, report


def test_an_import_that_hangs_ends_although_nobody_reads_what_it_prints(
    meet: Path, address: str, tmp_path: Path
) -> None:
    """What it has printed cannot be written any more: that must not keep the process alive."""
    (tmp_path / "hangs.py").write_text(
        "import threading\nprint('printed')\nthreading.Event().wait()\n"
    )
    args = command("uvicorn", address, "--app-dir", str(tmp_path))
    args[args.index("app:app")] = "hangs:app"
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {"PYTHONUNBUFFERED": ""}  # so that it is written at the end
    settings = {"HOTRESTART_READY_TIMEOUT": "0.5", "HOTRESTART_DIR": str(meet), **buffered}
    try:
        ended = subprocess.run(
            args,
            env={**os.environ, **settings},
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=DEADLINE,
            check=False,
        )
    finally:
        os.close(writer)
    assert ended.returncode == 3
    assert b"not ready within 0.5 s" in ended.stderr


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
