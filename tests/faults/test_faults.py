"""The fault matrix: each system call of a takeover, on either side, killed, stopped, or failing.

strace does it to the real processes (``-e inject``), under load; no hook in the code helps it.
Afterwards exactly one instance serves, nobody was refused, and the next takeover succeeds.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, DeployError, Deploys, Instance, free_port
from demo_app.load import LoadProcess, Mix, Report
from tests.support.instances import demo
from tests.support.raw import ask

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
]

ENV = {
    "HOTRESTART_ROLLBACK_WINDOW": "5",
    "HOTRESTART_TAKEOVER_TIMEOUT": "2",
    "HOTRESTART_DRAIN_TIMEOUT": "10",
}
CLIENTS = Mix(one_shot=4, keep_alive=4)
SERVERS = ["uvicorn", "gunicorn gthread", "gunicorn asgi"]
EACH = pytest.mark.parametrize("server", SERVERS)

# The calls of a takeover of one listener, and how often each side makes them. asyncio and uvloop
# receive and send by other calls, so that those with descriptors beside them are all ours.
CHILD = [
    ("fcntl", 1),
    ("bind", 1),
    ("connect", 1),
    ("sendmsg", 1),  # the request
    ("recvmsg", 1),
    ("link,linkat", 1),
    ("bind", 2),
    ("rename,renameat,renameat2", 1),
    ("sendmsg", 2),  # the word to go
    ("unlink,unlinkat", 1),
]
PARENT = [
    *((server, call, 1) for server in SERVERS for call in ("sendmsg", "pidfd_open")),
    # gunicorn's master looks at its socket whenever it is woken, how often nobody can say.
    ("uvicorn", "recvmsg", 1),  # the request
    ("uvicorn", "recvmsg", 3),  # the word to go
]


def injected(args: list[str], where: Path, calls: str, what: str, when: int) -> list[str]:
    """The command under strace; only calls that touch the meeting directory, where that tells."""
    names = ",".join(f"?{call}" for call in calls.split(","))
    files: list[str] = []
    if calls in ("unlink,unlinkat", "link,linkat"):
        files = ["volo_hot_restart_parent.sock", "volo_hot_restart_child.sock"]
    renames = calls == "rename,renameat,renameat2"
    if renames:  # of whose paths strace looks at the first: the name before, with the pid in it
        files = ["new.$$"]
    if calls == "fcntl":
        files = ["lock"]
    # -D: the command keeps the pid of the shell that turns into it. --seccomp-bpf: quicker, but it
    # loses the signals that are to be injected, and goes without -D.
    how = "-D" if renames else "--seccomp-bpf" if what.startswith("error") else ""
    paths = " ".join(f'-P "$0/{file}"' for file in files)
    script = (
        f"exec strace -f {how} -qq -o \"$0.trace\" -e 'trace={names}' {paths} "
        f"-e 'inject={names}:{what}:when={when}' \"$@\""
    )
    return ["sh", "-c", script, str(where), *args]


def was_hit(instance: Instance, where: Path, what: str) -> bool:
    """Whether the fault has come to pass: a call that is not made proves nothing."""
    if what == "signal=KILL":
        return instance.wait() == -signal.SIGKILL
    return "(INJECTED)" in Path(f"{where}.trace").read_text()


def serving(place: Deploys, server: str, address: str) -> tuple[Instance, list[str]]:
    """A parent that serves there, and its command."""
    args = demo(server, address)
    parent = place.start(args, **ENV)
    parent.wait_for(*UP)
    return parent, args


def the_next_one_takes_over(place: Deploys, address: str, args: list[str]) -> None:
    """Whoever serves now is replaced, and only the new one answers."""
    new = place.start(args, **ENV)
    new.wait_for(TOOK_OVER)
    deadline = time.monotonic() + 30
    while not all(new.owns(ask(address).pid) for _ in range(8)):  # until the old one has heard
        assert time.monotonic() < deadline


def held_by_the_killed(report: Report) -> None:
    """Only what a killed process held may fail: no more than it can hold, and nobody refused."""
    assert set(report.failed) <= {"reset", "eof", "cut_short"}, report
    assert report.failures <= 2 * CLIENTS.total, report


@EACH
@pytest.mark.parametrize("what", ["signal=KILL", "error=ENOBUFS"])
@pytest.mark.parametrize(("calls", "when"), CHILD)
def test_the_child_fails(place: Deploys, server: str, calls: str, when: int, what: str) -> None:
    """Killed or with an error in the middle of any call: it takes over, or changes nothing."""
    address = f"127.0.0.1:{free_port()}"
    parent, args = serving(place, server, address)
    with LoadProcess(address, CLIENTS) as load:
        load.wait(answers=50)
        child = place.start(injected(args, place.directory / "meet", calls, what, when), **ENV)
        try:
            child.wait_for(TOOK_OVER)
            took_over = True
        except DeployError:
            took_over = False
        if not took_over:
            assert child.wait() != 0
            if what.startswith("error"):
                lines = [line for line in child.log.splitlines() if "failed" in line]
                assert len(lines) == 1, child.log
                assert "Traceback" not in child.log
        assert was_hit(child, place.directory / "meet", what)
        load.wait(answers=50)
        the_next_one_takes_over(place, address, args)
        load.wait(answers=50)
        report = load.stop()
    if took_over or what.startswith("error"):
        assert not report.failures, report
    else:
        held_by_the_killed(report)
    assert parent.wait() == 0, parent.log


@EACH
@pytest.mark.parametrize(("calls", "when"), CHILD)
def test_the_child_is_stopped_for_a_while(
    place: Deploys, server: str, calls: str, when: int
) -> None:
    """Nobody serves worse for it, and it takes over when it goes on, or gives up."""
    address = f"127.0.0.1:{free_port()}"
    parent, args = serving(place, server, address)
    with LoadProcess(address, CLIENTS) as load:
        load.wait(answers=50)
        before = parent.log.count("has taken over")
        child = place.start(
            injected(args, place.directory / "meet", calls, "signal=STOP", when), **ENV
        )
        stopped = stopped_process(child)
        if not before and "has taken over" not in parent.log:
            load.wait(answers=200)
        os.kill(stopped, signal.SIGCONT)
        with going_on(child):
            child.wait_for(TOOK_OVER)
            load.wait(answers=50)
            the_next_one_takes_over(place, address, args)
            report = load.stop()
    assert not report.failures, report
    assert parent.wait() == 0, parent.log


def stopped_process(instance: Instance) -> int:
    """Wait until a process of this session is stopped; its pid."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for pid in stopped_processes(instance):
            return pid
        assert instance.running, instance.log
    raise AssertionError(f"nothing has stopped: {instance.log}")


