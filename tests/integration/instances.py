"""Instances that leave as soon as they are replaced, and what is looked for in their logs."""

from __future__ import annotations

from collections.abc import Iterable

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance
from tests.integration.raw import Connection

STOPPED = "Stopped accepting"
QUICK = {"HOTRESTART_ROLLBACK_WINDOW": "0", "HOTRESTART_DRAIN_TIMEOUT": "20"}


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
