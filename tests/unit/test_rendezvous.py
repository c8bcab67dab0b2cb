"""The meeting directory: which one, whether it can be trusted, and order in it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotrestart_plugins import HotRestart, Role
from hotrestart_plugins.core.address import MAX_UNIX_PATH, parse
from hotrestart_plugins.core.datagram import Endpoint
from hotrestart_plugins.core.listeners import OwnedPath
from hotrestart_plugins.core.locks import ClaimExpired
from hotrestart_plugins.core.rendezvous import (
    CHILD_SOCKET,
    PARENT_SOCKET,
    RendezvousDirectory,
    default_directory,
)
from hotrestart_plugins.errors import Busy, RendezvousError
from tests.support.processes import Processes

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def place(no_leak: None, meet: Path) -> Iterator[RendezvousDirectory]:
    made = RendezvousDirectory(meet)
    yield made
    made.close()


def test_the_names_are_volos() -> None:
    """Both sockets have the names that a Volo process looks for."""
    assert PARENT_SOCKET == "volo_hot_restart_parent.sock"
    assert CHILD_SOCKET == "volo_hot_restart_child.sock"


@pytest.mark.parametrize(
    ("address", "uid", "directory"),
    [
        ("127.0.0.1:8000", 0, "/run/hotrestart/127.0.0.1:8000"),
        ("127.0.0.1:8000", 1000, "/tmp/hotrestart-1000/127.0.0.1:8000"),
        ("[::1]:8000", 0, "/run/hotrestart/[::1]:8000"),
        ("unix:/run/app.sock", 0, "/run/hotrestart/%2Frun%2Fapp.sock"),
        ("unix:@app", 0, "/run/hotrestart/@app"),
    ],
)
def test_the_default_directory(
    address: str, uid: int, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs on the user and the first address, and on nothing else."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    for name in ("HOME", "XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, "/elsewhere")
    assert str(default_directory(parse(address)[0])) == directory


def test_the_default_directory_is_always_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long addresses have directories of their own, in which a socket's path fits."""
    monkeypatch.setattr(os, "geteuid", lambda: 4294967294)
    long = ["/" + "x" * 105 + end for end in "ab"]
    found = [default_directory(parse(f"unix:{path}")[0]) for path in long]
    assert found[0] != found[1]
    assert all(len(str(one / PARENT_SOCKET)) <= MAX_UNIX_PATH for one in found)


def refused(directory: Path) -> str:
    """The one line with which a directory is refused, at every attempt."""
    for _ in range(2):
        with pytest.raises(RendezvousError) as error:
            HotRestart(takeover_timeout=0.1).initialize(directory)
    text = str(error.value)
    assert str(directory) in text
    assert "--hot-restart-dir" in text
    assert "\n" not in text
    return text


def test_a_missing_directory_is_made(meet: Path) -> None:
    """A directory that is not there is made, ours alone, with those above it."""
    RendezvousDirectory(meet / "a" / "b").close()
    for made in (meet / "a", meet / "a" / "b"):
        assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_writable_by_others(meet: Path, mode: int) -> None:
    """A directory that others may write in is refused, with the command that mends it."""
    meet.chmod(mode)
    assert f"is writable by others (mode {mode:04o}): chmod 700 it" in refused(meet)


@pytest.mark.root
def test_not_ours(meet: Path) -> None:
    """A directory of another user is refused, with both uids."""
    os.chown(meet, 12345, -1)
    assert "belongs to uid 12345, this process runs as uid 0: chown it" in refused(meet)


def test_a_symlink(meet: Path) -> None:
    """A symbolic link is refused, even to a directory that is ours; a dangling one too."""
    for target in (meet, meet / "nowhere"):
        link = meet / f"link-to-{target.name}"
        link.symlink_to(target)
        assert f"is a symbolic link to {target}: name the directory itself" in refused(link)


