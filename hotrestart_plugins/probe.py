"""What a new instance asks of its own app before it declares itself ready."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import socket
from collections.abc import Callable

from hotrestart_plugins.errors import ConfigurationError, NotReady
from hotrestart_plugins.settings import Settings

_HEAD = 65536  # bytes in which the status line must end


class Probe:
    """``/path``: a GET that must be answered with 2xx or 3xx. ``module:function``: a call.

    The function takes nothing, may be async, and fails by raising or by returning False.
    """

    def __init__(self, what: str, host: str, seconds: float) -> None:
        """`host`: what the request names as its host. `seconds`: in which it must be answered.

        Raises ConfigurationError for what is neither.
        """
        module, colon, function = what.partition(":")
        if not what.startswith("/") and not (module and colon and function):
            raise ConfigurationError(f"--probe: {what!r} is neither /path nor module:function")
        self.what = what
        self._host = host
        self._seconds = seconds

    @classmethod
    def of(cls, settings: Settings, host: str) -> Probe | None:
        """The probe that the settings ask for, if any."""
        return cls(settings.probe, host, settings.ready_timeout) if settings.probe else None

    async def run(self, protocol_factory: Callable[[], asyncio.Protocol]) -> None:
        """Ask; `protocol_factory` makes the server's side of a connection. Raises NotReady."""
        try:
            await asyncio.wait_for(self._run(protocol_factory), self._seconds)
        except asyncio.TimeoutError:
            raise NotReady(
                f"the probe {self.what} was not answered within {self._seconds:g} s"
            ) from None

    async def _run(self, protocol_factory: Callable[[], asyncio.Protocol]) -> None:
        if self.what.startswith("/"):
            await self._request(protocol_factory)
        else:
            await self._call()

    async def _call(self) -> None:
        module, _, function = self.what.partition(":")
        try:
            result = getattr(importlib.import_module(module), function)()
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            raise NotReady(
                f"the probe {self.what} failed: {type(error).__name__}: {error}"
            ) from error
        if result is False:
            raise NotReady(f"the probe {self.what} said no")

    async def _request(self, protocol_factory: Callable[[], asyncio.Protocol]) -> None:
        """Over a connection that never was in a listener: that one the parent may answer."""
        theirs, ours = socket.socketpair()
        for end in (theirs, ours):
            end.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(protocol_factory, theirs)
        reader, writer = await asyncio.open_connection(sock=ours, limit=_HEAD)
        try:
            head = f"GET {self.what} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
            writer.write(f"{head}User-Agent: hotrestart-probe\r\nAccept: */*\r\n\r\n".encode())
            line = (await reader.readline()).decode("latin-1").split()
        finally:
            writer.close()
            transport.close()
        status = int(line[1]) if len(line) > 1 and line[1].isdigit() else 0
        if not 200 <= status < 400:
            raise NotReady(f"the probe {self.what} was answered with {status or 'nothing'}")
