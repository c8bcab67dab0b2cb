"""Restarts compared: ours, what the servers bring themselves, and nginx; one client, in one run.

    python benchmarks/restarts.py [--servers TEXT ...] [--restarts N] [--write] [--save FILE]

Each server runs under 32 kept-alive and 32 one-shot clients, each a closed loop without a pause,
and is restarted three times in its own way. Steady state: the seconds before a restart. Restart:
from the order to five seconds later, or to one second after the last old process has gone.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGHUP
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    BYTECODE,
    PAGE,
    ROOT,
    clean_up_on_sigterm,
    ended,
    load_average,
    machine,
    markdown,
    members,
    say,
    write_page,
)
from benchmarks.picture import AFTER, BEFORE, NEW, OLD, Strip, draw, save
from demo_app.deploys import TOOK_OVER, DeployError, Deploys, Instance, command, free_port
from demo_app.load import LoadError, LoadProcess, Mix, Sample

PICTURE = ROOT / "docs" / "restarts.svg"
MIX = Mix(keep_alive=32, one_shot=32)
SUBTITLE = (
    "32 kept-alive and 32 one-shot clients, each asking again as soon as it has its answer; "
    "the median restart of each"
)
WARM_UP = 2.0  # seconds
STEADY = 4.0
RESTART = 5.0
AFTERWARDS = 1.0
LONGEST = 60.0  # that a restart may take
TIMEOUT = 15.0  # of a request

ENVIRONMENT: dict[str, Any] = {
    **BYTECODE,
    "HOTRESTART_ROLLBACK_WINDOW": "1",
    "HOTRESTART_DRAIN_TIMEOUT": "20",
}


@dataclass(frozen=True)
class Contestant:
    """A server and its way of being restarted."""

    name: str
    way: str
    """For people."""
    start: Callable[[str, Path, int], list[str]]
    """From address, own directory and version to the command line; writes config files."""
    ready: str
    """In its log, so many times:"""
    count: int = 1
    program: str = ""
    """Without this one it cannot run."""


@dataclass
class Window:
    """One restart: when it was ordered, when it was over, and whose pids were old."""

    ordered: float
    over: float
    old: frozenset[int]


@dataclass
class Outcome:
    """What clients saw of one contestant."""

    contestant: Contestant
    windows: list[Window] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    reconnects: int = 0
    note: str = ""

    def failures(self, window: Window | None = None) -> Counter[str]:
        """By kind; those of one restart, or all."""
        return Counter(
            one.failure
            for one in self.samples
            if one.failure and (window is None or _within(one, window))
        )

    def steady(self) -> list[float]:
        """Seconds that answers took before the restarts."""
        return [
            one.end - one.start
            for window in self.windows
            for one in self.samples
            if not one.failure and one.start >= window.ordered - STEADY and one.end < window.ordered
        ]

    def during(self) -> list[float]:
        """Seconds that answers took in the restarts."""
        return [
            one.end - one.start
            for window in self.windows
            for one in self.samples
            if not one.failure and _within(one, window)
        ]

    def first_new(self) -> list[float]:
        """Seconds from each order to the first answer of the new code."""
        return [
            min(
                (
                    one.end - window.ordered
                    for one in self.samples
                    if not one.failure and _within(one, window) and one.pid not in window.old
                ),
                default=float("nan"),
            )
            for window in self.windows
        ]

    def last_old(self) -> list[float]:
        """Seconds from each order to the last answer of the old code."""
        return [
            max(
                (
                    one.end - window.ordered
                    for one in self.samples
                    if not one.failure and _within(one, window) and one.pid in window.old
                ),
                default=0.0,
            )
            for window in self.windows
        ]

    def strip(self) -> Strip:
        """The restart with the median of failures, for the picture."""
        ranked = sorted(self.windows, key=lambda one: self.failures(one).total())
        window = ranked[len(ranked) // 2]
        strip = Strip(
            *(self.contestant.name, self.contestant.way),
            failed=self.failures(window).total(),
            failed_in_all=self.failures().total(),
            restarts=len(self.windows),
        )
        for one in self.samples:
            at = one.end - window.ordered
            if -BEFORE <= at < AFTER:
                if one.failure:
                    strip.failures.append(round(at, 3))
                else:
                    who = OLD if one.pid in window.old else NEW
                    strip.answers.append((round(at, 3), round(one.end - one.start, 4), who))
        return strip


def _within(one: Sample, window: Window) -> bool:
    return one.end >= window.ordered and one.start < window.over


# -- the contestants -------------------------------------------------------------------------------


def script(name: str) -> list[str]:
    """A command of this Python's environment."""
    return [sys.executable, str(Path(sysconfig.get_path("scripts")) / name)]