def test_a_plain_file(meet: Path) -> None:
    """A plain file is refused, in its own place and in that of a directory above."""
    (meet / "file").touch()
    assert "is no directory: remove it" in refused(meet / "file")
    assert "Not a directory" in refused(meet / "file" / "below")


def test_too_long(meet: Path) -> None:
    """A directory in which a socket's path would not fit is refused before it is made."""
    room = MAX_UNIX_PATH - len(PARENT_SOCKET) - 1
    fits = meet / ("x" * (room - len(str(meet)) - 1))
    RendezvousDirectory(fits).close()
    longer = Path(f"{fits}x")
    assert "makes 108 bytes, 107 fit" in refused(longer)
    assert not longer.exists()


def test_a_directory_of_defaults_that_is_not_ours_alone() -> None:
    """The directory that holds the default ones is checked as well: whoever owns it owns all."""
    with tempfile.TemporaryDirectory(prefix="hr-") as root:
        above = Path(root) / f"hotrestart-{os.geteuid()}"
        above.mkdir()
        above.chmod(0o777)
        with pytest.raises(RendezvousError, match="writable by others"):
            RendezvousDirectory(above / "127.0.0.1:8000")


READ_ONLY = """
import os, subprocess, sys
from hotrestart_plugins import HotRestart
from hotrestart_plugins.errors import RendezvousError
directory, there = sys.argv[1:]
def mount(*args):
    subprocess.run(["mount", *args], check=True)
mount("-t", "tmpfs", "none", directory)
if there:
    os.mkdir(directory + "/meet", 0o700)
    open(directory + "/meet/" + there, "w").close()
mount("-o", "remount,ro", directory)
try:
    HotRestart().initialize(directory + "/meet")
except RendezvousError as error:
    print(error)
"""


@pytest.mark.root
@pytest.mark.parametrize("there", ["", "nothing", "lock"])
def test_a_read_only_file_system(meet: Path, processes: Processes, there: str) -> None:
    """On a read-only file system the one line says so, whatever is there already."""
    process = processes.command("unshare", "-m", sys.executable, "-c", READ_ONLY, str(meet), there)
    line = process.line()
    assert line == (
        f"{meet}/meet cannot be used to meet in: Read-only file system: "
        "pass another --hot-restart-dir"
    )
    assert process.wait() == 0


@pytest.mark.parametrize("kind", ["file", "directory", "stream"])
def test_something_else_at_the_parents_name(meet: Path, kind: str) -> None:
    """What is no datagram socket at the parent's name is not a parent, and never hangs anything."""
    path = meet / PARENT_SOCKET
    keep = None
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    else:
        keep = socket.socket(socket.AF_UNIX)
        keep.bind(str(path))
        keep.listen()
    hot = HotRestart(takeover_timeout=0.1)
    if kind == "file":
        assert hot.initialize(meet) is Role.INITIAL
        hot.ready()
    elif kind == "directory":
        assert hot.initialize(meet) is Role.INITIAL
        with pytest.raises(RendezvousError, match="cannot be used to meet in"):
            hot.ready()
    else:
        assert "cannot be reached" in refused(meet)
    hot.close()
    if keep is not None:
        keep.close()


def test_a_claim_is_of_a_file(meet: Path) -> None:
    """A name is released only while it is still the file that was claimed."""
    (meet / "a").touch()
    claim = OwnedPath(str(meet / "a"))
    (meet / "b").touch()
    os.rename(meet / "b", meet / "a")
    assert not claim.holds()
    claim.release()
    assert (meet / "a").exists()
    OwnedPath(str(meet / "a")).release()
    assert not (meet / "a").exists()


def test_claiming_the_parents_name(place: RendezvousDirectory) -> None:
    """The name leads to the old socket until it leads to the new one, and nothing is left over."""
    old, _ = place.claim_parent(lambda: None)
    new, claim = place.claim_parent(lambda: None)
    probe = Endpoint()
    assert place.connect_to_parent(probe)
    probe.send(b"\x03")
    assert old.receive() is None
    assert new.receive() is not None
    assert sorted(os.listdir(place.directory)) == ["lock", PARENT_SOCKET]
    claim.release()
    for endpoint in (old, new, probe):
        endpoint.close()


