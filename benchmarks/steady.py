"""What hot restarts cost when nothing restarts, and what they cost a start.

    python benchmarks/steady.py [--servers NAME ...] [--rounds N] [--starts N] [--write]

Rate: the plain server and ours in turn, each time a fresh process under the same client. Start:
from starting the process to its first answer, in turn as well: the plain server, ours with nobody
to take over from, and ours taking over. Raw numbers first, then medians. Both also in processor
time, which other work on the machine disturbs less than it does the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    BYTECODE,
    PAGE,
    clean_up_on_sigterm,
    load_average,
    machine,
    markdown,
    processor_time,
    say,
    write_page,
)
from demo_app.deploys import (
    SERVERS,
    TOOK_OVER,
    UP,
    DeployError,
    Deploys,
    Instance,
    command,
    free_port,
)
from demo_app.load import LoadProcess, Mix

PLAIN, OURS = "plain", "ours"
FIRST, TAKEOVER = "ours, first", "ours, takes over"
MIX = Mix(keep_alive=32, one_shot=32)
PLAIN_UP = ("Uvicorn running on", "Listening at")
WARM_UP, MEASURED = 1.0, 5.0  # seconds
LOOK = 0.002  # seconds between two attempts to get a first answer
LONGEST = 60.0
MOST = 1.15  # a takeover's start to a plain one's
HERE = str(Path(__file__).resolve().parent)
ENVIRONMENT: dict[str, Any] = {
    **BYTECODE,
    "HOTRESTART_ROLLBACK_WINDOW": "0",
    "HOTRESTART_DRAIN_TIMEOUT": "10",
    "PYTHONPATH": os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")])),
}


def bare(name: str, address: str, *, plain: bool) -> list[str]:
    """The command with the app that imports nothing of ours."""
    args = command(name, address, plain=plain)
    return ["bare:app" if one == "app:app" else one for one in args]


# -- requests per second ---------------------------------------------------------------------------


class Measured(NamedTuple):
    """Of one round, or of one start."""

    clock: float
    """Answers a second; or seconds to the first answer."""
    processor: float
    """Seconds of processor time: for a thousand answers; or to the first answer."""


def rate(name: str, *, plain: bool) -> Measured:
    """Of a fresh server, once it is warm."""
    address = f"127.0.0.1:{free_port()}"
    with Deploys() as place:
        server = place.start(bare(name, address, plain=plain), **ENVIRONMENT)
        server.wait_for(*(PLAIN_UP if plain else UP))
        first_answer(server, address)  # uvicorn's supervisor says so before its workers listen
        with LoadProcess(address, MIX) as load:
            load.wait(answers=500)
            time.sleep(WARM_UP)
            before, begun = load.report().answered, time.monotonic()
            ran = processor_time(server.pid)
            time.sleep(MEASURED)
            after, over = load.report().answered, time.monotonic()
            ran = processor_time(server.pid) - ran
            report = load.stop()
        server.stop()
    if report.failures:
        raise DeployError(f"{name}: {report}")
    return Measured((after - before) / (over - begun), ran / (after - before) * 1000)


def rates(name: str, rounds: int) -> dict[str, list[Measured]]:
    """A, B, B, A, A, B, ...: so that whatever drifts hits both alike."""
    seen: dict[str, list[Measured]] = {PLAIN: [], OURS: []}
    for number in range(rounds):
        order = (PLAIN, OURS) if number % 2 == 0 else (OURS, PLAIN)
        for kind in order:
            seen[kind].append(rate(name, plain=kind == PLAIN))
        told = ", ".join(
            f"{kind} {values[-1].clock:.0f}/s, {values[-1].processor:.3f} ms of processor each"
            for kind, values in seen.items()
        )
        say(f"rate   {name:17} {number + 1}/{rounds}: {told}; {load_average()}")
    return seen


def within_noise(plain: Sequence[float], ours: Sequence[float]) -> bool:
    """Whether shuffling the two kinds differs as often as not by as much as they do.

    A permutation test of the difference of the medians, two-sided, at 5%.
    """
    difference = abs(statistics.median(plain) - statistics.median(ours))
    both, chance, times, more = [*plain, *ours], random.Random(1), 2000, 0
    for _ in range(times):
        chance.shuffle(both)
        one, other = both[: len(plain)], both[len(plain) :]
        more += abs(statistics.median(one) - statistics.median(other)) >= difference
    return more / times > 0.05


# -- from a start to the first answer --------------------------------------------------------------


def first_answer(instance: Instance, address: str) -> Measured:
    """From the start of this instance to its first answer, or that of a worker of it."""
    host, _, port = address.rpartition(":")
    while True:
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            connection = http.client.HTTPConnection(host, int(port), timeout=LONGEST)
            with contextlib.closing(connection):
                connection.request("GET", "/", headers={"Connection": "close"})
                pid = connection.getresponse().getheader("X-Served-By", "0")
            if instance.owns(int(pid)):
                seconds = time.monotonic() - instance.started
                return Measured(seconds, processor_time(instance.pid))
        if time.monotonic() - instance.started > LONGEST or not instance.running:
            raise DeployError(f"no answer of pid {instance.pid}:\n{instance.log}")
        time.sleep(LOOK)


def fresh_start(name: str, *, plain: bool) -> Measured:
    """With nobody there before."""
    address = f"127.0.0.1:{free_port()}"
    with Deploys() as place:
        server = place.start(bare(name, address, plain=plain), **ENVIRONMENT)
        server.wait_for(*PLAIN_UP)
        return first_answer(server, address)


def starts(name: str, number: int) -> dict[str, list[Measured]]:
    """Each kind of start in turn."""
    seen: dict[str, list[Measured]] = {PLAIN: [], FIRST: [], TAKEOVER: []}
    address = f"127.0.0.1:{free_port()}"
    args = bare(name, address, plain=False)
    with Deploys() as place:
        current = place.start(args, **ENVIRONMENT)
        current.wait_for(*UP)
        for plain in (True, False):
            fresh_start(name, plain=plain)  # compiles what is not compiled yet
        for done in range(number):
            seen[PLAIN].append(fresh_start(name, plain=True))
            new = place.start(args, **ENVIRONMENT)
            new.wait_for(TOOK_OVER)  # to ask before would only keep the old one busy
            seen[TAKEOVER].append(first_answer(new, address))
            current.wait()
            current = new
            seen[FIRST].append(fresh_start(name, plain=False))
            told = ", ".join(
                f"{kind} {values[-1].clock * 1000:.0f} ms ({values[-1].processor * 1000:.0f} ms)"
                for kind, values in seen.items()
            )
            say(f"start  {name:17} {done + 1}/{number}: {told}; {load_average()}")
        current.stop()
    return seen


# -- what is shown ---------------------------------------------------------------------------------


RATE_HEAD = (
    *("server", "rounds", "requests/s, plain", "range", "ours", "range", "ratio", "within noise"),
    *("processor ms per request, plain", "ours", "ratio", "within noise"),
)
START_HEAD = (
    *("server", "starts", "first answer, plain", "range, ms", "ours, first", "range, ms"),
    *("ours, takes over", "range, ms", "first : plain", "takes over : plain"),
    *("processor time, plain", "ours, first", "ours, takes over", "takes over : plain"),
)


def rate_row(name: str, seen: dict[str, list[Measured]]) -> list[str]:
    """Medians and ranges."""
    clock = [[one.clock for one in values] for values in seen.values()]
    processor = [[one.processor for one in values] for values in seen.values()]
    plain, ours = map(statistics.median, clock)
    cells = [name, f"{len(clock[0])}", f"{plain:,.0f}", spread(clock[0])]
    cells += [f"{ours:,.0f}", spread(clock[1]), f"{ours / plain:.3f}", noise(*clock)]
    plain, ours = map(statistics.median, processor)
    return [*cells, f"{plain:.3f}", f"{ours:.3f}", f"{ours / plain:.3f}", noise(*processor)]


def noise(plain: Sequence[float], ours: Sequence[float]) -> str:
    """For the table."""
    return "yes" if within_noise(plain, ours) else "no"


def start_row(name: str, seen: dict[str, list[Measured]]) -> list[str]:
    """Medians, and their ratios to the plain one's."""
    cells = [name, f"{len(seen[PLAIN])}"]
    clock = {kind: statistics.median(one.clock for one in seen[kind]) for kind in seen}
    processor = {kind: statistics.median(one.processor for one in seen[kind]) for kind in seen}
    for kind, values in seen.items():
        cells += [f"{clock[kind] * 1000:.0f} ms", spread([one.clock for one in values], 1000)]
    cells += [f"{clock[kind] / clock[PLAIN]:.2f}" for kind in (FIRST, TAKEOVER)]
    cells[-1] = f"**{cells[-1]}**"
    cells += [f"{seconds * 1000:.0f} ms" for seconds in processor.values()]
    return [*cells, f"{processor[TAKEOVER] / processor[PLAIN]:.2f}"]


