"""A fault in our own code, or no descriptor left: gunicorn's master lives, and serves on."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, Deploys
from demo_app.load import LoadProcess, Mix
from tests.support.gunicorns import (
    INSTALL,
    QUICK,
    WINDOW,
    gunicorn,
    kill,
    own_config,
    start,
    successor,
    takes_over,
    up,
)
from tests.support.raw import ask

pytestmark = pytest.mark.faults

FAULT = "Error in hotrestart_plugins; this instance keeps serving"
FAULT_OF_THE_SYSTEM = "OSError: [Errno 24]"
INJECT = """
import os
from hotrestart_plugins.{module} import {owner}
_real = {owner}.{name}
def _faulty(*args, **kwargs):
    if os.path.exists({flag!r}):
        if {once}:
            os.unlink({flag!r})
        raise RuntimeError("injected")
    return _real(*args, **kwargs)
{owner}.{name} = _faulty
"""


def faulty_config(path: Path, function: str, flag: Path, *, once: bool) -> Path:
    """A config file that makes a function of ours raise while the flag is there."""
    module, owner, name = function.rsplit(".", 2)
    injected = INJECT.format(module=module, owner=owner, name=name, flag=str(flag), once=once)
    path.write_text(injected + INSTALL)
    return path


@pytest.mark.parametrize(
    "function",
    [
        "core.hot_restart.HotRestart.handle",
        "gunicorn.worker_pool.WorkerPool.update",
        "gunicorn.worker_pool.WorkerPool.forget_ended",
        "gunicorn.worker_pool.WorkerPool.followed",
        "gunicorn.lifecycle_driver.LifecycleDriver._look_at_new_instance",
        "gunicorn.singletons.Singletons.stop_control",
    ],
)
def test_a_fault_at_a_takeover_ends_nothing(
    place: Deploys, address: str, tmp_path: Path, function: str
) -> None:
    """The takeover goes on when the fault is over, and so does the next one."""
    flag = tmp_path / "flag"
    args = gunicorn("gthread", address)
    config = faulty_config(tmp_path / "faulty.conf.py", function, flag, once=True)
    old = up(place, own_config("gthread", address, config))
    with LoadProcess(address, Mix(one_shot=2, keep_alive=4)) as load:
        load.wait(answers=50)
        flag.touch()
        new = successor(place, old, args)
        successor(place, new, args)
        load.wait(answers=50)
        report = load.stop()
    assert not flag.exists()
    assert FAULT in old.log
    assert not report.failures, report


def test_an_instance_that_cannot_make_way_drains_and_leaves(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """It must not go on accepting beside the new one; its workers finish what they have."""
    flag = tmp_path / "flag"
    pause = "gunicorn.worker_pool.WorkerPool.pause"
    config = faulty_config(tmp_path / "faulty.conf.py", pause, flag, once=False)
    old = up(place, own_config("gthread", address, config), **WINDOW)
    flag.touch()
    with LoadProcess(address, Mix(one_shot=4)) as load:
        load.wait(answers=50)
        new = successor(place, old, gunicorn("gthread", address))
        load.wait(answers=50)
        report = load.stop()
    assert "draining and exiting" in old.log
    assert new.owns(ask(address).pid)
    assert not report.failures, report


@pytest.mark.parametrize(
    "function",
    [
        "core.hot_restart.HotRestart.child_ended",
        "gunicorn.singletons.Singletons.write_pidfile",
        "gunicorn.worker_pool.WorkerPool.limit",
    ],
)
def test_a_fault_at_a_rollback_ends_nothing(
    place: Deploys, address: str, tmp_path: Path, function: str
) -> None:
    """The old instance serves again all the same, and can be replaced."""
    flag = tmp_path / "flag"
    args = gunicorn("gthread", address)
    config = faulty_config(tmp_path / "faulty.conf.py", function, flag, once=True)
    old = up(place, own_config("gthread", address, config), **WINDOW)
    new = takes_over(place, old, args)
    flag.touch()
    kill(new)
    old.wait_for("Accepting again")
    assert FAULT in old.log
    assert old.owns(ask(address).pid)
    start(place, args, **WINDOW).wait_for(TOOK_OVER)
    assert old.stop() == 0


def test_a_fault_in_a_new_instance_ends_only_that(
    place: Deploys, address: str, tmp_path: Path
) -> None:
    """The running one serves on; the next one takes over."""
    flag = tmp_path / "flag"
    flag.touch()
    args = gunicorn("gthread", address)
    old = up(place, args)
    ready = "core.hot_restart.HotRestart.ready"
    config = faulty_config(tmp_path / "faulty.conf.py", ready, flag, once=False)
    new = start(place, own_config("gthread", address, config), **QUICK)
    assert new.wait() == 70
    assert "a fault in hotrestart_plugins, see above" in new.log
    assert old.owns(ask(address).pid)
    successor(place, old, args)


@contextmanager
def no_new_descriptor(pid: int) -> Iterator[None]:
    """A process cannot open anything inside the block, nor poll what it has open."""
    _, hard = limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_a_running_master_without_a_descriptor_left(place: Deploys, address: str) -> None:
    """A new instance cannot take over then; the next one can, when there are some again."""
    args = gunicorn("gthread", address)
    old = up(place, args)
    with no_new_descriptor(old.pid):
        new = start(place, args, HOTRESTART_TAKEOVER_TIMEOUT="2", **QUICK)
        assert new.wait() != 0
        assert old.owns(ask(address).pid)
    assert old.running
    successor(place, old, args)


def test_a_rollback_of_a_master_without_a_descriptor_left(place: Deploys, address: str) -> None:
    """It serves again, as soon as it can see that the new instance has ended."""
    args = gunicorn("gthread", address)
    old = up(place, args, **WINDOW)
    new = takes_over(place, old, args)
    with no_new_descriptor(old.pid):
        new.signal(signal.SIGKILL)
        old.wait_for(FAULT_OF_THE_SYSTEM, "Accepting again")
    old.wait_for("Accepting again")
    assert old.owns(ask(address).pid)
    assert old.stop() == 0
