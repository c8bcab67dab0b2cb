"""The main job, to be seen: a server under load is replaced again and again; what clients saw.

    python demo_app/takeover.py [--takeovers N] [--server NAME ...]

For each server first the restart that everybody does (stop it, start it), then takeovers. Ends
with a table, and with status 1 if a takeover failed a single request.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
from demo_app.load import LoadProcess, Mix, Report

ENVIRONMENT = {"HOTRESTART_ROLLBACK_WINDOW": "1", "HOTRESTART_DRAIN_TIMEOUT": "10"}
PLAIN_UP = ("Uvicorn running on", "Listening at")
BETWEEN = 300  # answers between two restarts


@dataclass
class Round:
    """One server, restarted one way."""

    name: str
    way: str
    report: Report = field(default_factory=Report)
    first: list[float] = field(default_factory=list)
    """Seconds from the start of each new instance to its first answer."""
    took: list[float] = field(default_factory=list)
    """Seconds from that start to the takeover; none where the old one was just stopped."""
    gone: list[float] = field(default_factory=list)
    """Seconds from the takeover to the end of the old instance."""


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def serve(place: Deploys, args: list[str], version: int) -> Instance:
    """Start one instance."""
    return place.start(args, DEMO_VERSION=str(version), **ENVIRONMENT)


def restart(place: Deploys, old: Instance, args: list[str], version: int, done: Round) -> Instance:
    """Stop the old instance, start the new one."""
    begun = time.monotonic()
    old.stop()
    new = serve(place, args, version)
    new.wait_for(*PLAIN_UP)
    done.gone.append(new.started - begun)
    return new


def take_over(
    place: Deploys, old: Instance, args: list[str], version: int, done: Round
) -> Instance:
    """Start the new instance; the old one leaves by itself."""
    new = serve(place, args, version)
    took = new.wait_for(TOOK_OVER)
    status = old.wait()
    if status:
        raise DeployError(f"pid {old.pid} was replaced and ended with status {status}:\n{old.log}")
    done.took.append(took - new.started)
    done.gone.append(time.monotonic() - took)
    return new


def first_answer(load: LoadProcess, instance: Instance) -> float:
    """When a client got the first answer of this instance, or of a worker of it."""
    while True:
        seen = load.wait(answers=1)
        firsts = [tally.first for pid, tally in seen.by_pid.items() if instance.owns(pid)]
        if firsts:
            return min(firsts)


def run(name: str, way: str, times: int, mix: Mix) -> Round:
    """One server under load, restarted `times` times in one way."""
    done = Round(name, way)
    plain = way == "stop, start"
    step: Callable[..., Instance] = restart if plain else take_over
    address = f"127.0.0.1:{free_port()}"
    args = command(name, address, plain=plain)
    with Deploys() as place:
        current = serve(place, args, 1)
        current.wait_for(*(PLAIN_UP if plain else UP))
        with LoadProcess(address, mix) as load:
            load.wait(answers=BETWEEN)
            for number in range(1, times + 1):
                old, current = current, step(place, current, args, number + 1, done)
                done.first.append(first_answer(load, current) - current.started)
                seen = load.wait(answers=BETWEEN)
                say(
                    f"{name:17} {way:12} {number}/{times}: pid {old.pid} -> {current.pid}, first "
                    f"answer of the new one after {done.first[-1]:.2f} s; "
                    f"{seen.answered} answered, {seen.failures} failed"
                )
            done.report = load.stop()
        current.stop()
    return done


def table(rounds: list[Round]) -> str:
    """What clients saw, a line a round."""
    head = (
        f"{'server':17} {'restart':12} {'times':>5} {'sent':>8} {'answered':>8} {'failed':>6} "
        f"{'reconnects':>10} {'slowest':>9}   {'new answers':>11} {'took over':>9} {'old gone':>8}"
    )
    lines = [head, "-" * len(head)]
    for one in rounds:
        report = one.report
        lines.append(
            f"{one.name:17} {one.way:12} {len(one.first):>5} {report.sent:>8} "
            f"{report.answered:>8} {report.failures:>6} "
            f"{report.reconnects + report.closed_idle + report.ws_restarts:>10} "
            f"{report.slowest * 1000:>6.0f} ms   {_mean(one.first):>11} "
            f"{_mean(one.took):>9} {_mean(one.gone):>8}"
        )
        if report.failed:
            kinds = ", ".join(f"{count} {kind}" for kind, count in report.failed.items())
            lines.append(f"{'':31}of the failed: {kinds}")
    lines.append(
        "new answers: mean time from the start of the new instance to its first answer; took over: "
        "to the\ntakeover; old gone: from the takeover (or the stop) to the end of the old instance"
    )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} s" if values else "-"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--takeovers", type=int, default=4, metavar="N", help="of each server")
    parser.add_argument(
        "--server", choices=SERVERS, nargs="+", default=["uvicorn", "uvicorn4", "gunicorn gthread"]
    )
    parser.add_argument(
        "--clients", type=int, default=16, help="of each kind: one-shot, kept-alive"
    )
    parser.add_argument("--only-takeovers", action="store_true", help="not the usual restart")
    options = parser.parse_args()
    ways = ["takeover"] if options.only_takeovers else ["stop, start", "takeover"]
    mix = Mix(one_shot=options.clients, keep_alive=options.clients, slow=2, upload=2)
    rounds = [run(name, way, options.takeovers, mix) for name in options.server for way in ways]
    say("\n" + table(rounds))
    return int(any(one.report.failures for one in rounds if one.way == "takeover"))


if __name__ == "__main__":
    sys.exit(main())
