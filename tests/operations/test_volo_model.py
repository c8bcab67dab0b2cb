"""Takeovers to and from a model of Volo, which runs wherever the tests do."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from hotrestart_plugins.core.rendezvous import CHILD_SOCKET
from tests.support.processes import (
    TIMEOUT,
    Processes,
    Told,
    eventually,
    free_address,
    free_addresses,
    stopped,
    who_answers,
)
from tests.support.volo_takeovers import VoloTakeovers, held_by

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("no_leak")]


class Model(VoloTakeovers):
    """The model."""

    volo = (sys.executable, "-m", "tests.support.volo")


@pytest.mark.parametrize("number", [1, 3])
def test_volo_to_ours(processes: Processes, meet: Path, number: int) -> None:
    """Ours takes every listener over from Volo."""
    Model().volo_to_ours(processes, meet, free_addresses(number))


@pytest.mark.ipv6
def test_each_kind_from_volo(processes: Processes, meet: Path) -> None:
    """TCP, TCP6 and Unix listeners, by the names that Volo has for them."""
    addresses = [free_address(), free_address(socket.AF_INET6), str(meet / "app.sock")]
    Model().volo_to_ours(processes, meet, addresses)


def test_ours_to_volo(processes: Processes, meet: Path) -> None:
    """Volo takes over from ours."""
    Model().ours_to_volo(processes, meet, free_address())


def test_several_to_volo(processes: Processes, meet: Path) -> None:
    """Each of Volo's questions is answered, and its last word is understood."""
    addresses = free_addresses(3)
    ours = processes.instance().serve(meet, addresses)
    volo = Model().start(processes, meet, *addresses)
    assert [line.split()[0] for line in volo.lines[:3]] == ["INHERITED"] * 3
    ours.expect("replaced")
    assert ours.wait() == 0
    assert [who_answers(address) for address in addresses] == [volo.pid] * 3


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_there_and_back(processes: Processes, meet: Path, kind: str) -> None:
    """Volo to ours to Volo to ours."""
    Model().there_and_back(
        processes, meet, free_address() if kind == "tcp" else str(meet / "app.sock")
    )


def test_what_volo_has_not(processes: Processes, meet: Path) -> None:
    """Volo never answers for an address that it has not: ours gives up, and says that too."""
    address, other = free_addresses(2)
    volo = Model().start(processes, meet, address)
    ours = processes.instance()
    ours.call("initialize", str(meet), 2, {"takeover_timeout": TIMEOUT})
    assert ours.call("listen", [address]) == [address]
    with pytest.raises(Told, match="or is a Volo process that has no such listener"):
        ours.call("listen", [other])
    ours.call("exit")
    assert who_answers(address) == volo.pid


def test_what_ours_has_not(processes: Processes, meet: Path) -> None:
    """Volo's child is told that ours has no such listener: it never waits for nothing."""
    address, other = free_addresses(2)
    ours = processes.instance().serve(meet, [address])
    volo = processes.command(*Model.volo, str(meet), "1", other)
    assert volo.wait() == 1
    assert "ERROR PassFdResponse without fd" in volo.log
    assert ours.expect("child ended") == ["nothing", "parent"]
    assert who_answers(address) == ours.pid


def test_a_volo_child_is_waited_for(processes: Processes, meet: Path) -> None:
    """A Volo child knows no lock; ours sees it all the same, and does not take its name."""
    address = free_address()
    ours = processes.instance().serve(meet, [address])
    with stopped(ours):
        volo = processes.command(*Model.volo, str(meet), "1", address)
        third = processes.instance()
        eventually(lambda: held_by(meet / CHILD_SOCKET, volo), "Volo's child socket")
        with pytest.raises(Told, match="Busy: another instance holds"):
            third.call("initialize", str(meet), 1, {"takeover_timeout": 0.1})
    volo.until("SERVING")
    ours.expect("replaced")
    assert who_answers(address) == volo.pid


def test_volo_is_never_sent_what_it_does_not_know(processes: Processes, meet: Path) -> None:
    """After a failed attempt of ours Volo can still be taken over from: its loop lives."""
    addresses = free_addresses(2)
    volo = Model().start(processes, meet, addresses[0])
    ours = processes.instance()
    ours.call("initialize", str(meet), 2, {"takeover_timeout": 0.1})
    with pytest.raises(Told, match="NoAnswer"):
        ours.call("listen", addresses)
    ours.call("exit")
    assert ours.wait() == 0
    second = processes.instance().serve(meet, addresses[:1])
    volo.until("TERMINATED")
    assert who_answers(addresses[0]) == second.pid
