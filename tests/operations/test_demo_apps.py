"""The demo apps, in the servers that they are for: they answer every kind of client."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.load import LoadProcess, Mix, Sizes

pytestmark = pytest.mark.smoke

DEMO_APP = Path(__file__).resolve().parents[2] / "demo_app"
DEADLINE = 30.0


@contextlib.contextmanager
def demo_server(*command: str, fd_option: str) -> Iterator[tuple[str, int]]:
    """A real server in demo_app/ on a listener that is there already: nobody needs to wait."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port, fd = listener.getsockname()[1], listener.fileno()
        # uvicorn takes an --fd for a Unix socket, and so forgets this: 40 ms for each answer
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        environ = {key: value for key, value in os.environ.items() if not key.startswith("DEMO_")}
        process = subprocess.Popen(
            [sys.executable, "-m", *command, fd_option.format(fd=fd)],
            cwd=DEMO_APP,
            env=environ,
            pass_fds=[fd],
        )
    try:
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE)
        finally:
            process.kill()
            process.wait()


SMALL = Sizes(slow_seconds=0.2, upload_kib=16, upload_seconds=0.2, sse_events=3)


def test_the_asgi_app_answers_every_kind_of_client() -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("websockets")
    command = ("uvicorn", "app:app", "--log-level=warning")
    mix = Mix(one_shot=2, keep_alive=2, slow=2, upload=2, sse=2, websocket=2)
    with demo_server(*command, fd_option="--fd={fd}") as (target, pid):
        with LoadProcess(target, mix, sizes=SMALL) as load:
            load.wait(answers=500, timeout=DEADLINE)
            report = load.stop()
        for path in ("/health", "/"):
            check = LoadProcess(target, Mix(keep_alive=1), path=path, max_requests=3)
            with check as load:
                assert load.stop().failures == 0
    assert (report.failures, report.closed_idle, report.ws_restarts) == (0, 0, 0)
    assert list(report.by_pid) == [pid]
    assert all(tally.answered for tally in report.by_client.values())


def test_the_wsgi_app_answers_every_kind_of_client_but_websockets() -> None:
    pytest.importorskip("gunicorn")
    command = ("gunicorn", "wsgi:app", "-k=gthread", "--threads=16", "--log-level=error")
    mix = Mix(one_shot=2, keep_alive=2, slow=2, upload=2, sse=2)
    with (
        demo_server(*command, fd_option="--bind=fd://{fd}") as (target, _),
        LoadProcess(target, mix, sizes=SMALL) as load,
    ):
        load.wait(answers=500, timeout=DEADLINE)
        report = load.stop()
    assert (report.failures, report.closed_idle) == (0, 0)
    assert len(report.by_pid) == 1
    assert all(tally.answered for tally in report.by_client.values())


def test_a_plain_restart_is_noticed() -> None:
    """Without us: the old server is stopped under load, and nobody is there for a while."""
    pytest.importorskip("uvicorn")
    command = ("uvicorn", "app:app", "--log-level=warning")
    with (
        demo_server(*command, fd_option="--fd={fd}") as (target, pid),
        LoadProcess(target, Mix(keep_alive=8)) as load,
    ):
        load.wait(answers=500, timeout=DEADLINE)
        os.kill(pid, signal.SIGTERM)
        load.wait(failures=50, timeout=DEADLINE)
        report = load.stop()
    assert set(report.failed) <= {"refused", "reset", "eof", "cut_short"}
    assert report.failed["refused"] > 0
    assert report.failures - report.failed["refused"] > 0


@pytest.mark.parametrize("failure", ["import", "lifespan"])
def test_the_failed_deployments_fail(failure: str) -> None:
    pytest.importorskip("uvicorn")
    result = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app:app", "--port=0"],
        cwd=DEMO_APP,
        env={**os.environ, "DEMO_FAIL": failure},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert result.returncode != 0
    assert f"DEMO_FAIL={failure}" in result.stderr
