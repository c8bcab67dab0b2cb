"""Whole takeovers between real processes: every step, every death, every order."""

from __future__ import annotations

import fcntl
import os
import random
import re
import select
import shutil
import signal
import socket
from pathlib import Path

import pytest

from hotrestart_plugins.core.locks import Ticket
from hotrestart_plugins.core.rendezvous import CHILD_SOCKET, PARENT_SOCKET
from tests.support.processes import (
    TIMEOUT,
    Instance,
    Process,
    Processes,
    Told,
    can_connect,
    eventually,
    free_address,
    free_addresses,
    open_descriptors,
    stopped,
    who_answers,
)

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("no_leak")]

STEPS = ["initialize", "first", "second", "third", "ready"]


def step(child: Instance, name: str, meet: Path, addresses: list[str], **options: object) -> None:
    """One step of a takeover of three listeners."""
    if name == "initialize":
        child.call("initialize", str(meet), len(addresses), options)
    elif name == "ready":
        child.call("ready")
    else:
        number = STEPS.index(name) - 1
        child.call("listen", addresses[number : number + 1])


def replaced(parent: Instance) -> None:
    """It was told to go, and went, with status 0."""
    parent.expect("replaced")
    assert parent.wait() == 0


def serves(process: Process, addresses: list[str]) -> None:
    """It answers on each of the addresses, and nobody else does."""
    for address in addresses:
        for _ in range(3):
            assert who_answers(address) == process.pid


def takes_over(
    processes: Processes, meet: Path, addresses: list[str], parent: Instance
) -> Instance:
    """The next takeover works: all is inherited, the parent goes, the child serves."""
    child = processes.instance()
    child.call("initialize", str(meet), len(addresses), {})
    assert child.call("listen", addresses) == sorted(addresses)
    assert child.call("parent_pid") == parent.pid
    child.call("ready")
    replaced(parent)
    serves(child, addresses)
    return child


# -- takeovers that nothing disturbs ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "times"),
    [(1, 20), (3, 20), (100, 20), pytest.param(1000, 3, marks=pytest.mark.descriptors)],
    ids=["1", "3", "100", "1000"],
)
def test_every_takeover_completes(
    processes: Processes, meet: Path, number: int, times: int
) -> None:
    """Each of many takeovers in a row inherits every listener, however many there are."""
    addresses = free_addresses(number)
    parent = processes.instance().serve(meet, addresses)
    for _ in range(times):
        child = processes.instance()
        child.call("initialize", str(meet), number, {})
        assert child.call("listen", addresses) == sorted(addresses)
        child.call("ready")
        replaced(parent)
        assert who_answers(addresses[0]) == who_answers(addresses[-1]) == child.pid
        parent = child


@pytest.mark.root
@pytest.mark.parametrize("length", [1, 2, 10, 512])
def test_any_length_of_a_sockets_queue(processes: Processes, meet: Path, length: int) -> None:
    """However few requests the parent's queue holds, each is answered; if the parent is stopped,
    the first one is named that it has not answered."""
    script = f'echo {length} > /proc/sys/net/unix/max_dgram_qlen; exec "$@"'
    addresses = [f"{meet}/{number}.sock" for number in range(20)]
    parent = processes.instance("unshare", "--net", "sh", "-c", script, "sh")
    parent.serve(meet, addresses)
    same_network = ("nsenter", f"--net=/proc/{parent.pid}/ns/net")
    vain = processes.instance(*same_network)
    vain.call("initialize", str(meet), len(addresses), {"takeover_timeout": TIMEOUT})
    with stopped(parent), pytest.raises(Told, match=f"did not answer for {addresses[0]} within"):
        vain.call("listen", addresses)
    vain.call("exit")
    child = processes.instance(*same_network)
    child.call("initialize", str(meet), len(addresses), {})
    assert child.call("listen", addresses) == sorted(addresses)
    child.call("ready")
    replaced(parent)
    serves(child, addresses)


@pytest.mark.ipv6
def test_each_kind_of_listener(processes: Processes, meet: Path) -> None:
    """TCP, TCP6 and Unix listeners go over together."""
    addresses = [free_address(), free_address(socket.AF_INET6), str(meet / "app.sock")]
    parent = processes.instance().serve(meet, addresses)
    serves(parent, addresses)
    takes_over(processes, meet, addresses, parent)


def test_a_hundred_in_a_row(processes: Processes, meet: Path) -> None:
    """A hundred rapid restarts: each inherits, each old one exits 0, nothing is left over."""
    addresses = [free_address()]
    parent = processes.instance().serve(meet, addresses)
    first = len(parent.descriptors())
    for _ in range(100):
        child = processes.instance()
        child.call("initialize", str(meet), 1, {})
        assert child.call("listen", addresses) == addresses
        child.call("ready")
        assert parent.wait() == 0
        parent = child
    serves(parent, addresses)
    assert len(parent.descriptors()) == first
    assert sorted(os.listdir(meet)) == ["lock", "tickets", PARENT_SOCKET]


