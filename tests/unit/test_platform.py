"""The end of a process, with pidfds and without."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hotrestart_plugins.core.platform import ProcessWatch

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def other(no_leak: None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    yield process
    process.kill()
    process.communicate()


def denied(_pid: int) -> int:
    raise OSError(errno.EPERM, "as in a sandbox")


@pytest.fixture(params=["pidfd", "no such call", "no such function"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The system has pidfds, its kernel denies them, or Python was built without them."""
    if request.param == "no such call":
        monkeypatch.setattr(os, "pidfd_open", denied)
    elif request.param == "no such function":
        monkeypatch.delattr(os, "pidfd_open")
    return str(request.param)


def test_the_end_of_a_process(kind: str, other: subprocess.Popen[bytes]) -> None:
    """It is noticed once the process has ended, be it waited for or not."""
    watch = ProcessWatch(other.pid)
    assert (watch.fileno() >= 0) == (kind == "pidfd")
    assert watch.ended() is False
    assert other.stdin is not None
    other.stdin.close()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie: it has ended
    assert watch.ended() is True
    other.wait()
    assert watch.ended() is True
    watch.close()
    watch.close()
    assert watch.fileno() == -1


def test_a_process_that_has_ended_before(kind: str, other: subprocess.Popen[bytes]) -> None:
    """Its pid is nobody's."""
    other.kill()
    other.wait()
    watch = ProcessWatch(other.pid)
    assert watch.ended() is True
    watch.close()


def test_the_descriptor_becomes_readable(other: subprocess.Popen[bytes]) -> None:
    """A host waits for the end without looking."""
    watch = ProcessWatch(other.pid)
    other.kill()
    readable, _, _ = select.select([watch.fileno()], [], [], 30)
    assert readable
    watch.close()


def test_a_process_of_another_namespace(kind: str) -> None:
    """Of pid 0 nothing is known."""
    watch = ProcessWatch(0)
    assert watch.fileno() == -1
    assert watch.ended() is None
    watch.close()


def test_a_pid_that_comes_again(
    monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen[bytes]
) -> None:
    """Without pidfds, a later process with the same pid is not taken for the one before."""
    monkeypatch.delattr(os, "pidfd_open")
    watch = ProcessWatch(other.pid)
    assert watch.ended() is False
    # The start time of this process stands in for that of a later one.
    watch._pid = os.getpid()
    assert watch.ended() is True
    watch.close()
