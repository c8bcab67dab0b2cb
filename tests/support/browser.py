"""A real browser, told what to do over its own debugging pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

DEADLINE = 60.0
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def program() -> str | None:
    """Where a browser is that can be run without a screen."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in a browser. Every wait has a deadline. Owns the process and both pipes."""

    def __init__(self, name: str, profile: Path) -> None:
        # The browser reads commands from descriptor 3 and writes answers to 4.
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
        ]
        script = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
        try:
            self._process = subprocess.Popen(
                ["bash", "-c", script, "bash", name, *flags],
                pass_fds=high,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            for fd in (theirs_in, theirs_out, *high):
                os.close(fd)
        self._received = b""
        self._asked = 0
        self._session: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # It ends with its pipe, and its helpers with it; they write to the profile until then.
        os.close(self._out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DEADLINE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        os.close(self._in)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        found = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        self._ask("Page.enable")
        self._ask("Page.navigate", url=url)
        self._wait_for(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression of the page's, or what its promise comes to."""
        found = self._ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def _ask(self, method: str, **params: object) -> Any:
        self._asked += 1
        number = self._asked
        message: dict[str, object] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._wait_for(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _wait_for(self, wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        while True:
            while b"\0" in self._received:
                line, _, self._received = self._received.partition(b"\0")
                message: dict[str, Any] = json.loads(line)
                if wanted(message):
                    return message
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"the browser has not answered in {DEADLINE:g} s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise ConnectionError("the browser has ended")
            self._received += data