def kinds(instance: Instance) -> list[str]:
    """What its descriptors lead to, apart from the numbers that differ between two instances."""
    found = instance.descriptors().values()
    return sorted(re.sub(r"\d", "", what) for what in found)


def test_an_instance_holds_what_the_first_held(processes: Processes, meet: Path) -> None:
    """A child that took over, and a parent that was asked in vain, hold no descriptor more."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    before = kinds(parent)
    vain = processes.instance()
    vain.call("initialize", str(meet), 3, {})
    vain.call("listen", addresses)
    vain.call("exit")
    assert vain.wait() == 0
    assert parent.expect("child ended") == ["nothing", "parent"]
    assert kinds(parent) == before
    child = takes_over(processes, meet, addresses, parent)
    assert kinds(child) == before


def test_the_references_moment(processes: Processes, meet: Path) -> None:
    """TerminatePolicy.INHERITED: the last listener asked for makes the parent go, ready or not."""
    addresses = free_addresses(2)
    options = {"terminate_policy": "inherited"}
    parent = processes.instance()
    assert parent.call("initialize", str(meet), 2, options) == "parent"
    parent.call("listen", addresses)
    for _ in range(3):
        child = processes.instance()
        child.call("initialize", str(meet), 2, options)
        child.call("listen", addresses[:1])
        assert parent.running
        assert child.call("role") == "child"
        child.call("listen", addresses[1:])
        replaced(parent)
        assert child.call("role") == "parent"
        child.call("accept")
        serves(child, addresses)
        parent = child


# -- a parent that dies or stops -------------------------------------------------------------------


@pytest.mark.parametrize("after", range(len(STEPS)), ids=STEPS)
def test_the_parent_is_killed(processes: Processes, meet: Path, after: int) -> None:
    """Killed behind any step, the child goes on alone: it inherited some and binds the rest."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    for name in STEPS[: after + 1]:
        step(child, name, meet, addresses)
    parent.kill()
    for name in STEPS[after + 1 :]:
        step(child, name, meet, addresses)
    assert child.call("role") == "parent"
    serves(child, addresses)
    takes_over(processes, meet, addresses, child)


WORKER = """
import socket, sys
line = socket.socket(fileno=int(sys.argv[1]))
with socket.create_server((sys.argv[2], int(sys.argv[3]))):
    line.send(b"x")
    line.recv(1)
"""


def test_the_parents_worker_outlives_it(processes: Processes, meet: Path) -> None:
    """An address that a worker of the killed parent still holds is waited for, and bound."""
    addresses = free_addresses(2)
    parent = processes.instance().serve(meet, addresses)
    ours, theirs = socket.socketpair()
    child = processes.instance()
    step(child, "initialize", meet, addresses)
    step(child, "first", meet, addresses)
    parent.kill()
    with theirs:
        fd = theirs.fileno()
        worker = processes.python(WORKER, str(fd), *addresses[1].split(":"), pass_fds=[fd])
    assert ours.recv(1) == b"x", worker.log
    child.begin("listen", addresses[1:])
    eventually(lambda: "starting without it" in child.log, "that the child knows")
    ours.send(b"x")
    assert worker.wait() == 0, worker.log
    child.end()
    child.call("ready")
    serves(child, addresses)
    ours.close()


@pytest.mark.parametrize("after", range(len(STEPS) - 2), ids=STEPS[:-2])
def test_the_parent_is_stopped(processes: Processes, meet: Path, after: int) -> None:
    """Stopped before any answer: the child gives up in words; then the parent serves on."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    for name in STEPS[: after + 1]:
        step(child, name, meet, addresses, takeover_timeout=TIMEOUT)
    with stopped(parent):
        with pytest.raises(Told) as told:
            step(child, STEPS[after + 1], meet, addresses)
        assert told.value.kind == "NoAnswer"
        assert f"did not answer for {addresses[after]} within {TIMEOUT:g} s" in told.value.text
        assert "\n" not in told.value.text
        with pytest.raises(Told, match="this takeover has failed"):
            child.call("listen", addresses[:1])
        child.call("exit")
        assert child.wait() == 0
    # At once: the question of the one that gave up may still lie there.
    takes_over(processes, meet, addresses, parent)


@pytest.mark.parametrize("after", [0, 1])
def test_a_parent_that_goes_on_in_time(processes: Processes, meet: Path, after: int) -> None:
    """Stopped for less than the deadline, nothing is lost."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    for name in STEPS[: after + 1]:
        step(child, name, meet, addresses)
    with stopped(parent):
        child.begin("listen", addresses[after : after + 1])
    child.end()
    for name in STEPS[after + 2 :]:
        step(child, name, meet, addresses)
    replaced(parent)
    serves(child, addresses)


