"""An instance on strings: commands come in and results go out, one line of JSON each.

Between two commands it does what a host does: it answers on the parent socket, watches its child,
accepts and answers connections, and says unasked what happened to it ('event').
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from hotrestart_plugins import ChildExitAction, HotRestart, Role, TerminatePolicy
from hotrestart_plugins.errors import HotRestartError


class Puppet:
    """One `HotRestart`, its sockets, and the line to whoever holds the strings."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.received = b""
        self.hot = HotRestart()
        self.socks: dict[str, socket.socket] = {}
        self.accepting = False
        self.stands_by = False
        self.ended = False

    # -- the commands --------------------------------------------------------------------------

    def initialize(self, directory: str, number: int, options: dict[str, Any]) -> str:
        self.stands_by = options.pop("stand_by", False)
        if "terminate_policy" in options:
            options["terminate_policy"] = TerminatePolicy(options["terminate_policy"])
        self.hot = HotRestart(**{"takeover_timeout": 20.0, **options})
        return self.hot.initialize(directory, number).value

    def dup(self, address: str) -> bool:
        sock = self.hot.dup_parent_listener_sock(address)
        if sock is not None:
            self.socks[address] = sock
            self.hot.register_listener_fd(address, sock.fileno())
        return sock is not None

    def listen(self, addresses: list[str], options: dict[str, Any] | None = None) -> list[str]:
        made = self.hot.listen(addresses, **(options or {}))
        self.socks.update(zip(addresses, made, strict=True))
        return sorted(self.hot.inherited)

    def adopt(self, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        self.hot.adopt(sock)
        self.socks[self.hot.listeners[-1]] = sock

    def accept(self) -> None:
        self.accepting = True

    def ready(self) -> str:
        self.hot.ready()
        self.accepting = True
        return self.role()

    def role(self) -> str:
        return self.hot.role.value

    def ticket(self) -> int:
        """Its place in the order of starts."""
        side = self.hot._client or self.hot._server
        return side._ticket.number if side is not None else 0

    def parent_pid(self) -> int:
        return self.hot.parent_pid

    def fork(self) -> dict[str, Any]:
        """What a forked child holds of this one, and whether its end is of consequence."""
        mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in self._core_descriptors()}
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            theirs = set()
            for fd in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    theirs.add(os.readlink(f"/proc/self/fd/{fd}"))
            # The listeners themselves are the host's, and a worker needs them.
            shared = {os.readlink(f"/proc/self/fd/{s.fileno()}") for s in self.socks.values()}
            os.write(writer, json.dumps([sorted(mine & theirs - shared), self.role()]).encode())
            self.hot.close()
            os._exit(0)
        os.close(writer)
        with open(reader) as answers:
            kept, role = json.loads(answers.read())
        os.waitpid(pid, 0)
        return {"core": len(mine), "kept": kept, "role": role, "threads": threading.active_count()}

    def _core_descriptors(self) -> list[int]:
        known = {0, 1, 2, self.line.fileno(), *(s.fileno() for s in self.socks.values())}
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                os.fstat(int(name))
                if int(name) not in known:
                    found.append(int(name))
        return found

    def limit(self, files: int) -> None:
        """Open no more than so many files."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    def close(self, options: dict[str, Any] | None = None) -> None:
        self.accepting = False
        self._close_socks()
        self.hot.close(**(options or {}))

    def exit(self) -> None:
        self.close()
        self.ended = True

    def stand_down(self) -> None:
        self.hot.stand_down()

    def child(self) -> int:
        return self.hot.child.pid if self.hot.child is not None else 0

    # -- what a host does ----------------------------------------------------------------------

    def run(self) -> None:
        while not self.ended:
            wanted = {self.line.fileno(): self._command}
            # A host may hear of the child's end before it reads the child's last word.
            if self.hot.child is not None and self.hot.child.fileno() >= 0:
                wanted[self.hot.child.fileno()] = self._child_ended
            if self.hot.fileno() >= 0:
                wanted[self.hot.fileno()] = self._handle
            if self.accepting:
                wanted |= {sock.fileno(): self._accept for sock in self.socks.values()}
            poll = select.poll()
            for fd in wanted:
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd in wanted and not self.ended:
                    wanted[fd]()

    def _command(self) -> None:
        more = self.line.recv(65536)
        if not more:
            self.ended = True
        self.received += more
        while b"\n" in self.received and not self.ended:
            first, _, self.received = self.received.partition(b"\n")
            verb, *args = json.loads(first)
            try:
                self._say("result", getattr(self, verb)(*args))
            except HotRestartError as error:
                self._say("error", type(error).__name__, str(error))
            except Exception as error:  # noqa: BLE001 -- told, and the test fails by it
                traceback.print_exc()
                self._say("error", type(error).__name__, str(error))

    def _say(self, *words: object) -> None:
        self.line.sendall(json.dumps(words).encode() + b"\n")

    def _handle(self) -> None:
        was = self.hot.role
        self.hot.handle()
        self._look_at_role(was)

    def _look_at_role(self, was: Role) -> None:
        if self.hot.role is Role.REPLACED and was is not Role.REPLACED:
            self.accepting = False
            self._say("event", "replaced")
            if not self.stands_by:
                self.exit()

    def _child_ended(self) -> None:
        child, was = self.hot.child, self.hot.role
        after = self.hot.child_ended()
        if self.hot.child is child:  # what it had said came first
            self._look_at_role(was)
            return
        if after is ChildExitAction.RESUME:
            self.accepting = True
        self._say("event", "child ended", after.value, self.role())
        if after is ChildExitAction.LEAVE:
            self.exit()

    def _accept(self) -> None:
        for sock in self.socks.values():
            with contextlib.suppress(BlockingIOError):
                connection, _ = sock.accept()
                body = f"{os.getpid()}\n".encode()
                head = (
                    f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    connection.recv(65536)
                    connection.sendall(head.encode() + body)

    def _close_socks(self) -> None:
        for sock in self.socks.values():
            sock.close()
        self.socks.clear()


def main(line: socket.socket, log: Path, kind: type[Puppet] = Puppet) -> NoReturn:
    """Do what comes on `line`, and write to `log`, until the end of this process."""
    status = 1
    try:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(written, 2)
        os.dup2(2, 1)
        # Also what this process inherited from whoever started the tests: it is nobody's here.
        number = line.fileno()
        os.closerange(3, number)
        os.closerange(number + 1, 1 << 16)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stream = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115 -- open to the end
        logger = logging.getLogger("hotrestart")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(logging.StreamHandler(stream))
        kind(line).run()
        status = 0
    except BaseException:  # noqa: BLE001 -- the end of the process; the status tells
        with contextlib.suppress(OSError):
            os.write(2, traceback.format_exc().encode())
    os._exit(status)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