def takeover_ratio(seen: dict[str, list[Measured]]) -> float:
    """Of the medians on the clock."""
    takeover, plain = (
        statistics.median(one.clock for one in seen[kind]) for kind in (TAKEOVER, PLAIN)
    )
    return takeover / plain


def spread(values: Sequence[float], unit: float = 1) -> str:
    """The smallest and the largest."""
    return f"{min(values) * unit:,.0f} - {max(values) * unit:,.0f}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = ["uvicorn", "uvicorn4", "gunicorn gthread", "gunicorn asgi"]
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=default, metavar="NAME",
        help=f"of {', '.join(SERVERS)} (default: {', '.join(default)})",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=6, metavar="N", help="of rates (default 6)")
    parser.add_argument("--starts", type=int, default=15, metavar="N", help="(default 15)")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    clean_up_on_sigterm()
    say(f"{machine()}; {load_average()}")
    parts, slow = [], []
    if options.rounds:
        rows = [rate_row(name, rates(name, options.rounds)) for name in options.servers]
        parts.append(markdown(RATE_HEAD, rows))
    if options.starts:
        begun = {name: starts(name, options.starts) for name in options.servers}
        rows = [start_row(name, seen) for name, seen in begun.items()]
        parts.append(markdown(START_HEAD, rows))
        slow = [name for name, seen in begun.items() if takeover_ratio(seen) > MOST]
    text = "\n\n".join([*parts, f"{machine()}; {load_average()} at the end."])
    say(f"\n{text}")
    if options.write:
        write_page(PAGE, "steady", text)
    if slow:
        say(f"\nA takeover's start takes more than {MOST} times a plain one's: {', '.join(slow)}")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
