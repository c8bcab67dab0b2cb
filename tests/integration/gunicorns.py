"""gunicorn instances for the tests: how they are started, and what is looked for in their logs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command

STOPPED = "Stopped accepting"
WORKERS = ("sync", "gthread", "gevent", "asgi", "uvicorn")
EACH_WORKER = pytest.mark.parametrize("worker", WORKERS)
# Of uvicorn's earlier versions with later ones of websockets nobody needs to hear.
STRICT = {"PYTHONWARNINGS": "error::DeprecationWarning,ignore:websockets:DeprecationWarning"}
QUICK = {**STRICT, "HOTRESTART_ROLLBACK_WINDOW": "0", "HOTRESTART_DRAIN_TIMEOUT": "20"}
WINDOW = {**STRICT, "HOTRESTART_ROLLBACK_WINDOW": "60"}
EX_TEMPFAIL, EX_CONFIG = 75, 78
INSTALL = "from hotrestart_plugins.gunicorn import install\ninstall(globals())\n"


def gunicorn(worker: str, address: str, *more: str) -> list[str]:
    """The demo's command line; without the control socket, whose place all of them share."""
    return command(f"gunicorn {worker}", address, "--no-control-socket", *more)


def own_config(worker: str, address: str, config: Path, *more: str) -> list[str]:
    """The same with a config file of one's own."""
    args = gunicorn(worker, address, *more)
    args[args.index("-c") + 1] = str(config)
    return args


def inside(directory: Path, args: list[str]) -> list[str]:
    """The same, started in another directory."""
    return ["sh", "-c", 'cd "$0" && exec "$@"', str(directory), *args]


def start(place: Deploys, args: list[str], **env: str) -> Instance:
    """An instance, as soon as it runs."""
    return place.start(args, **env)


def up(place: Deploys, args: list[str], **env: str) -> Instance:
    """A first parent that serves."""
    instance = start(place, args, **{**QUICK, **env})
    instance.wait_for(*UP)
    return instance


def successor(place: Deploys, old: Instance, args: list[str], **env: str) -> Instance:
    """An instance that has taken over; the old one has ended with 0."""
    new = start(place, args, **{**QUICK, **env})
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0, old.log
    return new


def workers_of(instance: Instance) -> set[int]:
    """The pids of its workers, by its log."""
    return {int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", instance.log)}


def only_line(log: str, text: str) -> str:
    (line,) = [line for line in log.splitlines() if text in line]
    return line