def test_a_claim_that_fails_is_undone(place: RendezvousDirectory) -> None:
    """If the parent cannot be told, it has its name back, and nothing is left over."""
    old, _ = place.claim_parent(lambda: None)

    def fail() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        place.claim_parent(fail)
    probe = Endpoint()
    assert place.connect_to_parent(probe)
    probe.send(b"\x03")
    assert old.receive() is not None
    assert sorted(os.listdir(place.directory)) == ["lock", PARENT_SOCKET]
    old.close()
    probe.close()


def test_a_first_claim_that_fails_leaves_no_name(place: RendezvousDirectory) -> None:
    """If there was no name before, there is none afterwards."""

    def fail() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        place.claim_parent(fail)
    assert os.listdir(place.directory) == ["lock"]


def test_a_claim_that_has_expired(place: RendezvousDirectory) -> None:
    """It changes no name; and of a name that another one has taken since, nothing is undone."""
    old, _ = place.claim_parent(lambda: None)

    def expired() -> None:
        raise ClaimExpired

    with pytest.raises(ClaimExpired):
        place.claim_parent(lambda: None, expired)
    others: list[tuple[Endpoint, OwnedPath]] = []

    def taken() -> None:
        aside = Endpoint()
        aside.bind(str(place.directory / "new.1"))
        os.rename(place.directory / "new.1", place.parent_path)
        others.append((aside, OwnedPath(place.parent_path)))
        raise ClaimExpired

    with pytest.raises(ClaimExpired):
        place.claim_parent(taken)
    assert others[0][1].holds()
    assert sorted(os.listdir(place.directory)) == ["lock", PARENT_SOCKET]
    others[0][0].close()
    old.close()


def test_one_claim_at_a_time(place: RendezvousDirectory, processes: Processes) -> None:
    """A claim of another process, or of another instance in this one, is waited for, and named."""
    code = HOLD.replace(
        "getattr(place.locks, sys.argv[2])(*map(float, sys.argv[3:]))",
        "held = place.locks.claim(0); held.__enter__()",
    )
    other = processes.python(code, str(place.directory))
    other.line()
    with pytest.raises(Busy, match=f"pid {other.pid} is about to claim"), place.locks.claim(0.05):
        raise AssertionError("two at once")
    other.kill()
    second = RendezvousDirectory(place.directory)
    with place.locks.claim(0):
        with pytest.raises(Busy, match=f"pid {os.getpid()} is about"), second.locks.claim(0.05):
            raise AssertionError("two at once")
        second.close()  # which frees nothing of the other one's
        third = RendezvousDirectory(place.directory)
        with pytest.raises(Busy), third.locks.claim(0.05):
            raise AssertionError("two at once")
    with third.locks.claim(0):
        assert place.locks.standing_by() is None
    third.close()


def test_who_serves(place: RendezvousDirectory, processes: Processes) -> None:
    """It is known of another process, and of another instance in this one, until its end."""
    second = RendezvousDirectory(place.directory)
    place.locks.serve()
    assert (place.locks.another_serves(), second.locks.another_serves()) == (False, True)
    other = processes.python(HOLD, str(place.directory), "serve")
    other.line()
    second.locks.serve()
    place.locks.stop_serving()
    assert place.locks.another_serves()
    assert second.locks.another_serves()
    other.kill()
    assert (place.locks.another_serves(), second.locks.another_serves()) == (True, False)
    look = processes.python(
        HOLD.replace('"held"', "place.locks.another_serves()"), str(place.directory), "stand_by"
    )
    assert look.line() == "True"
    second.close()
    assert not place.locks.another_serves()
    assert place.locks.standing_by() == look.pid


