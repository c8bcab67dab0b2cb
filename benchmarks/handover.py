"""What it costs to hand kept-alive connections over: time, memory, and how both grow.

    python benchmarks/handover.py [--connections N ...]

For each number: so many idle kept-alive connections through one takeover, all asked again behind
it; the memory of the new process against that of a fresh one to which as many connected; and a
bare loop of sendmsg and recvmsg that passes as many descriptors between two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command, free_port

REQUEST = b"GET /health HTTP/1.1\r\nHost: demo\r\n\r\n"
BATCH = 253  # SCM_MAX_FD, unix(7)


def memory(pid: int) -> int:
    """Resident bytes that are this process's own."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise LookupError(pid)


def opened(port: int, number: int) -> list[socket.socket]:
    """So many connections, each idle behind one answer."""
    found = []
    for index in range(number):
        sock = socket.create_connection(("127.0.0.1", port), 60)
        found.append(sock)
        if index % 100 == 99:
            ask(found[-100:])
    ask(found[len(found) - len(found) % 100 :])
    return found


def ask(socks: list[socket.socket]) -> int:
    """One request on each; how many were answered."""
    good = 0
    for sock in socks:
        sock.sendall(REQUEST)
    for sock in socks:
        data = b""
        while not data.endswith(b"ok\n") and (more := sock.recv(4096)):
            data += more
        good += data.startswith(b"HTTP/1.1 200") and data.endswith(b"ok\n")
    return good


def args(port: int, *more: str) -> list[str]:
    """A server that keeps idle connections for long."""
    return command("uvicorn", f"127.0.0.1:{port}", "--timeout-keep-alive", "600", *more)


def leave(
    place: Deploys, port: int, old: Instance, *more: str
) -> tuple[Instance, float, dict[str, int]]:
    """Replace; the new instance, seconds from the word to go to the last connection, the tally."""
    new = place.start(args(port, *more))
    new.wait_for(TOOK_OVER)
    old.wait()
    record = json.loads((place.directory / "meet" / f"handover-{new.pid}.json").read_text())
    steps = {step["step"]: step["time"] for step in record["steps"]}
    return new, steps["drained"] - steps["stopped accepting"], record["parent"]["tally"]


def bare(number: int) -> float:
    """Seconds in which one process passes so many descriptors to another, acknowledged."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pairs = [socket.socketpair() for _ in range(min(number, 2000))]
    fds = [one.fileno() for pair in pairs for one in pair]
    pid = os.fork()
    if pid == 0:
        left = number
        while left:
            _, found, _, _ = theirs.recvmsg(16, socket.CMSG_SPACE(BATCH * 4))
            came = struct.unpack(f"{len(found[0][2]) // 4}i", found[0][2])
            theirs.send(b"ok")
            left -= len(came)
            for fd in came:
                os.close(fd)
        os._exit(0)
    begun = time.perf_counter()
    left = number
    while left:
        now = min(left, BATCH, len(fds))
        packed = struct.pack(f"{now}i", *fds[:now])
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)])
        ours.recv(16)
        left -= now
    spent = time.perf_counter() - begun
    os.waitpid(pid, 0)
    for pair in pairs:
        for one in pair:
            one.close()
    ours.close()
    theirs.close()
    return spent


def run(number: int) -> bool:
    """One number of connections; whether all survived."""
    with Deploys() as place:
        port = free_port()
        old = place.start(args(port), HOTRESTART_ROLLBACK_WINDOW="0")
        old.wait_for(*UP)
        empty = memory(old.pid)
        socks = opened(port, number)
        fresh = memory(old.pid)
        new, seconds, tally = leave(place, port, old)
        alive = ask(socks)
        taken = memory(new.pid)
        floor = bare(number)
        print(
            f"{number:>6} connections: {tally['moved']} handed over, {alive} alive behind it; "
            f"{seconds:.3f} s, {seconds / number * 1e6:.1f} us each "
            f"(bare loop {floor / number * 1e6:.1f} us); memory of the new process "
            f"{taken / 2**20:.1f} MiB, of one with as many fresh connections {fresh / 2**20:.1f} "
            f"MiB ({taken / fresh:.2f}; empty {empty / 2**20:.1f} MiB)",
            flush=True,
        )
        for sock in socks:
            sock.close()
        new.stop()
    return alive == number


def lifetime(*, handover: bool) -> float:
    """Seconds that an old process lives when all its 100 clients are idle."""
    more = [] if handover else ["--no-connection-handover"]
    with Deploys() as place:
        port = free_port()
        plain = command("uvicorn", f"127.0.0.1:{port}", *more)
        old = place.start(plain, HOTRESTART_ROLLBACK_WINDOW="0")
        old.wait_for(*UP)
        socks = opened(port, 100)
        new = place.start(plain)
        took = new.wait_for(TOOK_OVER)
        old.wait()
        spent = time.monotonic() - took
        for sock in socks:
            sock.close()
    return spent


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, nargs="+", default=[1000, 5000, 10000])
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    survived = [run(number) for number in options.connections]
    for handover in (False, True):
        print(
            f"the old process lives {lifetime(handover=handover):.2f} s after it was told to go, "
            f"all clients idle, {'with' if handover else 'without'} connection handover "
            "(rollback window 0, keep-alive 5 s)",
            flush=True,
        )
    return int(not all(survived))


if __name__ == "__main__":
    sys.exit(main())
