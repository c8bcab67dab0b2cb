"""What every test here may use, and two rules: no skip in CI, no descriptor left open."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from demo_app.deploys import Deploys, free_port
from tests.support.processes import Processes, give_back_addresses, open_descriptors

UNIT = Path(__file__).parent / "unit"

# Needs a compiled Volo process, which is no part of this repository; the model of one is.
collect_ignore = [] if os.environ.get("VOLO_PEER") else ["operations/test_volo.py"]


_ROOM = 48
"""The longest $TMPDIR behind which a Unix socket's path, of 107 bytes, has room for our names."""


_DESCRIPTORS = 4096
"""As many files as a test may have open, if the hard limit allows it."""


def pytest_configure() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))
    if len(os.fsencode(tempfile.gettempdir())) > _ROOM:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"


def _no_fork() -> None:
    raise RuntimeError(
        "a test forks its own process, in which pytest-xdist runs a thread: start a program instead"
    )


# Python reports what is raised here as unraisable, and goes on; pytest makes the test fail by it.
os.register_at_fork(before=_no_fork)


def _no_skip_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and in CI that is a failure: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _no_skip_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _no_skip_in_ci(report)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with real servers are slow, but for those marked as the essentials."""
    for item in items:
        if not item.path.is_relative_to(UNIT) and not item.get_closest_marker("smoke"):
            item.add_marker(pytest.mark.slow)


@functools.cache
def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("only root can become another user, or mount a file system")
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if item.get_closest_marker("descriptors") and hard_limit < _DESCRIPTORS:
        pytest.skip(f"{_DESCRIPTORS} open files are needed, and ulimit -Hn is {hard_limit}")
    if item.get_closest_marker("ipv6") and not _has_ipv6():
        pytest.skip("nobody can listen on ::1: this machine has no IPv6, or it is disabled")


@pytest.fixture
def no_leak() -> Iterator[None]:
    """The test leaves open the descriptors that were open before, and no others."""
    before = open_descriptors()
    yield
    give_back_addresses()
    assert open_descriptors() == before


@pytest.fixture
def meet() -> Iterator[Path]:
    """A meeting directory; its path is short, as that of a Unix socket has to be."""
    directory = Path(tempfile.mkdtemp(prefix="hr-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Instead of pytest's, whose path has the names of user, worker and test: too long for ours."""
    directory = Path(tempfile.mkdtemp(prefix="hr-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts processes, and ends each of them, by its pid, after the test.

    `tmp_path` goes after that: what still runs may write there.
    """
    del tmp_path
    started = Processes()
    yield started
    started.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Deploys]:
    """Starts instances that meet in a directory of their own; all are ended after the test.

    `tmp_path` goes after that: what still runs may write there.
    """
    del tmp_path
    with Deploys() as found:
        yield found


@pytest.fixture
def address() -> str:
    """A TCP address that nobody listens on."""
    return f"127.0.0.1:{free_port()}"