def demo(name: str, *more: str, plain: bool = False) -> Callable[[str, Path, int], list[str]]:
    """One of the demo's commands."""
    return lambda address, _place, _version: command(name, address, *more, plain=plain)


def granian(address: str, _place: Path, _version: int) -> list[str]:
    """Its defaults, but for two workers."""
    host, _, port = address.rpartition(":")
    options = ["--interface", "asgi", "--host", host, "--port", port, "--workers", "2"]
    return [*script("granian"), *options, "app:app"]


NGINX = """
daemon off; worker_processes 2; pid {place}/nginx.pid; error_log stderr notice;
events {{ worker_connections 512; }}
http {{
    access_log off; default_type application/json; keepalive_requests 1000000000;
    client_body_temp_path {place}/t1; proxy_temp_path {place}/t2; fastcgi_temp_path {place}/t3;
    uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5;
    server {{
        listen {address};
        location / {{ add_header X-Served-By $pid; return 200 '{{"version": "{version}"}}'; }}
    }}
}}
"""


def nginx(address: str, place: Path, version: int) -> list[str]:
    """No app: its own answer, in a config file that a reload reads again."""
    config = place / "nginx.conf"
    config.write_text(NGINX.format(place=place, address=address, version=version))
    return ["nginx", "-p", str(place), "-e", "stderr", "-c", str(config)]


AGAIN, HUP, STOP = "started again, takes over", "SIGHUP", "stopped, then started"
UVICORN = "Uvicorn running on"
BOOTED = "Application startup complete"
READY = "Hot restart: ready"

PATIENT = ("--timeout-worker-healthcheck", "30")  # else it gives a restart up on a busy machine

CONTESTANTS = (
    Contestant("hotrestart-uvicorn", AGAIN, demo("uvicorn"), UVICORN),
    Contestant("hotrestart-uvicorn, 4 workers", AGAIN, demo("uvicorn4"), UVICORN),
    Contestant("gunicorn gthread, our config", AGAIN, demo("gunicorn gthread"), READY),
    Contestant("gunicorn asgi, our config", AGAIN, demo("gunicorn asgi"), READY),
    Contestant("uvicorn, 4 workers", HUP, demo("uvicorn4", *PATIENT, plain=True), BOOTED, 4),
    Contestant("uvicorn", STOP, demo("uvicorn", plain=True), UVICORN),
    Contestant("gunicorn gthread", HUP, demo("gunicorn gthread", plain=True), "Booting", 2),
    Contestant("gunicorn asgi", HUP, demo("gunicorn asgi", plain=True), "Booting", 2),
    Contestant("gunicorn, uvicorn's worker", HUP, demo("gunicorn uvicorn", plain=True), BOOTED, 2),
    Contestant("granian, 2 workers", HUP, granian, "Started worker", 2, "granian"),
    Contestant("nginx, 2 workers, no app", HUP, nginx, "start worker process ", 2, "nginx"),
)


# -- a run -----------------------------------------------------------------------------------------


def installed(program: str) -> bool:
    """Whether a contestant can run."""
    return bool(shutil.which(program) or Path(script(program)[1]).exists())


def run(contestant: Contestant, restarts: int) -> Outcome:
    """Start it, load it, restart it."""
    outcome = Outcome(contestant)
    if contestant.program and not installed(contestant.program):
        outcome.note = "not installed"
        return outcome
    address = f"127.0.0.1:{free_port()}"
    with Deploys() as place:
        current = start(place, contestant, address, 1)
        current.wait_for(contestant.ready, count=contestant.count)
        with LoadProcess(address, MIX, record=True, timeout=TIMEOUT) as load:
            load.wait(answers=1)
            time.sleep(WARM_UP)
            before = load.report()
            for number in range(restarts):
                time.sleep(STEADY)
                old = frozenset(members(current.pid))
                ordered = time.monotonic()
                current = restart(place, contestant, address, current, number + 2)
                now = time.monotonic()
                over = max(ordered + RESTART, now + AFTERWARDS)
                time.sleep(max(over, ordered + AFTER) - now)  # the picture shows so much
                outcome.windows.append(Window(ordered, over, old))
                seen = load.report()
                say(
                    f"{contestant.name:30} {contestant.way:26} {number + 1}/{restarts}: "
                    f"{seen.answered} answered, {seen.failures} failed; {load_average()}"
                )
            after = load.report()
            report = load.stop()
        current.stop()
    outcome.reconnects = after.reconnects + after.closed_idle
    outcome.reconnects -= before.reconnects + before.closed_idle
    outcome.samples = list(report.samples or [])
    if report.failures != outcome.failures().total():
        raise LoadError(f"{report.failures} failures, but {outcome.failures()} in the samples")
    return outcome


