"""What it costs to hand kept-alive connections over: time, memory, and how both grow.

    python benchmarks/handover.py [--connections N ...] [--rounds N]
    python benchmarks/handover.py --clients N ... [--takeovers N]

On each --loop, with each --http parser.

--connections: so many idle kept-alive connections through one takeover, all asked again behind it.
Told are the time from the new instance's being ready to the last one's having moved; the
processor's time of both processes for each of them; the slowest answer that one more client got,
which kept asking meanwhile; the memory of the new process against that of one to which as many
connected afresh, asked in the same way; and a bare loop of sendmsg and recvmsg that passes as many
descriptors between two processes. Medians of the rounds, and whether the cost grows in a straight
line: the processor's time for each connection, at the most of them against the fewest.

--clients: so many closed-loop clients, each on one connection, through --takeovers in a row, over
TCP and a Unix socket (--ways), with one worker and with four (--servers).

Status 1 if a request failed, or a connection did not live on.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import socket
import statistics
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import clean_up_on_sigterm, load_average, machine
from demo_app.deploys import (
    TOOK_OVER,
    UP,
    DeployError,
    Deploys,
    Instance,
    command,
    free_port,
)
from demo_app.load import LoadProcess, Mix

REQUEST = b"GET /health HTTP/1.1\r\nHost: demo\r\n\r\n"
BATCH = 253  # SCM_MAX_FD, unix(7)
LOOPS = ["asyncio", "uvloop"]
PARSERS = ["h11", "httptools"]


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


def ask_in_turn(socks: list[socket.socket]) -> int:
    """`ask`, as they were asked when they were opened: more at once would take more memory."""
    return sum(ask(socks[start : start + 100]) for start in range(0, len(socks), 100))


def args(port: int, *more: str) -> list[str]:
    """A server that keeps idle connections for long."""
    return command("uvicorn", f"127.0.0.1:{port}", "--timeout-keep-alive", "600", *more)


class Asking(threading.Thread):
    """One client that asks again and again, on a connection of its own."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._sock = socket.create_connection(("127.0.0.1", port), 60)
        self._stop_asking = threading.Event()
        self.answers: list[tuple[float, float]] = []
        """When each was asked for, and how long it took."""

    def run(self) -> None:
        """Until `stop`."""
        while not self._stop_asking.wait(0.002):
            begun = time.monotonic()
            self._sock.sendall(b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n")
            data = b""
            while not data.endswith(b"}"):
                more = self._sock.recv(4096)
                if not more:
                    raise ConnectionError(f"an answer ended after {data!r}")
                data += more
            self.answers.append((begun, time.monotonic() - begun))

    def stop(self) -> None:
        """And wait for the last answer."""
        self._stop_asking.set()
        self.join()
        self._sock.close()


def processor(pid: int) -> float:
    """Seconds that this process has run."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def steps(place: Deploys, new: Instance) -> tuple[dict[str, float], dict[str, Any]]:
    """When each step of the takeover was done, and what the old instance says of it."""
    record = place.record_of(new.pid)
    return {step["step"]: step["time"] for step in record["steps"]}, record["old"]


@dataclass
class Move:
    """One takeover."""

    alive: int
    moved: int
    seconds: float
    spent: float
    """Seconds of processor time, of both processes."""
    slowest: float
    """Seconds, of the answers to the client that kept asking."""
    memory: tuple[int, int]
    """Bytes, of the new process and of the one with fresh connections."""


def move(number: int, more: list[str]) -> Move:
    """So many connections, and one that keeps asking, through one takeover."""
    with Deploys() as place:
        port = free_port()
        old = place.start(args(port, *more), HOTRESTART_ROLLBACK_WINDOW="3600")
        old.wait_for(*UP)
        socks = opened(port, number)
        fresh = memory(old.pid)
        asking = Asking(port)
        asking.start()
        before = processor(old.pid)
        new = place.start(args(port, *more))
        new.wait_for(TOOK_OVER)
        took = time.monotonic()
        while "drained" not in steps(place, new)[0]:
            time.sleep(0.05)
        asking.stop()
        spent = processor(old.pid) - before + processor(new.pid)
        alive = ask_in_turn(socks)
        taken = memory(new.pid)
        when, told = steps(place, new)
        for sock in socks:
            sock.close()
        return Move(
            alive=alive,
            moved=told["drain"]["handed_over"] - 1,
            seconds=when["drained"] - when["ready"],
            spent=spent,
            slowest=max(spent for at, spent in asking.answers if at > took - 0.1),
            memory=(taken, fresh),
        )


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


def run(number: int, more: list[str], rounds: int, idle: float) -> tuple[bool, float]:
    """One number of connections: whether all survived, and seconds of processor time for each.

    `idle`: the processor's time of a takeover without connections.
    """
    moves = [move(number, more) for _ in range(rounds)]
    floor = statistics.median(bare(number) for _ in range(rounds))
    seconds = statistics.median(one.seconds for one in moves)
    each = (statistics.median(one.spent for one in moves) - idle) / number
    slowest = statistics.median(one.slowest for one in moves)
    taken, fresh = (statistics.median(one.memory[side] for one in moves) for side in (0, 1))
    print(
        f"{number:>6} connections, {rounds} times: {min(one.moved for one in moves)} handed over, "
        f"{min(one.alive for one in moves)} alive behind it; {seconds:.3f} s (of "
        f"{', '.join(f'{one.seconds:.2f}' for one in moves)}), {seconds / number * 1e6:.1f} us "
        f"each, {each * 1e6:.1f} us of processor time (bare loop {floor / number * 1e6:.1f} us); "
        f"slowest answer meanwhile {slowest * 1e3:.0f} ms; memory of the new process "
        f"{taken / 2**20:.1f} MiB, with as many fresh connections {fresh / 2**20:.1f} MiB "
        f"({taken / fresh:.2f})",
        flush=True,
    )
    return all(one.alive == one.moved == number for one in moves), each


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


def busy(clients: int, takeovers: int, way: str, server: str, more: list[str]) -> bool:
    """Closed-loop clients through so many takeovers; whether each kept its one connection."""
    with Deploys() as place:
        address = (
            f"unix:{place.directory}/app.sock" if way == "unix" else f"127.0.0.1:{free_port()}"
        )
        # Four processes that import the app at once, on a busy machine, take their time.
        line = command(server, address, "--timeout-worker-healthcheck", "60", *more)
        current = place.start(line, HOTRESTART_ROLLBACK_WINDOW="0")
        current.wait_for(*UP)
        moved = 0
        with LoadProcess(address, Mix(keep_alive=clients)) as load:
            load.wait(answers=clients, timeout=120)
            for _ in range(takeovers):
                old, current = current, place.start(line, HOTRESTART_ROLLBACK_WINDOW="0")
                current.wait_for(TOOK_OVER)
                status = old.wait()
                old.close()
                if status:
                    raise DeployError(f"pid {old.pid} ended with {status}:\n{old.log}")
                moved += steps(place, current)[1]["drain"]["handed_over"]
                load.wait(answers=clients, timeout=120)
            report = load.stop()
        current.stop()
    new = sum(one.new for one in report.by_pid.values())
    good = not report.failures and not report.reconnects and not report.closed_idle
    good = good and not report.abandoned and new == clients
    print(
        f"{'ok  ' if good else 'FAIL'} {clients} clients, {takeovers} takeovers, "
        f"{way}, {server}, {' '.join(more[1::2])}: {report.sent} sent, "
        f"{report.answered} answered, {report.failures} failed {dict(report.failed)}, "
        f"{report.reconnects} reconnects, {report.closed_idle} closed idle, {new} connections "
        f"opened, {moved} moves",
        flush=True,
    )
    return good


def matrix(options: argparse.Namespace) -> bool:
    """Every way to serve that was asked for; whether no client had to connect again."""
    results: list[bool] = []
    for clients, way, server, loop, parser in itertools.product(
        options.clients, options.ways, options.servers, options.loop, options.http
    ):
        more = ["--loop", loop, "--http", parser]
        try:
            results.append(busy(clients, options.takeovers, way, server, more))
        except (DeployError, TimeoutError) as error:
            print(f"FAIL {clients} clients, {way}, {server}, {loop} {parser}: {error}")
            results.append(False)
    print(f"{len(results)} ways to serve, {results.count(False)} of them with a failure")
    return all(results)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--rounds", type=int, default=3, help="of each number (default 3)")
    parser.add_argument("--clients", type=int, nargs="+", metavar="N")
    parser.add_argument("--takeovers", type=int, default=100, metavar="N")
    parser.add_argument("--ways", choices=["tcp", "unix"], nargs="+", default=["tcp", "unix"])
    parser.add_argument(
        "--servers", choices=["uvicorn", "uvicorn4"], nargs="+", default=["uvicorn", "uvicorn4"]
    )
    parser.add_argument("--loop", choices=LOOPS, nargs="+", default=LOOPS)
    parser.add_argument("--http", choices=PARSERS, nargs="+", default=PARSERS)
    options = parser.parse_args()
    clean_up_on_sigterm()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"{machine()}; {load_average()}", flush=True)
    if options.clients:
        return int(not matrix(options))
    survived = True
    for loop, http in itertools.product(options.loop, options.http):
        more = ["--loop", loop, "--http", http]
        print(f"{loop}, {http}", flush=True)
        idle = statistics.median(move(0, more).spent for _ in range(options.rounds))
        results = [run(each, more, options.rounds, idle) for each in sorted(options.connections)]
        survived = survived and all(good for good, _ in results)
        print(
            "processor time for each connection, most against fewest of them: "
            f"{results[-1][1] / results[0][1]:.2f}",
            flush=True,
        )
    for handover in (False, True):
        print(
            f"the old process lives {lifetime(handover=handover):.2f} s after it was told to go, "
            f"all clients idle, {'with' if handover else 'without'} connection handover "
            "(rollback window 0, keep-alive 5 s)",
            flush=True,
        )
    return int(not survived)


if __name__ == "__main__":
    sys.exit(main())
