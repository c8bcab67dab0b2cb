"""Instances, that leave as soon as they are replaced or stand by, and what their logs say."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command
from tests.support.raw import Connection

STOPPED = "Stopped accepting"
QUICK = {"HOTRESTART_ROLLBACK_WINDOW": "0", "HOTRESTART_DRAIN_TIMEOUT": "20"}
WINDOW = {"HOTRESTART_ROLLBACK_WINDOW": "3600"}
NO_HANDOVER = "--no-connection-handover"
ONE_OR_MORE = pytest.mark.parametrize("server", ["uvicorn", "uvicorn4"])


def demo(server: str, address: str, *more: str) -> list[str]:
    """The demo's command line; gunicorn without the control socket, whose place all share."""
    alone = ["--no-control-socket"] if server.startswith("gunicorn") else []
    return command(server, address, *alone, *more)


def kept_alive(server: str) -> tuple[str, str]:
    """The option with which an idle connection outlasts a test."""
    return ("--keep-alive" if server.startswith("gunicorn") else "--timeout-keep-alive", "60")


def up(place: Deploys, args: list[str], **env: str) -> Instance:
    """A first parent that serves."""
    instance = place.start(args, **{**QUICK, **env})
    instance.wait_for(*UP)
    return instance


def successor(place: Deploys, old: Instance, args: list[str], **env: str) -> Instance:
    """An instance that has taken over; the old one has ended with 0."""
    new = place.start(args, **{**QUICK, **env})
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0, old.log
    return new


def takes_over(place: Deploys, old: Instance, args: list[str], **env: str) -> Instance:
    """An instance that has taken over; the old one stands by."""
    new = place.start(args, **{**WINDOW, **env})
    new.wait_for(TOOK_OVER)
    old.wait_for(STOPPED)
    return new


def answers_once_more(old: Instance, connections: Iterable[Connection]) -> None:
    """Each has sent a request: the old instance answers, says that it closes, and does."""
    for connection in connections:
        answer = connection.answer()
        assert (answer.status, old.owns(answer.pid), answer.closes) == (200, True, True)
        assert connection.at_end()


def finishes(old: Instance, busy: Connection) -> None:
    """The answer under way comes from the old instance, and no more than one behind it."""
    answer = busy.answer()
    assert (answer.status, old.owns(answer.pid)) == (200, True)
    if not answer.closes:  # its headers were under way already
        answer = busy.get()
        assert (answer.status, answer.closes) == (200, True)


def drained(log: str) -> str:
    """The one line of an instance that says what its drain did."""
    (line,) = [line for line in log.splitlines() if "Drained: " in line]
    assert line.endswith("; exiting"), line
    return line