def test_what_a_killed_process_left_is_cleared(place: RendezvousDirectory) -> None:
    """A dead child's socket, and a parent socket that never got its name, are removed."""
    for name in (CHILD_SOCKET, "new.4194304", "new.4194304.old"):
        dead = Endpoint()
        dead.bind(str(place.directory / name))
        dead.close()
    endpoint, claim = place.bind_child(0)
    assert sorted(os.listdir(place.directory)) == ["lock", CHILD_SOCKET]
    claim.release()
    endpoint.close()


def test_a_name_on_its_way_is_left_alone(place: RendezvousDirectory) -> None:
    """A parent socket that a living process is about to name is not cleared away."""
    aside = Endpoint()
    aside.bind(str(place.directory / "new.1"))
    endpoint, claim = place.bind_child(0)
    assert (place.directory / "new.1").exists()
    claim.release()
    endpoint.close()
    aside.close()


@pytest.mark.parametrize("connected", [False, True])
def test_a_living_child_without_the_lock(place: RendezvousDirectory, *, connected: bool) -> None:
    """A child that knows no lock (Volo) is waited for, and then named as the reason."""
    parent, claim = place.claim_parent(lambda: None)
    other = Endpoint()
    other.bind(place.child_path)
    if connected:
        assert place.connect_to_parent(other)
    with pytest.raises(Busy, match=f"another instance holds {place.child_path}"):
        place.bind_child(0.05)
    assert os.path.exists(place.child_path)
    claim.release()
    parent.close()
    other.close()


HOLD = """
import os, sys, time
from hotrestart_plugins.core.rendezvous import RendezvousDirectory
place = RendezvousDirectory(sys.argv[1])
getattr(place.locks, sys.argv[2])(*map(float, sys.argv[3:]))
print("held", flush=True)
import signal
signal.pause()
"""


def test_the_lock(place: RendezvousDirectory, processes: Processes) -> None:
    """Whoever takes over is named to who waits in vain, and the kernel frees a dead one's lock."""
    other = processes.python(HOLD, str(place.directory), "take_turn", "0")
    other.line()
    with pytest.raises(Busy, match=f"pid {other.pid} is taking over in .* within 0.05 s"):
        place.locks.take_turn(0.05)
    other.kill()
    place.locks.take_turn(0)
    place.locks.end_turn()


def test_standing_by(place: RendezvousDirectory, processes: Processes) -> None:
    """Who stands by is known by its pid, also while another takes over, until it dies."""
    assert place.locks.standing_by() is None
    other = processes.python(HOLD, str(place.directory), "stand_by")
    other.line()
    place.locks.take_turn(0)
    place.locks.stand_by()
    assert place.locks.standing_by() == other.pid
    place.locks.stand_down()
    other.kill(signal.SIGKILL)
    assert place.locks.standing_by() is None
    place.locks.end_turn()


def test_two_in_one_process(place: RendezvousDirectory) -> None:
    """Two instances in one process keep order too, though POSIX locks do not tell them apart."""
    place.locks.take_turn(0)
    second = RendezvousDirectory(place.directory)
    with pytest.raises(Busy, match=f"pid {os.getpid()} "):
        second.locks.take_turn(0.05)
    second.close()
    third = RendezvousDirectory(place.directory)
    with pytest.raises(Busy):
        third.locks.take_turn(0.05)
    third.close()
    code = "import sys; from hotrestart_plugins.core.rendezvous import RendezvousDirectory as M\n"
    code += "m = M(sys.argv[1]); print(m.locks._try_turn())"
    outside = subprocess.run(
        [sys.executable, "-c", code, str(place.directory)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert outside.stdout == f"{os.getpid()}\n"
    place.locks.end_turn()


def test_nothing_is_left_of_a_first_instance(meet: Path) -> None:
    """An instance that came and went leaves only the files of the locks behind."""
    hot = HotRestart()
    assert hot.initialize(meet) is Role.INITIAL
    hot.ready()
    hot.close()
    assert sorted(os.listdir(meet)) == ["lock", "tickets"]
