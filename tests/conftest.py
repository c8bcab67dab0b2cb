"""What every test here may use, and two rules: no skip in CI, no descriptor left open."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from demo_app.deploys import Deploys, free_port
from tests.support.processes import Processes, give_back_addresses, open_descriptors

UNIT = Path(__file__).parent / "unit"

# Needs a compiled Volo process, which is no part of this repository; the model of one is.
collect_ignore = [] if os.environ.get("VOLO_PEER") else ["operations/test_volo.py"]


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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("only root can become another user, or mount a file system")


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
def processes() -> Iterator[Processes]:
    """Starts processes, and ends each of them, by its pid, after the test."""
    started = Processes()
    yield started
    started.close()


@pytest.fixture
def place() -> Iterator[Deploys]:
    """Starts instances that meet in a directory of their own; all are ended behind the test."""
    with Deploys() as found:
        yield found


@pytest.fixture
def address() -> str:
    """A TCP address that nobody listens on."""
    return f"127.0.0.1:{free_port()}"
