"""The probe: a health check that a new instance's own app must pass before it takes over."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from hotrestart_plugins.errors import ConfigurationError, NotReady
from hotrestart_plugins.settings import Settings

if TYPE_CHECKING:
    import asyncio

_HEAD = 65536  # bytes in which the status line must end


class Probe:
    """Checks the app by a request or by a call.

    ``/path`` is requested with GET, and the answer must have a status of 2xx or 3xx.
    ``module:function`` is called without arguments. It may be async, and fails if it raises or
    returns False.
    """

    def __init__(self, what: str, host: str, seconds: float) -> None:
        """`what`: see the class. `host`: the request's Host header. `seconds`: the timeout.

        Raises ConfigurationError if `what` is neither a path nor a function.
        """
        module, _, function = what.partition(":")
        is_call = all(part.isidentifier() for part in (*module.split("."), function))
        if not what.startswith("/") and not is_call:
            raise ConfigurationError(f"--probe: {what!r} is neither /path nor module:function")
        self.what = what
        self._host = host
        self._seconds = seconds

    @classmethod
    def of(cls, settings: Settings, host: str) -> Probe | None:
        """Return the probe that the settings ask for; None if they ask for none."""
        return cls(settings.probe, host, settings.ready_timeout) if settings.probe else None

    async def run(self, protocol_factory: Callable[[], asyncio.Protocol]) -> None:
        """Check the app, within the timeout. Raises NotReady if it fails.

        `protocol_factory` makes the server's side of a connection.
        """
        import asyncio  # noqa: PLC0415 (workers without a loop do not need it, and start faster)

        try:
            await asyncio.wait_for(self._run(protocol_factory), self._seconds)
        except asyncio.TimeoutError:
            raise NotReady(
                f"the probe {self.what} was not answered within {self._seconds:g} s"
            ) from None

    async def _run(self, protocol_factory: Callable[[], asyncio.Protocol]) -> None:
        if self.what.startswith("/"):
            await self._request(protocol_factory)
            return
        with self._blamed():
            result = self._function()()
            self._judge(await result if inspect.isawaitable(result) else result)

    def run_plain(self, ask: Callable[[bytes], int]) -> None:
        """Check the app without an event loop. Raises NotReady if it fails.

        `ask` has a request answered, and returns the status. There is no timeout here: the process
        that waits for this one to be ready has a deadline.
        """
        with self._blamed():
            if self.what.startswith("/"):
                self._judge_status(ask(self._asked()))
                return
            result = self._function()()
            if inspect.isawaitable(result):
                import asyncio  # noqa: PLC0415 (as above)

                result = asyncio.run(_completed(result))
            self._judge(result)

    def _function(self) -> Callable[[], object]:
        module, _, name = self.what.partition(":")
        found: Callable[[], object] = getattr(importlib.import_module(module), name)
        return found

    @contextlib.contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except NotReady:
            raise
        except Exception as error:
            raise NotReady(
                f"the probe {self.what} failed: {type(error).__name__}: {error}"
            ) from error

    def _judge(self, result: object) -> None:
        if result is False:
            raise NotReady(f"the probe {self.what} said no")

    def _judge_status(self, status: int) -> None:
        if not 200 <= status < 400:
            raise NotReady(f"the probe {self.what} was answered with {status or 'nothing'}")

    def _asked(self) -> bytes:
        head = f"GET {self.what} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
        return f"{head}User-Agent: hotrestart-probe\r\nAccept: */*\r\n\r\n".encode()

    async def _request(self, protocol_factory: Callable[[], asyncio.Protocol]) -> None:
        """Send the request over a socket pair: the old instance may answer on the listener."""
        import asyncio  # noqa: PLC0415 (as above)

        theirs, ours = socket.socketpair()
        for end in (theirs, ours):
            end.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(protocol_factory, theirs)
        reader, writer = await asyncio.open_connection(sock=ours, limit=_HEAD)
        try:
            writer.write(self._asked())
            line = (await reader.readline()).decode("latin-1").split()
        finally:
            writer.close()
            transport.close()
        self._judge_status(int(line[1]) if len(line) > 1 and line[1].isdigit() else 0)


async def _completed(awaitable: Awaitable[object]) -> object:
    return await awaitable
