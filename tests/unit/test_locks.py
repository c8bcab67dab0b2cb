"""Tickets: the order of starts, and who of them lives. Turns are tested with the directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hotrestart_plugins.core.locks import Ticket
from hotrestart_plugins.errors import Busy
from tests.support.processes import Command, Processes

pytestmark = pytest.mark.usefixtures("no_leak")

TAKE = """
import signal, sys
from pathlib import Path
from hotrestart_plugins.core.locks import Ticket
ticket = Ticket(Path(sys.argv[1]), 0)
print(ticket.number, flush=True)
signal.pause()
"""


def another(processes: Processes, path: Path) -> tuple[Command, int]:
    """Another process, and its ticket."""
    process = processes.python(TAKE, str(path))
    return process, int(process.line())


def test_the_newest_living_one_counts(processes: Processes, meet: Path) -> None:
    """Of several newer ones the newest is told, as long as it lives; older ones are not."""
    path = meet / "tickets"
    _, first = another(processes, path)
    ticket = Ticket(path, 0)
    assert (first, ticket.number) == (1, 2)
    assert ticket.newest() is None
    newer = [another(processes, path) for _ in range(4)]
    assert [number for _, number in newer] == [3, 4, 5, 6]
    pids = [process.pid for process, _ in newer]
    assert ticket.newest() == pids[3]
    newer[1][0].kill(signal.SIGKILL)
    assert ticket.newest() == pids[3]
    newer[3][0].kill(signal.SIGKILL)
    assert ticket.newest() == pids[2]
    newer[2][0].kill(signal.SIGKILL)
    assert ticket.newest() == pids[0]
    newer[0][0].kill(signal.SIGKILL)
    assert ticket.newest() is None
    ticket.close()


def test_numbers_do_not_come_again(processes: Processes, meet: Path) -> None:
    """The file counts, also when nobody holds a ticket."""
    path = meet / "tickets"
    for number in (1, 2, 3):
        ticket = Ticket(path, 0)
        assert ticket.number == number
        ticket.close()
    assert path.read_text() == "3\n"
    process, number = another(processes, path)
    assert number == 4
    process.kill(signal.SIGKILL)


@pytest.mark.parametrize("content", ["", "nonsense\n", "9" * 25, "-3\n", "1\n2\n"])
def test_a_file_that_does_not_count(processes: Processes, meet: Path, content: str) -> None:
    """Whatever was made of the file, the next ticket is above those of the living."""
    path = meet / "tickets"
    path.write_text("40\n")
    _, number = another(processes, path)
    assert number == 41
    with path.open("r+") as file:  # its locks are the other process's
        file.truncate()
        file.write(content)
    ticket = Ticket(path, 0)
    assert ticket.number == 42
    assert path.read_text() == "42\n"
    ticket.close()


def test_two_in_one_process(processes: Processes, meet: Path) -> None:
    """POSIX locks do not tell two instances in one process apart; the tickets do."""
    path = meet / "tickets"
    first, second = Ticket(path, 0), Ticket(path, 0)
    assert (first.number, second.number) == (1, 2)
    assert (first.newest(), second.newest()) == (os.getpid(), None)
    other, number = another(processes, path)
    third = Ticket(path, 0)
    assert (number, third.number) == (3, 4)
    assert first.newest() == second.newest() == os.getpid()
    third.close()
    assert first.newest() == second.newest() == other.pid
    other.kill(signal.SIGKILL)
    assert first.newest() == os.getpid()
    second.close()
    assert first.newest() is None
    first.close()
    first.close()


FORK = """
import os, signal, sys
from pathlib import Path
from hotrestart_plugins.core.locks import Ticket
ticket = Ticket(Path(sys.argv[1]), 0)
for closes in (True, False):
    pid = os.fork()
    if pid == 0:
        if closes:
            ticket.close()
        os._exit(0)
    assert os.waitpid(pid, 0) == (pid, 0)
print(ticket.number, flush=True)
signal.pause()
"""


def test_a_fork_holds_none(processes: Processes, meet: Path) -> None:
    """A forked child that closes its copy, or ends, frees nothing; its parent's end frees it."""
    path = meet / "tickets"
    ticket = Ticket(path, 0)
    parent = processes.python(FORK, str(path))
    assert parent.line() == "2"
    assert ticket.newest() == parent.pid
    parent.kill(signal.SIGKILL)
    assert ticket.newest() is None
    ticket.close()


HANG = """
import signal, sys
from pathlib import Path
from hotrestart_plugins.core.locks import _LockFile
print(_LockFile.of(Path(sys.argv[1])).lock(0), flush=True)
signal.pause()
"""


def test_one_that_hangs_while_it_takes_its_ticket(processes: Processes, meet: Path) -> None:
    """It is waited for, up to the deadline, and then named; it is freed by its end."""
    path = meet / "tickets"
    other = processes.python(HANG, str(path))
    assert other.line() == "True"
    with pytest.raises(Busy, match=f"pid {other.pid} is taking a ticket in {meet}"):
        Ticket(path, 0.05)
    other.kill(signal.SIGKILL)
    ticket = Ticket(path, 0)
    assert ticket.number == 1
    ticket.close()


def test_a_full_disk(meet: Path) -> None:
    """A ticket can be taken where nothing can be written."""
    path = Path("/dev/full")
    ticket = Ticket(path, 0)
    assert ticket.number == 1
    ticket.close()
