"""Takeovers between Volo and ours, for the model of Volo and for Volo itself alike."""

from __future__ import annotations

import os
from pathlib import Path

from hotrestart_plugins.core.rendezvous import PARENT_SOCKET
from tests.support.processes import Command, Processes, eventually, open_descriptors, who_answers


def held_by(path: Path, process: Command) -> bool:
    """Whether the process has a socket that is bound to this path."""
    inodes = {
        f"socket:[{line.split()[6]}]"
        for line in Path("/proc/net/unix").read_text().splitlines()
        if line.endswith(f" {path}")
    }
    return path.exists() and bool(inodes & set(open_descriptors(process.pid).values()))


class VoloTakeovers:
    """Each of these is a test; the class that takes them in says how a Volo process is started."""

    volo: tuple[str, ...]

    def start(self, processes: Processes, meet: Path, *addresses: str) -> Command:
        """A Volo process that serves."""
        process = processes.command(*self.volo, str(meet), str(len(addresses)), *addresses)
        process.until("SERVING")
        # It binds its parent socket in its own time; there is none for a while.
        eventually(lambda: held_by(meet / PARENT_SOCKET, process), "its parent socket")
        return process

    def volo_to_ours(self, processes: Processes, meet: Path, addresses: list[str]) -> None:
        """Ours inherits every listener of a Volo process, and that one exits 0."""
        volo = self.start(processes, meet, *addresses)
        ours = processes.instance()
        ours.call("initialize", str(meet), len(addresses), {})
        assert ours.call("listen", addresses) == sorted(addresses)
        assert ours.call("parent_pid") == volo.pid
        assert volo.running
        ours.call("ready")
        volo.until("TERMINATED")
        assert volo.wait() == 0
        for address in addresses:
            assert who_answers(address) == ours.pid

    def ours_to_volo(self, processes: Processes, meet: Path, address: str) -> None:
        """A Volo process inherits ours, and ours exits 0."""
        ours = processes.instance().serve(meet, [address])
        volo = self.start(processes, meet, address)
        assert volo.lines[0].startswith(f"INHERITED {address}")
        ours.expect("replaced")
        assert ours.wait() == 0
        assert who_answers(address) == volo.pid

    def there_and_back(self, processes: Processes, meet: Path, address: str) -> None:
        """Volo to ours to Volo to ours, each time with the listener and an exit of 0."""
        first = self.start(processes, meet, address)
        inode = os.stat(address).st_ino if address.startswith("/") else 0
        second = processes.instance().serve(meet, [address])
        first.until("TERMINATED")
        assert first.wait() == 0
        third = self.start(processes, meet, address)
        assert third.lines[0].startswith(f"INHERITED {address}")
        second.expect("replaced")
        assert second.wait() == 0
        assert who_answers(address) == third.pid
        fourth = processes.instance().serve(meet, [address])
        third.until("TERMINATED")
        assert third.wait() == 0
        assert who_answers(address) == fourth.pid
        assert inode == (os.stat(address).st_ino if inode else 0)
