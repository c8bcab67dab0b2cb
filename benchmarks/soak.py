"""The soak: hundreds of takeovers in a row, every request accounted for, nothing left behind.

    python benchmarks/soak.py [--servers NAME ...] [--takeovers N] [--requests N]

Each server is replaced again and again under kept-alive and one-shot clients, slow requests,
uploads, event streams and WebSockets. While a replaced instance drains, the next takeover begins:
up to --overlap of them are on their way out at a time. Every ten takeovers, when
nobody is leaving, a line of raw counts.

Status 0 if no request failed, none was given up, no idle connection was closed unannounced, every
replaced instance ended with 0 and left no process, and the descriptors, the threads, the memory and
the files of the meeting directory were in the end no more than in the beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    BYTECODE,
    PAGE,
    Footprint,
    clean_up_on_sigterm,
    ended,
    footprint,
    load_average,
    machine,
    markdown,
    members,
    say,
    write_page,
)
from demo_app.deploys import SERVERS, TOOK_OVER, UP, DeployError, Deploys, Instance, command
from demo_app.deploys import free_port as a_free_port
from demo_app.load import LoadError, LoadProcess, Mix, Report, Sizes

if TYPE_CHECKING:
    from typing_extensions import Self

ENVIRONMENT = {
    # Takeovers follow each other faster than anyone deploys; WebSockets last as long as the drain.
    "HOTRESTART_ROLLBACK_WINDOW": "0.5",
    "HOTRESTART_DRAIN_TIMEOUT": "3",
}
MIX = Mix(one_shot=32, keep_alive=32, slow=4, upload=4, sse=4, websocket=4)
SIZES = Sizes(
    slow_seconds=0.5, upload_kib=64, upload_pieces=4, upload_seconds=0.3, sse_events=5
)  # each shorter than the drain, by as much as a busy machine may add

PAUSE = 0.05  # seconds of a client between two requests: connections are met busy and idle alike
EVERY = 10  # takeovers: a look at what is held, when nobody is leaving; the last is as the first
SEEN = 5  # looks in the beginning and at the end that are compared
DRIFT = 0.05  # of the memory: each instance is a fresh process, what differs is noise
LOAD_AGE = 240.0  # seconds until the load process is replaced by a fresh one
MOST_FAILED_TAKEOVERS = 20
LOG_LINES = 40
GOODBYE = 10.0  # seconds for the helpers of an instance that has ended to end, too
STOPPED = (0, -15)  # uvicorn ends with the signal that stopped it, gunicorn with 0


class Traffic:
    """Load without a gap, by load processes that relieve each other; the account of them all."""

    def __init__(self, address: str, mix: Mix) -> None:
        self._address, self._mix = address, mix
        self._stack = contextlib.ExitStack()
        self._told = 0
        self._past = Report()
        self._now = Report()
        self._load = self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _begin(self) -> LoadProcess:
        self._since = time.monotonic()
        load = LoadProcess(self._address, self._mix, pause=PAUSE, sizes=SIZES)
        return self._stack.enter_context(load)

    @property
    def report(self) -> Report:
        """The account up to the last `wait`."""
        return self._past.merge(self._now)

    def wait(self, answers: int) -> None:
        """Until so many more were answered."""
        self._now = self._load.wait(answers=answers, timeout=120)
        self._tell_failures()
        if time.monotonic() - self._since > LOAD_AGE:
            relieved, self._load = self._load, self._begin()
            self._end(relieved)

    def stop(self) -> Report:
        """End it; the whole account."""
        self._end(self._load)
        return self.report

    def _end(self, load: LoadProcess) -> None:
        self._now = load.stop()
        self._tell_failures()
        # One process after the other may have had the same pid: this account is by kind only.
        self._past, self._now, self._told = self.report, Report(), 0
        self._past.by_pid.clear()

    def _tell_failures(self) -> None:
        for one in self._now.first_failures[self._told :]:
            say(f"FAILED at {one.time:.3f} (sent at {one.start:.3f}): {one}")
        self._told = len(self._now.first_failures)


@dataclass
class Soak:
    """One server's, as it goes."""

    name: str
    takeovers: int = 0
    report: Report = field(default_factory=Report)
    seconds: float = 0.0
    took: list[float] = field(default_factory=list)
    """Seconds from a start to the takeover."""
    gone: list[float] = field(default_factory=list)
    """Seconds from a takeover to the end of the old instance."""
    footprints: list[Footprint] = field(default_factory=list)
    files: list[list[str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    failed_takeovers: int = 0
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    """The logs of the instances that went last."""

    def fault(self, text: str) -> None:
        """What was not as it has to be."""
        self.faults.append(text)
        say(f"FAULT {self.name}: {text}")

    def line(self, wanted: int) -> str:
        """The raw counts."""
        one = self.report
        return (
            f"{self.name} {self.takeovers}/{wanted}, {self.seconds:.0f} s: {one.sent} sent, "
            f"{one.answered} answered, {one.failures} failed, {one.closed_idle} closed idle, "
            f"{one.reconnects} reconnects, {one.ws_restarts} WebSocket restarts; "
            f"{self.footprints[-1]}; {len(self.files[-1])} files; "
            f"took over in {statistics.median(self.took[-10:]):.2f} s, "
            f"old gone in {statistics.median(self.gone[-10:] or [0.0]):.2f} s; {load_average()}"
        )


@dataclass
class Leaving:
    """An instance that was replaced."""

    instance: Instance
    since: float
    successor: Instance
    ended: float = 0.0

    def __post_init__(self) -> None:
        fd = os.pidfd_open(self.instance.pid)  # still there, or a zombie that nobody has waited for
        self._watch = threading.Thread(target=self._watch_end, args=[fd], daemon=True)
        self._watch.start()

    def _watch_end(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
        self.ended = time.monotonic()
        os.close(fd)

    def seconds(self) -> float:
        """How long it took to leave; it has ended."""
        self._watch.join()
        return self.ended - self.since


def start(place: Deploys, args: list[str], version: int) -> Instance:
    """An instance that the caller closes: `Deploys` would keep hundreds of them."""
    meet = {"HOTRESTART_DIR": str(place.directory / "meet")}
    return Instance(args, {**meet, **BYTECODE, **ENVIRONMENT, "DEMO_VERSION": str(version)})


def mix_for(name: str) -> Mix:
    """The WSGI twin of the app has no WebSocket, and sync workers serve one client at a time."""
    args = SERVERS[name]
    websocket = 0 if "wsgi:app" in args else MIX.websocket
    if "sync" in args:
        return Mix(one_shot=MIX.one_shot, keep_alive=MIX.keep_alive, slow=1, upload=1)
    return Mix(MIX.one_shot, MIX.keep_alive, MIX.slow, MIX.upload, MIX.sse, websocket)


def meeting_files(place: Deploys) -> list[str]:
    """The names in the meeting directory; a number in one may be any number."""
    numbers = re.compile(r"(?<=^to-(?:new|old)\.)[0-9a-f]+|\d+")
    return sorted(numbers.sub("N", one) for one in os.listdir(place.directory / "meet"))


def words(instance: Instance, what: str) -> str:
    """The last lines of its log."""
    lines = [f"pid {instance.pid}, {what}", *instance.log.splitlines()[-LOG_LINES:]]
    return "\n    | ".join(lines)


def tell(soak: Soak, leaving: Sequence[Leaving], current: Instance) -> None:
    """The logs of everyone who may have had to do with a failure."""
    texts = [words(one.instance, f"replaced at {one.since:.3f}") for one in leaving]
    for text in (*soak.last_words, *texts, words(current, f"started at {current.started:.3f}")):
        say(text)


def see_off(one: Leaving, soak: Soak) -> None:
    """Wait for the end of a replaced instance; it must be a clean one."""
    old = one.instance
    try:
        status = old.wait()
        soak.gone.append(one.seconds())
        if status:
            soak.fault(f"pid {old.pid} was replaced and ended with status {status}")
    except DeployError:
        status = -1
        soak.fault(f"pid {old.pid} was replaced and does not end")
    left = ended(members(old.pid), GOODBYE)
    if left:
        soak.fault(f"pid {old.pid} has ended and left {left}")
    soak.last_words.append(words(old, f"replaced at {one.since:.3f}, status {status}"))
    if status or left:
        tell(soak, [], one.successor)
    old.close()


def take_over(place: Deploys, args: list[str], current: Instance, soak: Soak) -> Instance | None:
    """Start a new instance; None if it did not take over."""
    new = start(place, args, soak.takeovers + 1)
    try:
        soak.took.append(new.wait_for(TOOK_OVER) - new.started)
    except DeployError as error:
        soak.failed_takeovers += 1
        lines = str(error).splitlines()  # what was awaited, and the log
        soak.fault(f"takeover {soak.takeovers} failed: {lines[0]} {lines[-1]}")
        soak.last_words.append(words(new, f"started at {new.started:.3f}, failed"))
        tell(soak, [], current)
        new.close()
        return None
    return new


def run(name: str, wanted: int, requests: int, options: argparse.Namespace) -> Soak:
    """One server, replaced `wanted` times, under `requests` requests at least."""
    soak = Soak(name)
    address = f"127.0.0.1:{a_free_port()}"
    args = command(name, address)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(Deploys())
        current = start(place, args, 0)
        failures = 0
        leaving: list[Leaving] = []

        def close_all() -> None:
            for one in (current, *(other.instance for other in leaving)):
                one.close()

        stack.callback(close_all)
        current.wait_for(*UP)
        traffic = stack.enter_context(Traffic(address, mix_for(name)))
        while soak.takeovers < wanted:
            share = max(200, (requests - traffic.report.answered) // (wanted - soak.takeovers))
            traffic.wait(share)
            if traffic.report.failures > failures:
                tell(soak, leaving, current)
            failures = traffic.report.failures
            if len(leaving) > options.overlap:
                see_off(leaving.pop(0), soak)
            soak.takeovers += 1
            new = take_over(place, args, current, soak)
            if new is None:
                if soak.failed_takeovers >= MOST_FAILED_TAKEOVERS or not current.running:
                    break
                continue
            leaving.append(Leaving(current, time.monotonic(), new))
            current = new
            traffic.wait(100)
            if soak.takeovers % EVERY == 0 or soak.takeovers == wanted:
                while leaving:  # while an old instance drains, the new one holds its links to it
                    see_off(leaving.pop(0), soak)
                traffic.wait(100)
                soak.report, soak.seconds = traffic.report, time.monotonic() - begun
                soak.footprints.append(footprint(current.pid))
                soak.files.append(meeting_files(place))
                say(soak.line(wanted))
            if options.stop and (soak.report.failures or soak.faults):
                break
        for one in leaving:
            see_off(one, soak)
        leaving.clear()
        if not options.stop and requests > traffic.report.answered:
            traffic.wait(requests - traffic.report.answered)
        soak.report = traffic.stop()
        soak.seconds = time.monotonic() - begun
        end(current, place, soak)
    judge(soak)
    return soak


def end(current: Instance, place: Deploys, soak: Soak) -> None:
    """Stop the last instance: nothing of it may be left."""
    status = current.stop()
    if status not in STOPPED:
        soak.fault(f"the last instance was stopped and ended with status {status}")
    if left := ended(members(current.pid), GOODBYE):
        soak.fault(f"the last instance was stopped and left {left}")
    sockets = [one for one in meeting_files(place) if one.endswith(".sock")]
    if sockets:
        soak.fault(f"the last instance was stopped and left {sockets}")
    if status not in STOPPED or left or sockets:
        say(words(current, "the last one"))


def judge(soak: Soak) -> None:
    """Hold the account and the footprints to what the module promises."""
    report = soak.report
    if report.failures:
        soak.fault(", ".join(f"{count} {kind}" for kind, count in report.failed.items()))
    if report.closed_idle:
        soak.fault(f"{report.closed_idle} idle connections were closed unannounced")
    if report.abandoned:
        soak.fault(f"{report.abandoned} requests were given up at the end")
    if report.sent != report.answered + report.failures + report.abandoned:
        soak.fault(f"the account does not add up: {report}")
    if len(soak.footprints) < 2:
        soak.fault(f"too few takeovers to compare: pass more than {EVERY}")
        return
    first, last = soak.footprints[:SEEN], soak.footprints[-SEEN:]
    # What comes and goes, a thread of a pool, a selector of a request, is no fault: what stays is.
    for kind in {kind for one in soak.footprints for kind in one.descriptors}:
        most, least = (
            max(one.descriptors[kind] for one in first),
            min(one.descriptors[kind] for one in last),
        )
        if least > most:
            soak.fault(f"{kind}: {least} or more at the end, {most} at most in the beginning")
    if min(one.threads for one in last) > max(one.threads for one in first):
        soak.fault(f"threads: {first[0]} in the beginning, {last[-1]} at the end")
    if first[0].processes != last[-1].processes:
        soak.fault(f"processes: {first[0]} in the beginning, {last[-1]} at the end")
    before, after = memory(first), memory(last)
    if after > before * (1 + DRIFT):
        soak.fault(f"memory: {before:.1f} MiB in the beginning, {after:.1f} in the end")
    if soak.files[0] != soak.files[-1]:
        soak.fault(f"files: {soak.files[0]} at {EVERY}, {soak.files[-1]} at the end")


def memory(footprints: list[Footprint]) -> float:
    """The median, in MiB: one process differs from the next."""
    return statistics.median(one.mebibytes for one in footprints)


HEAD = (
    *("server", "takeovers", "time", "sent", "answered", "failed", "closed idle", "given up"),
    *("reconnects", "WebSocket restarts", "took over", "old gone"),
    *("descriptors", "threads", "memory, MiB", "files"),
)


def table(soaks: list[Soak]) -> str:
    """All raw counts."""
    rows = []
    for one in soaks:
        report, seen = one.report, one.footprints
        ends = (seen[0], seen[-1]) if seen else ()
        rows.append(
            (
                *(one.name, f"{len(one.took)}", f"{one.seconds:.0f} s", f"{report.sent:,}"),
                *(f"{report.answered:,}", f"**{report.failures}**", f"{report.closed_idle}"),
                *(f"{report.abandoned}", f"{report.reconnects:,}", f"{report.ws_restarts:,}"),
                *(_median(one.took), _median(one.gone)),
                " → ".join(str(end.descriptors.total()) for end in ends),
                " → ".join(str(end.threads) for end in ends),
                f"{memory(seen[:SEEN]):.1f} → {memory(seen[-SEEN:]):.1f}" if seen else "",
                f"{len(one.files[0])} → {len(one.files[-1])}" if seen else "",
            )
        )
    return markdown(HEAD, rows)


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s" if values else "-"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=["uvicorn", "uvicorn4"], metavar="NAME",
        help=f"of {', '.join(SERVERS)} (default: uvicorn uvicorn4)",
    )  # fmt: skip
    parser.add_argument(
        "--takeovers", type=int, default=500, metavar="N", help="of each server (default 500)"
    )
    parser.add_argument(
        "--requests", type=int, default=1_000_000, metavar="N", help="in all, at least (default 1M)"
    )
    parser.add_argument(
        "--overlap", type=int, default=1, metavar="N",
        help="replaced instances that may still drain when a takeover begins (default 1)",
    )  # fmt: skip
    parser.add_argument("--stop", action="store_true", help="end a server's soak at a failure")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    clean_up_on_sigterm()
    say(f"{machine()}; {load_average()}")
    soaks = []
    for name in options.servers:
        try:
            soaks.append(
                run(name, options.takeovers, options.requests // len(options.servers), options)
            )
        except (DeployError, LoadError, TimeoutError) as error:
            soaks.append(Soak(name, faults=[f"the soak ended before its end: {error}"]))
            say(f"FAULT {name}: {error}")
    counts = table(soaks)
    say(f"\n{counts}\n\n{machine()}")
    if options.write:
        for family in ("uvicorn", "gunicorn"):
            theirs = [one for one in soaks if one.name.startswith(family)]
            if theirs:
                text = f"{table(theirs)}\n\nMeasured with {machine()}."
                write_page(PAGE, f"soak of {family}", text)
    for one in soaks:
        for text in one.faults:
            say(f"FAULT {one.name}: {text}")
    faults = sum(len(one.faults) for one in soaks)
    say(f"{sum(one.report.answered for one in soaks)} answered, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
