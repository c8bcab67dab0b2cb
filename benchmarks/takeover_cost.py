"""What handing over one listener costs, against a bare loop of sendmsg and recvmsg.

    python benchmarks/takeover_cost.py [--listeners 1000] [--rounds 9]

Both sides are two processes, in turn in the same run: the bare ones send a request of the same
size, and a response of one byte with the same descriptor, and do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hotrestart_plugins import HotRestart, Role
from hotrestart_plugins.core.address import resolve

SPACE = socket.CMSG_SPACE(4)


def names(listeners: list[socket.socket]) -> list[str]:
    """The addresses as they are asked for."""
    return [f"127.0.0.1:{sock.getsockname()[1]}" for sock in listeners]


def in_another_process(work: Callable[[], None]) -> int:
    """Do this in a forked process; its pid."""
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return pid


def ended(pid: int) -> None:
    """Wait for it; it must have done its work."""
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit("the other process failed")


def bare(listeners: list[socket.socket], _directory: str) -> float:
    """Seconds that a bare loop takes for all of them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    by_request = {
        struct.pack("=BI", 1, len(name)) + name.encode(): sock.fileno()
        for name, sock in zip(names(listeners), listeners, strict=True)
    }

    def answer() -> None:
        for _ in by_request:
            data, _, _, _ = theirs.recvmsg(1024)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", by_request[data]))
            theirs.sendmsg([b"\x02"], [rights])

    pid = in_another_process(answer)
    received = []
    begun = time.perf_counter()
    for request in by_request:
        ours.sendmsg([request])
        _, ancillary, _, _ = ours.recvmsg(1024, SPACE)
        received.append(struct.unpack("=i", ancillary[0][2])[0])
    took = time.perf_counter() - begun
    ended(pid)
    for fd in received:
        os.close(fd)
    ours.close()
    theirs.close()
    return took


def takeover(listeners: list[socket.socket], directory: str) -> float:
    """Seconds that `listen` takes for all of them; what the bare loop does is a part of that."""
    addresses = [resolve(*sock.getsockname())[0] for sock in listeners]
    reader, writer = os.pipe()

    def serve() -> None:
        parent = HotRestart()
        parent.initialize(directory, len(listeners))
        for one, sock in zip(addresses, listeners, strict=True):
            parent.register_listener_fd(one.name, sock.fileno())
        parent.ready()
        os.write(writer, b"x")
        poll = select.poll()
        poll.register(parent.fileno(), select.POLLIN)
        while parent.role is Role.PARENT:
            poll.poll()
            parent.handle()
        parent.close()

    pid = in_another_process(serve)
    os.read(reader, 1)
    child = HotRestart()
    child.initialize(directory, len(listeners))
    begun = time.perf_counter()
    socks = child.listen(addresses)
    took = time.perf_counter() - begun
    if len(child.inherited) != len(addresses):
        raise SystemExit("not every listener was inherited")
    child.ready()
    ended(pid)
    for sock in socks:
        sock.close()
    child.close()
    os.close(reader)
    os.close(writer)
    return took


def main() -> None:
    """Measure, print, and fail if the takeover costs more than three times the bare loop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--listeners", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 5 * args.listeners + 100), hard))
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(args.listeners)]
    took: dict[str, list[float]] = {"bare": [], "takeover": []}
    with tempfile.TemporaryDirectory(prefix="hr-") as directory:
        for _ in range(args.rounds):
            took["bare"].append(bare(listeners, directory))
            took["takeover"].append(takeover(listeners, directory))
    each = {kind: statistics.median(values) / args.listeners for kind, values in took.items()}
    ratio = each["takeover"] / each["bare"]
    print(f"bare loop: {each['bare'] * 1e6:6.1f} us per listener")
    print(f"takeover:  {each['takeover'] * 1e6:6.1f} us per listener")
    print(f"ratio:     {ratio:6.2f} (at most 3)")
    sys.exit(ratio > 3)


if __name__ == "__main__":
    main()
