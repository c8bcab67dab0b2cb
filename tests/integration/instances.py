"""Instances that leave as soon as they are replaced, and what is looked for in their logs."""

from __future__ import annotations

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance

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