def start(place: Deploys, contestant: Contestant, address: str, version: int) -> Instance:
    """One instance."""
    args = contestant.start(address, place.directory, version)
    return place.start(args, DEMO_VERSION=str(version), **ENVIRONMENT)


def restart(
    place: Deploys, contestant: Contestant, address: str, current: Instance, version: int
) -> Instance:
    """Restart it in its way, and return when nothing of the old code runs; who serves then."""
    if contestant.way == HUP:
        contestant.start(address, place.directory, version)  # writes its config, if it has one
        old = [pid for pid in members(current.pid) if pid != current.pid and serves(pid)]
        current.signal(SIGHUP)
        if left := ended(old, LONGEST):
            raise DeployError(f"{left} serve on after SIGHUP to {current.pid}:\n{current.log}")
        return current
    if contestant.way == STOP:
        current.stop()
        new = start(place, contestant, address, version)
        new.wait_for(contestant.ready, count=contestant.count)
        return new
    new = start(place, contestant, address, version)
    new.wait_for(TOOK_OVER)
    current.wait()
    return new


def serves(pid: int) -> bool:
    """Whether it is a worker: multiprocessing's helper and gunicorn's control server are not."""
    line = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"resource_tracker" not in line


# -- what is shown ---------------------------------------------------------------------------------

HEAD = (
    *("server", "restart", "failed", "reconnects"),
    *("before: p50", "p99", "max", "restart: p50", "p99", "max"),
    *("first new answer", "last old answer", "requests/s"),
)


def row(one: Outcome) -> list[str]:
    """What the table says of it."""
    who = [one.contestant.name, one.contestant.way]
    if not one.windows:
        return [*who, one.note or "no restart", *[""] * (len(HEAD) - 3)]
    kinds = one.failures()
    failed = f"**{kinds.total():,}**"
    if kinds:
        failed += f" ({', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())})"
    steady, during = one.steady(), one.during()
    rate = len(steady) / (STEADY * len(one.windows))
    return [
        *(*who, failed, f"{one.reconnects:,}", *latencies(steady), *latencies(during)),
        *(
            f"{statistics.median(one.first_new()):.2f} s",
            f"{statistics.median(one.last_old()):.2f} s",
        ),
        f"{rate:,.0f}",
    ]


def latencies(values: Sequence[float]) -> list[str]:
    """p50, p99 and the longest."""
    if not values:
        return ["-"] * 3
    ranked = sorted(values)
    at = [ranked[int(len(ranked) * share)] for share in (0.5, 0.99)]
    return [_milliseconds(one) for one in (*at, ranked[-1])]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", nargs="+", metavar="TEXT", help="those with it in the name")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="of each (default 3)")
    parser.add_argument(
        "--write", action="store_true", help=f"into docs/{PAGE.name} and docs/{PICTURE.name}"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="what the picture is drawn from")
    options = parser.parse_args()
    clean_up_on_sigterm()
    say(f"{machine()}; {load_average()}")
    outcomes = []
    for one in CONTESTANTS:
        if options.servers and not any(text in one.name for text in options.servers):
            continue
        try:
            outcomes.append(run(one, options.restarts))
        except (DeployError, LoadError, TimeoutError) as error:
            say(f"{one.name}, {one.way}: {error}")
            outcomes.append(Outcome(one, note="did not run through"))
    results = markdown(HEAD, [row(one) for one in outcomes])
    context = f"{options.restarts} restarts of each. {machine()}; {load_average()} at the end."
    say(f"\n{results}\n\n{context}")
    strips = [one.strip() for one in outcomes if one.windows]
    if options.save:
        save(strips, SUBTITLE, options.save)
    if options.write:
        write_page(PAGE, "restarts", f"{results}\n\n{context}")
        PICTURE.write_text(draw(strips, SUBTITLE))
        say(f"drawn: {PICTURE.name}")
    ours = [one for one in outcomes if one.contestant.way == AGAIN]
    return int(any(one.failures() or not one.windows for one in ours))


if __name__ == "__main__":
    sys.exit(main())
