"""The load in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from demo_app.loadgen.connection import Target
from demo_app.loadgen.report import Json, Mix, Report, Sizes
from demo_app.loadgen.runner import LONGEST_RUN, Load

if TYPE_CHECKING:
    from typing_extensions import Self

SCRIPT = Path(__file__).resolve().parents[1] / "load.py"
START = 30.0  # seconds to begin in
MARGIN = 10.0  # seconds to tell the outcome in, when the load has ended


class LoadError(Exception):
    """The load process did not do what it was told."""


class LoadProcess:
    """A `Load` in a process of its own, driven from code without an event loop.

        with LoadProcess("127.0.0.1:8000", Mix(keep_alive=32)) as load:
            load.wait(answers=1000)
            ...
            report = load.stop()

    Every call has a deadline. The process ends with the `with`, whatever happened, and by itself
    when this one dies. `ca_file` turns TLS on; it names the certificates to trust.
    """

    def __init__(
        self,
        target: Target | str,
        mix: Mix,
        *,
        timeout: float = 30.0,
        path: str = "/",
        pause: float = 0.0,
        record: bool = False,
        ca_file: str | os.PathLike[str] | None = None,
        sizes: Sizes | None = None,
        max_requests: int | None = None,
        max_seconds: float = LONGEST_RUN,
    ) -> None:
        options: Json = {
            **asdict(mix),
            **asdict(sizes or Sizes()),
            "timeout": timeout,
            "path": path,
            "pause": pause,
            "ca_file": ca_file,
            "requests": max_requests,
            "seconds": max_seconds,
        }
        text = target if isinstance(target, str) else target.text
        self._command = [sys.executable, "-I", str(SCRIPT), text, "--commands"]
        self._command += ["--record"] if record else []
        for name, value in options.items():
            if value is not None:
                self._command.append(f"--{name.replace('_', '-')}={value}")
        self._process: subprocess.Popen[bytes] | None = None
        self._received = bytearray()
        self._asked = 0

    @property
    def pid(self) -> int:
        return self._running().pid

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        try:
            self._answer(0, monotonic() + START)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def report(self, timeout: float = 10.0) -> Report:
        """The totals up to now, without samples."""
        return Report.from_json(self._ask("report", timeout)["report"])

    def wait(
        self,
        *,
        answers: int | None = None,
        failures: int | None = None,
        pid: int | None = None,
        pid_not_in: Iterable[int] | None = None,
        timeout: float = 30.0,
    ) -> Report:
        """Wait until all of these hold that were given; the totals then.

        answers     so many more than now
        failures    so many in all
        pid         this process has answered
        pid_not_in  one that is none of these has answered
        """
        known = None if pid_not_in is None else list(pid_not_in)
        condition = {"answers": answers, "failures": failures, "pid": pid, "pid_not_in": known}
        condition = {key: value for key, value in condition.items() if value is not None}
        try:
            answer = self._ask("wait", timeout, **condition)
        except TimeoutError:
            now = self.report()
            raise TimeoutError(f"no {condition} in {timeout:g} s, but\n{now}") from None
        report = Report.from_json(answer["report"])
        if not answer["reached"]:
            raise LoadError(f"the load ended before {condition}:\n{report}")
        return report

    def stop(self, timeout: float = 60.0) -> Report:
        """Let each client finish its request under way, and end; the final report.

        Requests that are not finished within the timeout are given up: they are abandoned.
        """
        answer = self._ask("stop", timeout + MARGIN, within=timeout)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running().wait(MARGIN)
        self.kill()
        return Report.from_json(answer["report"])

    def kill(self) -> None:
        """End the process at once, if it is still there. Safe to call again."""
        process, self._process = self._process, None
        if process:
            with process:  # closes the pipes
                process.kill()
                process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise LoadError("the load process is not running: use it inside its 'with'")
        return self._process

    def _ask(self, command: str, timeout: float, **arguments: object) -> Json:
        process = self._running()
        assert process.stdin
        self._asked += 1
        line = json.dumps({"id": self._asked, "command": command, **arguments})
        try:
            process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise self._gone() from None
        return self._answer(self._asked, monotonic() + timeout)

    def _answer(self, number: int, deadline: float) -> Json:
        """The answer to that command; late ones to those before it are passed over."""
        while True:
            answer: Json = json.loads(self._read_line(deadline))
            if answer["id"] == number:
                return answer

    def _read_line(self, deadline: float) -> bytes:
        process = self._running()
        assert process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while (end := self._received.find(b"\n")) < 0:
                if not selector.select(max(0.0, deadline - monotonic())):
                    raise TimeoutError("the load process did not answer in time")
                if not (data := os.read(process.stdout.fileno(), 1 << 20)):
                    raise self._gone()
                self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _gone(self) -> LoadError:
        try:
            status: object = self._running().wait(5.0)
        except subprocess.TimeoutExpired:
            status = "unknown"
        return LoadError(f"the load process has ended, exit status {status}: see its stderr")


class Commands:
    """The load process's own side: one JSON command a line on stdin, one answer on stdout each."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.reader = asyncio.StreamReader()
        self.ended = asyncio.Event()
        self.error: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, **limits: Any) -> None:
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self.reader), sys.stdin
        )
        self._begin(self._run(**limits))
        self._say(0)
        while line := await self.reader.readline():  # at its end, who commands us is gone
            command = json.loads(line)
            if command["command"] == "report":
                self._say(command["id"], report=self.load.report.to_json(samples=False))
            elif command["command"] == "wait":
                self._begin(self._wait(command))
            else:
                await self._stop(command)
                break
        for task in self._tasks:
            task.cancel()
        pipe.close()
        if self.error:
            raise self.error  # no report is better than a wrong one

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, **limits: Any) -> None:
        try:
            await self.load.run(**limits)
        except Exception as error:  # noqa: BLE001  serve() raises it
            self.error = error
            self.reader.feed_eof()
        finally:
            self.ended.set()

    async def _stop(self, command: Json) -> None:
        self.load.stop(command["within"])
        await self.ended.wait()
        if not self.error:
            self._say(command["id"], report=self.load.report.to_json())

    async def _wait(self, command: Json) -> None:
        condition = parse_condition(command, self.load.report)
        await self.load.until(condition)
        report = self.load.report
        self._say(command["id"], reached=condition(report), report=report.to_json(samples=False))

    def _say(self, number: int, **fields: object) -> None:
        sys.stdout.write(json.dumps({"id": number, **fields}) + "\n")
        sys.stdout.flush()


def parse_condition(command: Json, now: Report) -> Callable[[Report], bool]:
    answers = now.answered + command.get("answers", 0)
    failures = command.get("failures", 0)
    pid, known = command.get("pid"), command.get("pid_not_in")

    def condition(report: Report) -> bool:
        return (
            report.answered >= answers
            and report.failures >= failures
            and (pid is None or pid in report.by_pid)
            and (known is None or any(one not in known for one in report.by_pid))
        )

    return condition


async def take_commands(load: Load, *, max_requests: int | None, max_seconds: float) -> None:
    """Run the load as commanded on stdin; end in any case some time after the load has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a ctrl-C is for the one that commands us
    serving = Commands(load).serve(max_requests=max_requests, max_seconds=max_seconds)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(serving, 2 * LONGEST_RUN)
