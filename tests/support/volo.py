"""A Volo process, modelled in Python from its bytes and its behaviour (Volo 0.12.3).

    python -m tests.support.volo DIR LISTENER_NUM ADDRESS...

It is as strict and as trusting as the real one. As a parent it ends its loop for good at anything
that it does not know, believes the length in a request, sends every answer to the child's path,
and answers nothing at all for an address that it has not. As a child it unlinks whatever is at the
child's path, sends to the parent's path rather than to whom it connected to, and right behind its
last descriptor sends the request to go, removes the parent's path and binds its own there.

Prints INHERITED or BOUND for each address, then SERVING with its pid, TERMINATED at the end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
from typing import NoReturn

ROOM = 1024
PARENT, CHILD = "volo_hot_restart_parent.sock", "volo_hot_restart_child.sock"


def say(*words: object) -> None:
    print(*words, flush=True)


def datagram(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(path)
    return sock


def bind(address: str) -> socket.socket:
    """A listener, as its servers make one."""
    if address.startswith("/"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(address)
        sock.listen()
        return sock
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family)


class Volo:
    def __init__(self, directory: str, number: int) -> None:
        self.parent_path = os.path.join(directory, PARENT)
        self.child_path = os.path.join(directory, CHILD)
        self.number = number
        self.dups = 0
        self.fds: dict[str, int] = {}
        self.parent_sock: socket.socket | None = None
        self.child_sock: socket.socket | None = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.child_path)
        child = datagram(self.child_path)
        try:
            child.connect(self.parent_path)
            self.child_sock = child
        except OSError:
            child.close()
            self.become_parent()

    def become_parent(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.parent_path)
        self.parent_sock = datagram(self.parent_path)

    def dup(self, address: str) -> socket.socket | None:
        if self.child_sock is None:
            return None
        name = address.encode()
        self.child_sock.sendto(b"\x01" + struct.pack("=I", len(name)) + name, self.parent_path)
        data, fds, flags, _ = socket.recv_fds(self.child_sock, ROOM, 1)
        if data[0] != 2 or flags & socket.MSG_CTRUNC:
            raise SystemExit(f"ERROR Not PassFdResponse: {data!r}")
        if not fds:
            raise SystemExit("ERROR PassFdResponse without fd")
        self.dups += 1
        if self.dups == self.number:
            self.child_sock.sendto(b"\x03", self.parent_path)
            self.child_sock.close()
            self.child_sock = None
            self.become_parent()
        return socket.socket(fileno=fds[-1])

    def handle(self) -> bool:
        """One message; True if this process is told to go."""
        assert self.parent_sock is not None
        data = self.parent_sock.recv(ROOM).ljust(ROOM, b"\0")
        if data[0] == 1:
            (length,) = struct.unpack_from("=I", data, 1)
            if length > ROOM - 5:
                os.abort()  # Rust's slices panic
            fd = self.fds.get(data[5 : 5 + length].decode(errors="surrogateescape"))
            if fd is not None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))]
                self.parent_sock.sendmsg([b"\x02"], rights, 0, self.child_path)
            return False
        if data[0] == 3:
            self.parent_sock.shutdown(socket.SHUT_RDWR)
            return True
        # No message of its: its loop ends, and nobody answers there any more.
        self.parent_sock.close()
        self.parent_sock = None
        return False


def answer(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(5)
        request = b""
        while b"\r\n\r\n" not in request:
            more = connection.recv(4096)
            if not more:
                return
            request += more
        body = f"volo {os.getpid()}\n"
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall((head + body).encode())


def terminated(*_: object) -> NoReturn:
    say("TERMINATED")
    os._exit(0)


def main(directory: str, number: str, *addresses: str) -> None:
    signal.signal(signal.SIGTERM, terminated)
    volo = Volo(directory, int(number))
    listeners: list[socket.socket] = []
    for address in addresses:
        sock = volo.dup(address)
        what = "BOUND" if sock is None else "INHERITED"
        if sock is None:
            sock = bind(address)
        sock.setblocking(False)
        volo.fds[address] = sock.fileno()
        listeners.append(sock)
        say(what, address, sock.fileno())
    say("SERVING", os.getpid())
    while True:
        poll = select.poll()
        for sock in listeners:
            poll.register(sock, select.POLLIN)
        if volo.parent_sock is not None:
            poll.register(volo.parent_sock, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if volo.parent_sock is not None and volo.parent_sock.fileno() in ready and volo.handle():
            terminated()
        for sock in listeners:
            if sock.fileno() in ready:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    answer(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
