"""The fence around this package: what it keeps in, what it lets pass, how often it says so."""

from __future__ import annotations

import logging

import pytest
from gunicorn.errors import HaltServer

from hotrestart_plugins.core import fence
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.journal import Journal

FAULT = "Error in hotrestart_plugins; this instance keeps serving"


@pytest.fixture
def guarded() -> Fence:
    return Fence(Journal(logging.getLogger("test.fence")))


def fail(guarded: Fence, times: int) -> None:
    for _ in range(times):
        with guarded:
            raise ValueError("injected")


def test_an_exception_is_logged_with_its_traceback(
    guarded: Fence, caplog: pytest.LogCaptureFixture
) -> None:
    fail(guarded, 1)
    (record,) = caplog.records
    assert record.getMessage().startswith(FAULT)
    assert record.exc_info is not None
    assert "injected" in str(record.exc_info[1])
    assert guarded.faults == 1


@pytest.mark.parametrize(
    "error", [StopIteration(), HaltServer("why", 3), SystemExit(1), KeyboardInterrupt()]
)
def test_what_ends_the_main_loop_passes(
    guarded: Fence, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    with pytest.raises(type(error)) as raised, guarded:
        raise error
    assert raised.value is error
    assert not caplog.records
    assert guarded.faults == 0


def test_faults_in_a_row_are_logged_three_times(
    guarded: Fence, caplog: pytest.LogCaptureFixture
) -> None:
    fail(guarded, 10)
    assert len(caplog.records) == 3
    guarded.all_well()
    fail(guarded, 1)
    assert len(caplog.records) == 4


def test_faults_in_a_row_are_logged_again_after_a_minute(
    guarded: Fence, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fence.SECONDS_BETWEEN_TRACEBACKS == 60
    monkeypatch.setattr(fence, "SECONDS_BETWEEN_TRACEBACKS", 0)
    fail(guarded, 5)
    assert len(caplog.records) == 5


def test_a_fence_can_be_entered_in_itself(guarded: Fence, caplog: pytest.LogCaptureFixture) -> None:
    with guarded:
        fail(guarded, 1)
    assert guarded.faults == len(caplog.records) == 1
