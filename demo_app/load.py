"""The load client: many clients at once, and an exact account of what became of each request.

    python demo_app/load.py 127.0.0.1:8000 --keep-alive 32 --one-shot 32 --seconds 10

It never retries. Each request that was sent is counted once, as

    answered    a whole answer with a 2xx status (a WebSocket: the echo of the message)
    failed      in exactly one way:
        refused     no connection could be made
        reset       the connection was reset before any byte of the answer
        eof         the connection was closed before any byte of the answer
        cut_short   the connection was closed or reset inside the answer
        timed_out   the answer was not complete in time, the connect included
        status      a whole answer, but not a 2xx (or 101)
        garbled     not HTTP, or not the answer to what was asked (a wrong checksum, a lost event)
        local       this client's own trouble (no descriptors, no ports): the run proves nothing
    abandoned   under way when the deadline of a stop cut it off

so that at the end sent == answered + failures + abandoned. Beside the requests it counts

    reconnects  the server had announced `Connection: close`, and the client opened a new one
    closed_idle the client came to send its next request and found the connection closed,
                unannounced; it opened a new one. Real clients see that when a keep-alive timeout
                fires. 'Found' is what the event loop knew by then: when the news comes later, the
                request has been sent and fails, as it does for a real client.
    ws_restarts a WebSocket close frame 1012 or 1001. The message that it met, if any, is taken
                back from `sent`: the server said, in the protocol's own words, to come again.

Each answer is booked to the process that its X-Served-By header names (0 if there is none). All
times are of the monotonic clock, which the processes of one machine share.

In tests: `LoadProcess` runs the load in a process of its own, `Load` in this event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import ssl
import sys
from dataclasses import fields
from pathlib import Path

if not __package__:  # run as a script: `demo_app` lies one up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo_app.loadgen.connection import Target
from demo_app.loadgen.process import LoadError, LoadProcess, take_commands
from demo_app.loadgen.report import (
    CLIENTS,
    FAILURES,
    ClientTally,
    FailureDetail,
    Mix,
    PidTally,
    Report,
    Sample,
    Samples,
    Sizes,
)
from demo_app.loadgen.runner import LONGEST_RUN, Load

__all__ = [
    "CLIENTS",
    "FAILURES",
    "LONGEST_RUN",
    "ClientTally",
    "FailureDetail",
    "Load",
    "LoadError",
    "LoadProcess",
    "Mix",
    "PidTally",
    "Report",
    "Sample",
    "Samples",
    "Sizes",
    "Target",
]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Put load on a server, and account for every request.",
        epilog="Exit status: 0 if nothing failed, 1 if something did, 2 for a wrong command line.",
    )
    parser.add_argument("target", help="HOST:PORT, [HOST]:PORT or unix:PATH")
    for kind in CLIENTS:
        option = f"--{kind.replace('_', '-')}"
        parser.add_argument(option, type=int, default=0, metavar="N", help=f"{kind} clients")
    for one in fields(Sizes):
        option, default = f"--{one.name.replace('_', '-')}", one.default
        text = f"(default {default})"
        parser.add_argument(option, type=type(default), default=default, metavar="N", help=text)
    parser.add_argument("--seconds", type=float, default=10.0, help="end after (default 10)")
    parser.add_argument("--requests", type=int, help="end after so many requests")
    parser.add_argument("--timeout", type=float, default=30.0, help="of one request (default 30)")
    parser.add_argument("--path", default="/", help="for one-shot and keep-alive clients")
    parser.add_argument("--pause", type=float, default=0.0, help="between a client's requests")
    parser.add_argument("--ca-file", help="use TLS, and trust the certificates in this file")
    parser.add_argument("--record", action="store_true", help="keep a sample of each request")
    parser.add_argument("--save", metavar="FILE", help="write the report there, as JSON")
    parser.add_argument("--commands", action="store_true", help="take commands on stdin")
    parsed = parser.parse_args(arguments)
    if not any(getattr(parsed, kind) for kind in CLIENTS):
        parser.error("there is no client: pass at least one, such as --keep-alive 8")
    try:
        Target.parse(parsed.target)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return parsed


def load_from(arguments: argparse.Namespace) -> Load:
    return Load(
        arguments.target,
        Mix(**{kind: getattr(arguments, kind) for kind in CLIENTS}),
        timeout=arguments.timeout,
        path=arguments.path,
        pause=arguments.pause,
        record=arguments.record,
        tls=ssl.create_default_context(cafile=arguments.ca_file) if arguments.ca_file else None,
        sizes=Sizes(**{one.name: getattr(arguments, one.name) for one in fields(Sizes)}),
    )


async def run_and_tell(load: Load, arguments: argparse.Namespace) -> None:
    """Run it, and tell at once when another process answers."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, load.stop, 5.0)
    telling = loop.create_task(tell_new_pids(load))
    await load.run(max_requests=arguments.requests, max_seconds=arguments.seconds)
    await telling


async def tell_new_pids(load: Load) -> None:
    known: set[int] = set()
    while not load.report.ended:
        await load.until(lambda report: len(report.by_pid) > len(known))
        for pid in load.report.by_pid.keys() - known:
            known.add(pid)
            at = load.report.by_pid[pid].first - load.report.started
            print(f"{at:.3f} s  the first answer by pid {pid}", flush=True)


def main() -> int:
    arguments = parse_arguments()
    load = load_from(arguments)
    if arguments.commands:
        limits = {"max_requests": arguments.requests, "max_seconds": arguments.seconds}
        asyncio.run(take_commands(load, **limits))
        return 0
    asyncio.run(run_and_tell(load, arguments))
    print(f"\n{load.report}")
    if arguments.save:
        Path(arguments.save).write_text(json.dumps(load.report.to_json()))
    return 1 if load.report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