def stopped_processes(instance: Instance) -> Iterator[int]:
    """The pids of those of this session that are stopped."""
    for status in Path("/proc").glob("[0-9]*/status"):
        pid = int(status.parent.name)
        if instance.owns(pid) and _stays_stopped(status):
            yield pid


@contextlib.contextmanager
def going_on(instance: Instance) -> Iterator[None]:
    """Let its other processes go on, too, that come to be stopped: each makes its own calls."""
    over = threading.Event()

    def let_go_on() -> None:
        while not over.wait(0.1):
            for pid in stopped_processes(instance):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    helper = threading.Thread(target=let_go_on)
    helper.start()
    try:
        yield
    finally:
        over.set()
        helper.join()


def _stays_stopped(status: Path) -> bool:
    """Whether it is SIGSTOP that it stopped for: strace stops it too, at each call, not for long.

    So it must not have been switched to for a while, in which a running one would have been.
    """

    def look() -> tuple[bool, str]:
        text = status.read_text()
        state = re.search(r"^State:\s+([tT])", text, re.MULTILINE)
        return state is not None, text.partition("voluntary_ctxt_switches")[2]

    try:
        before = look()
        for _ in range(10):
            select.select([], [], [], 0.05)
            if not before[0] or look() != before:
                return False
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


@pytest.mark.parametrize("what", ["signal=KILL", "error=ENOBUFS"])
@pytest.mark.parametrize(("server", "calls", "when"), PARENT)
def test_the_parent_fails(place: Deploys, server: str, calls: str, when: int, what: str) -> None:
    """Killed in the middle of any call, the child serves alone; an error costs one attempt."""
    address = f"127.0.0.1:{free_port()}"
    args = demo(server, address)
    parent = place.start(injected(args, place.directory / "meet", calls, what, when), **ENV)
    parent.wait_for(*UP)
    with LoadProcess(address, CLIENTS) as load:
        load.wait(answers=50)
        child = place.start(args, **ENV)
        try:
            child.wait_for(TOOK_OVER, *UP)
        except DeployError:
            assert what.startswith("error")
            assert child.wait() == 75
            assert re.search(r"did not answer .* keeps serving", child.log)
        load.wait(answers=50)
        the_next_one_takes_over(place, address, args)
        report = load.stop()
    assert was_hit(parent, place.directory / "meet", what)  # it may hear of it late
    if what.startswith("error"):
        assert not report.failures, report
