"""gunicorn's sync worker, which waits with select(2)."""

from __future__ import annotations

from typing import Any, Protocol

from hotrestart_plugins.gunicorn._compat.workers import GunicornWorker, Worker


class RawSyncWorker(GunicornWorker, Protocol):
    """What is used of gunicorn's own object."""

    wait_fds: list[Any]


class SyncWorker(Worker[RawSyncWorker]):
    """A sync worker, with a plain name for everything that is used of it."""

    def wait_for(self, listeners: list[Any], more: Any) -> None:
        """From now on wait for signals, for `listeners` and for `more`.

        gunicorn calls the ``accept()`` of each that is readable.
        """
        self.raw.wait_fds = [*listeners, self.signal_pipe, more]
