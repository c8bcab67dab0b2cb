"""The receiving side of a handover, under any event loop."""

from __future__ import annotations

import errno
import functools
import os
import socket
from collections import Counter
from collections.abc import Callable

from hotrestart_plugins.core import events
from hotrestart_plugins.core.fence import Fence
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.errors import HotRestartError, MessageError
from hotrestart_plugins.handover import frames
from hotrestart_plugins.handover.adapter import EventLoop, Timer
from hotrestart_plugins.handover.frames import HandoverTarget, ReceivedConnection

_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_ACCEPT_RETRY_DELAY = 1.0  # seconds until a channel is accepted again, when there was no room


class ConnectionReceiver:
    """Receives connections in one process. Owns its listener, the path of that, its channels."""

    def __init__(
        self,
        target: HandoverTarget,
        adopt: Callable[[ReceivedConnection], None],
        *,
        loop: EventLoop,
        journal: Journal,
    ) -> None:
        """Listen as a process of `target`, which this instance is. Raises OSError.

        `adopt` is called with each connection, and owns it unless it raises.
        """
        self._path = frames.path_of(target, os.getpid())
        self._adopt = adopt
        self._loop = loop
        self._journal = journal
        self._fence = Fence(journal, events.HANDOVER_FAULT)
        self._listener = frames.listen(self._path)
        self._channels: list[socket.socket] = []
        self._waiting: Timer | None = None  # until it listens again
        try:
            self._listen()
        except BaseException:
            self._listener.close()
            self._path.unlink(missing_ok=True)
            raise

    @classmethod
    def open(
        cls,
        target: HandoverTarget,
        adopt: Callable[[ReceivedConnection], None],
        *,
        loop: EventLoop,
        journal: Journal,
    ) -> ConnectionReceiver | None:
        """Return a receiver; None, with a line in the log, if it cannot listen.

        The connections then stay with the other instance, which closes them after one more answer.
        """
        try:
            return cls(target, adopt, loop=loop, journal=journal)
        except OSError as error:
            path = frames.path_of(target, os.getpid())
            journal.emit(events.RECEIVER_FAILED, path=path, error=error)
            return None

    def _listen(self) -> None:
        self._waiting = None
        self._loop.add_reader(self._listener.fileno(), self._on_listener_readable)

    def _on_retry(self) -> None:
        with self._fence:
            self._listen()

    def _on_listener_readable(self) -> None:
        with self._fence:
            self._accept()

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # it stays readable meanwhile
                self._journal.emit(events.ADOPTION_FAILED, error=error)
                self._loop.remove_reader(self._listener.fileno())
                self._waiting = self._loop.call_later(_ACCEPT_RETRY_DELAY, self._on_retry)
            return
        try:
            frames.check(channel)
            channel.setblocking(False)
            self._loop.add_reader(
                channel.fileno(), functools.partial(self._on_channel_readable, channel)
            )
        except HotRestartError as error:
            self._journal.emit(events.CHANNEL_DROPPED, error=error)
            channel.close()
        except BaseException:
            channel.close()
            raise
        else:
            self._channels.append(channel)

    def _on_channel_readable(self, channel: socket.socket) -> None:
        with self._fence:
            self._receive(channel)
            return
        with self._fence:
            self._drop(channel)

    def _receive(self, channel: socket.socket) -> None:
        try:
            batch = frames.receive(channel)
        except BlockingIOError:
            return
        except (OSError, MessageError) as error:
            self._journal.emit(events.ADOPTION_FAILED, error=error)
            batch = None
        if batch is None:
            self._drop(channel)
            return
        if batch.refused:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(batch.refused).items())
            self._journal.emit(events.DESCRIPTORS_REFUSED, kinds=kinds)
        try:
            frames.acknowledge(channel, batch.number)
        except OSError:
            for connection in batch.connections:
                connection.sock.close()
            self._drop(channel)
            return
        for connection in batch.connections:
            # One that cannot be adopted does not keep the others from it.
            adopted = False
            with self._fence:
                self._adopt(connection)
                adopted = True
            if not adopted:
                connection.sock.close()

    def _drop(self, channel: socket.socket) -> None:
        if channel not in self._channels:
            return
        self._channels.remove(channel)
        try:
            self._loop.remove_reader(channel.fileno())
        finally:
            channel.close()

    def close(self) -> None:
        """Receive nothing more; remove the path."""
        for channel in list(self._channels):
            self._drop(channel)
        if self._waiting is None:
            self._loop.remove_reader(self._listener.fileno())
        else:
            self._waiting.cancel()
        self._listener.close()
        self._path.unlink(missing_ok=True)