def test_the_parent_is_stopped_before_ready(processes: Processes, meet: Path) -> None:
    """The request to go waits in its queue: the child serves, and the parent goes on waking."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    for name in STEPS[:-1]:
        step(child, name, meet, addresses)
    with stopped(parent):
        child.call("ready")
        serves(child, addresses)
    replaced(parent)
    serves(child, addresses)
    takes_over(processes, meet, addresses, child)


# -- a child that dies -----------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(len(STEPS) - 1), ids=STEPS[:-1])
def test_the_child_is_killed(processes: Processes, meet: Path, after: int) -> None:
    """Killed behind any step before ready: the parent serves on, and can be taken over from."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    before = open_descriptors(parent.pid)
    child = processes.instance()
    for name in STEPS[: after + 1]:
        step(child, name, meet, addresses)
    child.kill()
    if after:
        assert parent.expect("child ended") == ["nothing", "parent"]
        assert (
            f"pid {child.pid} exited before it had taken over; this instance keeps serving"
            in parent.log
        )
    serves(parent, addresses)
    assert set(parent.descriptors().values()) == set(before.values())
    takes_over(processes, meet, addresses, parent)
    assert sorted(os.listdir(meet)) == ["lock", "tickets", PARENT_SOCKET]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize(
    ("call", "when"),
    [("?rename,?renameat,?renameat2", 1), ("?link,?linkat", 1), ("sendmsg", 4), ("bind", 2)],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_the_child_is_killed_in_ready(
    processes: Processes, meet: Path, call: str, when: int, *, at_once: bool
) -> None:
    """Killed between claiming the name and telling the parent, the parent is found again.

    Also by a next instance that comes before the parent has noticed anything.
    """
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance(
        "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
        "-e", f"inject={call}:signal=KILL:when={when}+",
    )  # fmt: skip
    for name in STEPS[:-1]:
        step(child, name, meet, addresses)
    child.begin("ready")
    child.wait()
    if at_once:
        takes_over(processes, meet, addresses, parent)
        return
    assert parent.expect("child ended") == ["nothing", "parent"]
    serves(parent, addresses)
    takes_over(processes, meet, addresses, parent)
    assert sorted(os.listdir(meet)) == ["lock", "tickets", PARENT_SOCKET]


def test_what_killed_ones_left(processes: Processes, meet: Path) -> None:
    """Sockets and locks of killed processes stop nobody: first parent, parent, child in turn."""
    addresses = [*free_addresses(2), str(meet / "app.sock")]
    for after in range(len(STEPS)):
        first = processes.instance()
        for name in STEPS[: after + 1]:
            step(first, name, meet, addresses)
        first.kill()
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    step(child, "initialize", meet, addresses)
    step(child, "first", meet, addresses)
    child.kill()
    parent.kill()
    assert sorted(os.listdir(meet)) == [
        "app.sock",
        "lock",
        "tickets",
        CHILD_SOCKET,
        PARENT_SOCKET,
    ]
    last = processes.instance().serve(meet, addresses)
    serves(last, addresses)
    last.call("exit")
    assert last.wait() == 0
    assert sorted(os.listdir(meet)) == ["lock", "tickets"]


# -- several at once -------------------------------------------------------------------------------


def overtaken(child: Instance, by: set[int], parent: Instance, addresses: list[str]) -> None:
    """What it had begun ended because a newer one was started; it leaves nothing behind."""
    with pytest.raises(Told, match="Overtaken: Overtaken by pid") as told:
        child.end()
    assert int(told.value.text.split()[-1]) in by
    child.call("exit")
    assert child.wait() == 0
    serves(parent, addresses)


def took_ticket(meet: Path, number: int) -> None:
    """So many tickets have been taken in all, and nobody is in the midst of taking one."""

    def taken() -> bool:
        with (meet / "tickets").open("r+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            except BlockingIOError:
                return False
            return file.read() == f"{number}\n"

    eventually(taken, f"ticket {number}")


ORDERS = [
    pytest.param(number, seed, id=f"{number}-{seed}") for number in range(2, 6) for seed in range(3)
]


@pytest.mark.parametrize(("number", "seed"), ORDERS)
def test_the_newest_serves(processes: Processes, meet: Path, number: int, seed: int) -> None:
    """Of several that wait while one boots, in whatever order they look: all others exit 0."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    booting = processes.instance()
    step(booting, "initialize", meet, addresses)
    waiting = [processes.instance() for _ in range(number)]
    for place, child in enumerate(waiting):
        child.begin("initialize", str(meet), 3, {})
        took_ticket(meet, 3 + place)
        child.stop()
    *older, newest = waiting
    order = random.Random(seed).sample(waiting, number)
    for child in order:
        child.resume()
        if child is not newest:
            overtaken(child, {newest.pid}, parent, addresses)
    booting.call("listen", addresses)
    booting.begin("ready")
    overtaken(booting, {newest.pid}, parent, addresses)
    assert newest.end() == "child"
    assert newest.call("listen", addresses) == sorted(addresses)
    assert newest.call("parent_pid") == parent.pid
    newest.call("ready")
    replaced(parent)
    serves(newest, addresses)
    assert all(child.status == 0 for child in older)
    assert sorted(os.listdir(meet)) == ["lock", "tickets", PARENT_SOCKET]


def refused(child: Instance, addresses: list[str], parent: Instance) -> Told | None:
    """Why an instance that waited for its turn could not take over; None if it could."""
    try:
        assert child.end() == "child"
        assert child.call("listen", addresses) == sorted(addresses)
        assert child.call("parent_pid") == parent.pid
        child.call("ready")
    except Told as told:
        return told
    return None


@pytest.mark.parametrize("number", [2, 5])
def test_several_children_at_once(processes: Processes, meet: Path, number: int) -> None:
    """Each takes over from the one before or is overtaken; the newest serves in the end."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    children = [processes.instance() for _ in range(number)]
    pids = {child.pid for child in children}
    for child in children:
        child.begin("initialize", str(meet), 3, {})
    waiting = set(children)
    order: list[Instance] = [parent]
    while waiting:
        turn, _, _ = select.select([child._line for child in waiting], [], [], 30)
        child = next(child for child in waiting if child._line in turn)
        waiting.remove(child)
        told = refused(child, addresses, order[-1])
        if told is None:
            replaced(order[-1])
            order.append(child)
            continue
        assert told.kind == "Overtaken"
        assert int(told.text.split()[-1]) in pids - {child.pid}
        child.call("exit")
        assert child.wait() == 0
    serves(order[-1], addresses)
    assert order[-1].call("ticket") == number + 1


def test_a_newer_one_that_ends(processes: Processes, meet: Path) -> None:
    """An instance whose newer one has failed, was stopped, or was killed goes on."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    step(child, "initialize", meet, addresses)
    with pytest.raises(Told, match="Busy"):
        step(processes.instance(), "initialize", meet, addresses, takeover_timeout=0.05)
    killed = processes.instance()
    killed.begin("initialize", str(meet), 3, {})
    took_ticket(meet, 4)
    killed.kill()
    for name in STEPS[1:]:
        step(child, name, meet, addresses)
    replaced(parent)
    serves(child, addresses)


def test_a_newer_one_while_nobody_serves(processes: Processes, meet: Path) -> None:
    """An instance that is ready when nobody else serves serves, until the newer one takes over.

    Also one whose parent has died meanwhile.
    """
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child, newer = processes.instance(), processes.instance()
    for name in STEPS[:-1]:
        step(child, name, meet, addresses)
    newer.begin("initialize", str(meet), 3, {})
    took_ticket(meet, 3)
    with stopped(newer):
        parent.kill()
        child.call("ready")
        serves(child, addresses)
    assert newer.end() == "child"
    assert newer.call("listen", addresses) == sorted(addresses)
    newer.call("ready")
    replaced(child)
    serves(newer, addresses)


def test_the_turn_has_a_time_of_its_own(processes: Processes, meet: Path) -> None:
    """`turn_timeout` limits the wait for the turn, `takeover_timeout` that for an answer."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child, third = processes.instance(), processes.instance()
    step(child, "initialize", meet, addresses)
    with pytest.raises(Told, match=r"Busy: pid .* was not done within 0\.1 s"):
        step(third, "initialize", meet, addresses, turn_timeout=0.1)
    third.begin("initialize", str(meet), 3, {"takeover_timeout": 0.1, "turn_timeout": 20.0})
    eventually(lambda: "to finish its takeover" in third.log, "that the third waits")
    child.call("exit")
    assert third.end() == "child"
    with stopped(parent), pytest.raises(Told, match=r"NoAnswer: .* within 0\.1 s"):
        third.call("listen", addresses)


def test_a_third_waits_its_turn(processes: Processes, meet: Path) -> None:
    """It waits up to the deadline, and then says whom it waited for; nobody else is disturbed."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    step(child, "initialize", meet, addresses)
    third = processes.instance()
    with pytest.raises(Told, match=f"Busy: pid {child.pid} is taking over in {meet}"):
        step(third, "initialize", meet, addresses, takeover_timeout=TIMEOUT)
    third.call("exit")
    for name in STEPS[1:]:
        step(child, name, meet, addresses)
    replaced(parent)
    serves(child, addresses)


def test_two_first_instances(processes: Processes, meet: Path) -> None:
    """Of two that find nobody, the second waits for the first, and becomes its child."""
    addresses = free_addresses(3)
    first, second = processes.instance(), processes.instance()
    assert first.call("initialize", str(meet), 3, {}) == "first parent"
    second.begin("initialize", str(meet), 3, {})
    first.call("listen", addresses)
    first.call("ready")
    assert second.end() == "child"
    assert second.call("listen", addresses) == sorted(addresses)
    second.call("ready")
    replaced(first)
    serves(second, addresses)


# -- the end of the child, and rollback ------------------------------------------------------------


def stand_by(processes: Processes, meet: Path, addresses: list[str]) -> tuple[Instance, Instance]:
    """An instance that was replaced and stands by, and its successor."""
    old = processes.instance().serve(meet, addresses, stand_by=True)
    new = processes.instance().serve(meet, addresses, stand_by=True)
    old.expect("replaced")
    serves(new, addresses)
    return old, new


def test_the_successor_crashes(processes: Processes, meet: Path) -> None:
    """The one that stands by serves again, also who had already connected, and is found again."""
    addresses = [free_address(), str(meet / "app.sock")]
    old, new = stand_by(processes, meet, addresses)
    new.stop()
    early = socket.create_connection(("127.0.0.1", int(addresses[0].split(":")[1])))
    with early:
        early.sendall(b"GET / HTTP/1.1\r\n\r\n")
        new.kill()
        assert old.expect("child ended") == ["resume", "parent"]
        early.settimeout(30)
        assert early.recv(4096).split()[-1] == str(old.pid).encode()
    serves(old, addresses)
    child = processes.instance().serve(meet, addresses)
    old.expect("replaced")
    serves(child, addresses)
    old.call("exit")
    serves(child, addresses)


def test_a_crash_after_the_window(processes: Processes, meet: Path) -> None:
    """An instance that has stood down never takes the name back; the next start finds nobody."""
    addresses = free_addresses(1)
    old, new = stand_by(processes, meet, addresses)
    old.call("stand_down")
    new.stop()
    new.kill()
    assert old.expect("child ended") == ["leave", "replaced"]
    assert old.wait() == 0
    assert "exited after the rollback window; not rolling back" in old.log
    assert not can_connect(addresses[0])
    last = processes.instance()
    assert last.call("initialize", str(meet), 1, {}) == "first parent"


def test_an_instance_that_has_stood_down_overtakes_nobody(processes: Processes, meet: Path) -> None:
    """It gives its ticket back: an instance that was started before it can serve, and it cannot."""
    addresses = free_addresses(1)
    ticket = Ticket(meet / "tickets", 0)
    old, new = stand_by(processes, meet, addresses)
    assert ticket.newest() == new.pid
    new.kill()
    assert old.expect("child ended") == ["resume", "parent"]
    assert ticket.newest() == old.pid
    new = processes.instance().serve(meet, addresses)
    old.expect("replaced")
    old.call("stand_down")
    new.kill()
    assert ticket.newest() is None
    ticket.close()


def test_the_successor_fails(processes: Processes, meet: Path) -> None:
    """One that ends as a failure (crashed) leaves the same sign as one that was killed."""
    addresses = free_addresses(1)
    old, new = stand_by(processes, meet, addresses)
    new.call("close", {"crashed": True})
    new.kill()
    assert old.expect("child ended") == ["resume", "parent"]
    serves(old, addresses)


def test_the_successor_is_stopped_on_purpose(processes: Processes, meet: Path) -> None:
    """After its clean close nobody serves again, and nothing is left."""
    addresses = [free_address(), str(meet / "app.sock")]
    old, new = stand_by(processes, meet, addresses)
    new.call("exit")
    assert new.wait() == 0
    assert old.expect("child ended")[0] == "leave"
    assert old.wait() == 0
    assert not any(can_connect(address) for address in addresses)
    assert sorted(os.listdir(meet)) == ["lock", "tickets"]


@pytest.mark.parametrize("made_again", [False, True])
def test_the_directory_is_removed_before_the_successor_crashes(
    processes: Processes, meet: Path, *, made_again: bool
) -> None:
    """A name that went with its directory is no sign of a stop: the old instance serves again."""
    addresses = free_addresses(1)
    place = meet / "d"
    old, new = stand_by(processes, place, addresses)
    shutil.rmtree(place)
    if made_again:
        another = processes.instance()
        assert another.call("initialize", str(place), 1, {}) == "first parent"
        another.kill()
    new.kill()
    assert old.expect("child ended") == ["resume", "parent"]
    assert f"{place} was removed after this instance had found it" in old.log
    serves(old, addresses)
    assert not (place / PARENT_SOCKET).exists()


def test_the_directory_is_removed_while_a_third_serves(processes: Processes, meet: Path) -> None:
    """It holds a lock that says so: the one that stands by longest does not serve beside it."""
    addresses = free_addresses(1)
    place = meet / "d"
    old, new = stand_by(processes, place, addresses)
    third = processes.instance().serve(place, addresses)
    new.expect("replaced")
    shutil.rmtree(place)
    new.kill()
    assert old.expect("child ended") == ["leave", "replaced"]
    assert old.wait() == 0
    serves(third, addresses)


@pytest.mark.parametrize("made_again", [False, True])
def test_the_directory_is_removed_before_the_claim(
    processes: Processes, meet: Path, *, made_again: bool
) -> None:
    """A new instance that others cannot find, or keep order with, fails with 75."""
    addresses = free_addresses(1)
    place = meet / "d"
    old = processes.instance().serve(place, addresses)
    new, alone = processes.instance(), processes.instance()
    new.call("initialize", str(place), 1, {})
    new.call("listen", addresses)
    shutil.rmtree(place)
    if made_again:
        another = processes.instance()
        assert another.call("initialize", str(place), 1, {}) == "first parent"
        another.call("close")
    with pytest.raises(Told, match=f"TakeoverError: {place} was removed"):
        new.call("ready")
    new.call("exit")
    serves(old, addresses)
    assert alone.call("initialize", str(place), 1, {}) == "first parent"


def test_the_successor_was_itself_replaced(processes: Processes, meet: Path) -> None:
    """If another instance serves, the one that stands by leaves, and unlinks nothing of its."""
    addresses = [free_address(), str(meet / "app.sock")]
    old, new = stand_by(processes, meet, addresses)
    third = processes.instance().serve(meet, addresses)
    new.expect("replaced")
    new.call("exit")
    assert new.wait() == 0
    assert old.expect("child ended")[0] == "leave"
    assert old.wait() == 0
    serves(third, addresses)


def test_a_third_while_one_stands_by(processes: Processes, meet: Path) -> None:
    """It waits for the one that stands by to take back, and becomes its child."""
    addresses = free_addresses(3)
    old, new = stand_by(processes, meet, addresses)
    third = processes.instance()
    with stopped(old):
        new.kill()
        third.begin("initialize", str(meet), 3, {})
    assert old.expect("child ended") == ["resume", "parent"]
    assert third.end() == "child"
    assert third.call("listen", addresses) == sorted(addresses)
    assert third.call("parent_pid") == old.pid
    third.call("ready")
    old.expect("replaced")
    serves(third, addresses)


@pytest.mark.parametrize("crashes", [False, True])
def test_the_end_is_heard_before_the_request_to_go(
    processes: Processes, meet: Path, *, crashes: bool
) -> None:
    """A slow instance reads first what the new one had said: it was replaced, and knows it.

    Then it leaves the name to a third one that has taken over from the new one, and takes it back
    from one that has crashed.
    """
    addresses = free_addresses(1)
    old = processes.instance().serve(meet, addresses, stand_by=True)
    new = processes.instance()
    new.call("initialize", str(meet), 1, {})
    new.call("listen", addresses)
    with stopped(old):
        new.call("ready")
        if crashes:
            new.kill()
        else:
            third = processes.instance().serve(meet, addresses)
            new.expect("replaced")
            assert new.wait() == 0
    old.expect("replaced")
    if crashes:
        assert old.expect("child ended") == ["resume", "parent"]
        serves(old, addresses)
    else:
        assert old.expect("child ended") == ["leave", "replaced"]
        assert old.wait() == 0
        serves(third, addresses)


def test_one_that_stands_by_and_hangs(processes: Processes, meet: Path) -> None:
    """If it does not take back within the deadline, the next instance names it and gives up."""
    addresses = free_addresses(3)
    old, new = stand_by(processes, meet, addresses)
    third = processes.instance()
    with stopped(old):
        new.kill()
        with pytest.raises(Told, match=f"NoAnswer: pid {old.pid} stands by to serve again"):
            step(third, "initialize", meet, addresses, takeover_timeout=TIMEOUT)
    assert old.expect("child ended") == ["resume", "parent"]
    serves(old, addresses)


@pytest.mark.parametrize("after", range(len(STEPS) - 1), ids=STEPS[:-1])
def test_the_parent_dies_while_another_stands_by(
    processes: Processes, meet: Path, after: int
) -> None:
    """The child turns to the one that serves again, so that it is told to go as well."""
    addresses = [*free_addresses(2), str(meet / "app.sock")]
    old, new = stand_by(processes, meet, addresses)
    third = processes.instance()
    for name in STEPS[: after + 1]:
        step(third, name, meet, addresses)
    new.kill()
    for name in STEPS[after + 1 :]:
        step(third, name, meet, addresses)
    assert old.expect("child ended") == ["resume", "parent"]
    old.expect("replaced")
    old.call("exit")
    assert old.wait() == 0
    serves(third, addresses)


# -- Unix listeners --------------------------------------------------------------------------------

CONNECT = """
import os, socket, sys
path = sys.argv[1]
served = 0
print("started", flush=True)
os.set_blocking(0, False)
while True:
    try:
        if os.read(0, 1) == b"":
            break
    except BlockingIOError:
        pass
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
        while sock.recv(4096):
            pass
    served += 1
print(served, flush=True)
"""


def test_the_path_is_never_gone(processes: Processes, meet: Path) -> None:
    """Somebody connects all the time during takeovers, and is never refused; then it is gone."""
    path = str(meet / "app.sock")
    parent = processes.instance().serve(meet, [path])
    inode = os.stat(path).st_ino
    reader, writer = os.pipe()
    client = processes.python(CONNECT, path, stdin=reader)
    os.close(reader)
    client.line()
    for _ in range(10):
        child = processes.instance().serve(meet, [path])
        replaced(parent)
        assert os.stat(path).st_ino == inode
        parent = child
    os.close(writer)
    assert int(client.line()) > 0, client.log
    assert client.wait() == 0
    parent.call("exit")
    assert parent.wait() == 0
    assert not os.path.lexists(path)


def test_a_path_that_is_no_longer_asked_for(processes: Processes, meet: Path) -> None:
    """The old instance names it, and unlinks the path."""
    kept, dropped = str(meet / "kept.sock"), str(meet / "dropped.sock")
    parent = processes.instance().serve(meet, [kept, dropped])
    child = processes.instance().serve(meet, [kept])
    replaced(parent)
    assert parent.log.count("does not use") == 1
    assert f"does not use {dropped};" in parent.log
    assert not os.path.lexists(dropped)
    serves(child, [kept])


def test_a_path_bound_anew_is_not_the_old_ones(processes: Processes, meet: Path) -> None:
    """A path that meanwhile leads to somebody else's socket is left alone."""
    path = meet / "app.sock"
    parent = processes.instance().serve(meet, [str(path)])
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        parent.call("exit")
        assert parent.wait() == 0
        assert path.exists()


def test_a_child_that_gives_up_leaves_the_path(processes: Processes, meet: Path) -> None:
    """A failed child unlinks what it bound, and nothing that it inherited."""
    path, own = str(meet / "app.sock"), str(meet / "own.sock")
    parent = processes.instance().serve(meet, [path])
    child = processes.instance()
    child.call("initialize", str(meet), 2, {})
    assert child.call("listen", [path, own]) == [path]
    child.call("exit")
    assert child.wait() == 0
    assert not os.path.lexists(own)
    serves(parent, [path])


def test_an_address_held_by_a_stranger(processes: Processes, meet: Path) -> None:
    """An address that some other process serves is refused: who holds it, where was looked."""
    addresses = [free_address(), str(meet / "app.sock")]
    elsewhere = meet / "elsewhere"
    stranger = processes.instance().serve(elsewhere, addresses)
    for address in addresses:
        child = processes.instance()
        child.call("initialize", str(meet), 1, {})
        with pytest.raises(Told) as told:
            child.call("listen", [address])
        assert told.value.text == (
            f"{address} is taken by pid {stranger.pid}, which is not to be reached in {meet}: "
            "stop it, or pass the --hot-restart-dir that it was started with"
        )
        child.call("exit")
        assert child.wait() == 0
    serves(stranger, addresses)


# -- floods ----------------------------------------------------------------------------------------


def test_a_flood(processes: Processes, meet: Path) -> None:
    """100,000 random datagrams at a live parent; then a takeover works, and nothing has leaked."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    before = parent.descriptors()
    chance = random.Random(2)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nameless,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named,
    ):
        named.bind(str(meet / CHILD_SOCKET))
        for sock in (nameless, named):
            sock.connect(str(meet / PARENT_SOCKET))
            sock.settimeout(30)
            for number in range(50_000):
                size = chance.choice((1, 2, 5, 6, 20, 1030))
                sock.send(b"\x03" if number % 100 == 0 else chance.randbytes(size))
    serves(parent, addresses)
    assert parent.descriptors() == before
    takes_over(processes, meet, addresses, parent)


# -- forks, and gevent -----------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["first parent", "child", "parent", "replaced"])
def test_a_fork(processes: Processes, meet: Path, role: str) -> None:
    """A forked worker has none of the core's descriptors; its end unlinks and frees nothing."""
    addresses = [free_address(), str(meet / "app.sock")]
    first = processes.instance()
    first.call("initialize", str(meet), 2, {"stand_by": True})
    first.call("listen", addresses)
    if role == "first parent":
        instance = first
    elif role == "child":
        first.call("ready")
        instance = processes.instance()
        instance.call("initialize", str(meet), 2, {})
        instance.call("listen", addresses)
    elif role == "parent":
        first.call("ready")
        instance = first
        asker = processes.instance()
        asker.call("initialize", str(meet), 2, {})
        asker.call("listen", addresses)
    else:
        first.call("ready")
        processes.instance().serve(meet, addresses)
        first.expect("replaced")
        instance = first
    assert instance.call("role") == role
    names = sorted(os.listdir(meet))
    before = open_descriptors(instance.pid)
    found = instance.call("fork")
    assert found["kept"] == []
    assert found["core"] > 0
    assert (found["role"], found["threads"]) == ("closed", 1)
    assert sorted(os.listdir(meet)) == names
    assert open_descriptors(instance.pid) == before
    assert instance.call("role") == role
    if role in ("first parent", "child"):
        third = processes.instance()
        with pytest.raises(Told, match=f"Busy: pid {instance.pid} is taking over"):
            step(third, "initialize", meet, addresses, takeover_timeout=0.1)
        third.call("exit")
        instance.call("ready")
        if role == "child":
            first.expect("replaced")
        serves(instance, addresses)


MULTIPROCESSING = """
import multiprocessing, os, sys
from hotrestart_plugins import HotRestart
def worker(mine, answers):
    answers.put(mine & core())
def core():
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass
    return found
context = multiprocessing.get_context("fork")
answers = context.SimpleQueue()
before = core()
hot = HotRestart()
hot.initialize(sys.argv[1])
hot.ready()
mine = core() - before
process = context.Process(target=worker, args=(mine, answers))
process.start()
process.join()
print(len(mine), len(answers.get()), os.path.exists(f"{sys.argv[1]}/volo_hot_restart_parent.sock"))
hot.close()
"""


def test_a_multiprocessing_worker(processes: Processes, meet: Path) -> None:
    """A worker of multiprocessing's fork has none of the core's descriptors either."""
    process = processes.python(MULTIPROCESSING, str(meet))
    core, kept, there = process.line().split()
    assert int(core) >= 2
    assert (kept, there) == ("0", "True")
    assert process.wait() == 0, process.log


GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import socket, sys
import gevent
import gevent.event
from hotrestart_plugins import HotRestart, Role
meet, address = sys.argv[1:]
hot = HotRestart(takeover_timeout=20)
print(hot.initialize(meet, 1).value, flush=True)
(sock,) = hot.listen([address])
print(*sorted(hot.inherited), flush=True)
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.001)
ticking = gevent.spawn(tick)
hot.ready()
print(hot.role.value, flush=True)
done = gevent.event.Event()
loop = gevent.get_hub().loop
readable = loop.io(hot.fileno(), 1)
def handle():
    hot.handle()
    if hot.child is not None:
        hot.child.alive
    if hot.role is Role.REPLACED:
        done.set()
readable.start(handle)
done.wait()
readable.stop()
readable.close()
sock.close()
hot.close()
assert ticks
print("closed", flush=True)
"""


def test_beside_gevent(processes: Processes, meet: Path) -> None:
    """With everything patched, and answering inside the hub, takeovers complete."""
    pytest.importorskip("gevent")
    address = free_address()
    parent = processes.python(GEVENT, str(meet), address)
    assert [parent.line() for _ in range(3)] == ["first parent", "", "parent"]
    child = processes.python(GEVENT, str(meet), address)
    assert [child.line() for _ in range(3)] == ["child", address, "parent"]
    assert parent.line() == "closed"
    assert parent.wait() == 0, parent.log
    third = processes.instance().serve(meet, [address])
    assert child.line() == "closed"
    assert child.wait() == 0, child.log
    serves(third, [address])


@pytest.mark.parametrize("files", [12, 30, 38, 45, 60])
def test_too_few_files(processes: Processes, meet: Path, files: int) -> None:
    """A child that may not open enough files says so in one line; the parent serves on."""
    addresses = free_addresses(30)
    parent = processes.instance().serve(meet, addresses)
    child = processes.instance()
    child.call("limit", files)
    child.call("initialize", str(meet), 30, {})
    with pytest.raises(Told) as told:
        child.call("listen", addresses)
    assert told.value.kind in {"ConfigurationError", "WrongDescriptor", "AddressError"}
    assert "ulimit -n" in told.value.text or "Too many open files" in told.value.text
    assert "\n" not in told.value.text
    child.call("exit")
    takes_over(processes, meet, addresses, parent)


def test_the_signals_of_a_host_do_not_matter(processes: Processes, meet: Path) -> None:
    """A parent that gets signals all the time while it answers still answers everything."""
    addresses = free_addresses(3)
    parent = processes.instance().serve(meet, addresses)
    for _ in range(20):
        parent.kill(signal.SIGWINCH)
        parent.kill(signal.SIGCONT)
    takes_over(processes, meet, addresses, parent)
