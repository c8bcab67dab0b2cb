"""The new side of a handover, under any event loop."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from hotrestart_plugins.core.events import Logger
from hotrestart_plugins.errors import HotRestartError, MessageError
from hotrestart_plugins.handover import frames
from hotrestart_plugins.handover.adapter import EventLoop, Timer
from hotrestart_plugins.handover.frames import ReceivedConnection

_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_ACCEPT_RETRY_DELAY = 1.0  # seconds until a channel is accepted again, when there was no room


class ConnectionReceiver:
    """The new side, in each of its processes: takes in what comes. Owns its listener and path."""

    def __init__(
        self,
        path: Path,
        adopt: Callable[[Sequence[ReceivedConnection]], None],
        *,
        loop: EventLoop,
        logger: Logger,
    ) -> None:
        """Listens at once. `adopt` is given what comes, and owns it. Raises OSError."""
        self._path = path
        self._adopt = adopt
        self._loop = loop
        self._log = logger
        self._listener = frames.listen(path)
        self._channels: list[socket.socket] = []
        self._waiting: Timer | None = None  # until it listens again
        self._listen()

    @classmethod
    def open(
        cls,
        path: Path,
        adopt: Callable[[Sequence[ReceivedConnection]], None],
        *,
        loop: EventLoop,
        logger: Logger,
    ) -> ConnectionReceiver | None:
        """One that listens; None, with a line in the log, where that cannot be.

        The connections then stay with the old instance, and are closed after their next answer.
        """
        try:
            return cls(path, adopt, loop=loop, logger=logger)
        except OSError as error:
            logger.info("No connections are taken in at %s: %s", path, error)
            return None

    def _listen(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # it stays readable meanwhile
                self._log.warning("Connections cannot be taken in: %s", error)
                self._loop.remove_reader(self._listener.fileno())
                self._waiting = self._loop.call_later(_ACCEPT_RETRY_DELAY, self._listen)
            return
        try:
            frames.check(channel)
        except HotRestartError as error:
            self._log.warning("Dropped a channel: %s", error)
            channel.close()
            return
        channel.setblocking(False)
        self._channels.append(channel)
        self._loop.add_reader(channel.fileno(), self._readable, channel)

    def _readable(self, channel: socket.socket) -> None:
        try:
            message = frames.receive(channel)
        except BlockingIOError:
            return
        except (OSError, MessageError) as error:
            self._log.warning("Connections cannot be taken in: %s", error)
            message = None
        if message is None:
            self._drop(channel)
            return
        number, received = message
        try:
            frames.acknowledge(channel, number)
        except OSError:
            for connection in received:
                connection.sock.close()
            self._drop(channel)
            return
        self._adopt(received)

    def _drop(self, channel: socket.socket) -> None:
        self._loop.remove_reader(channel.fileno())
        self._channels.remove(channel)
        channel.close()

    def close(self) -> None:
        """Take in nothing more; remove the path."""
        for channel in list(self._channels):
            self._drop(channel)
        if self._waiting is None:
            self._loop.remove_reader(self._listener.fileno())
        else:
            self._waiting.cancel()
        self._listener.close()
        self._path.unlink(missing_ok=True)
