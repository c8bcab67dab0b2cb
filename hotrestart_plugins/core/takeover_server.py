"""The running instance's side of a takeover: the new instance that it watches."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable

from hotrestart_plugins.core.platform import poll


class Child:
    """The process that asks this one for its listeners. Owns a pidfd of it, if there is one."""

    def __init__(self, pid: int, takeover_id: int, succeeded: Callable[[], bool]) -> None:
        """`pid`: 0 for a process of another pid namespace, of which there is no pidfd.

        `takeover_id`: see `RendezvousDirectory.child_takeover_id`. `succeeded`: for a pid of 0, see
        `RendezvousDirectory.succeeded`.
        """
        self.pid = pid
        self.takeover_id = takeover_id
        self.given: set[str] = set()
        """The addresses whose listeners it was given."""
        self._pidfd = -1
        self._gone = False
        self._poll = poll()
        self._succeeded = succeeded
        try:
            self._pidfd = os.pidfd_open(pid)
            self._poll.register(self._pidfd, select.POLLIN)
        except OSError as error:  # ESRCH; or a pid of 0
            self._gone = error.errno == errno.ESRCH

    def fileno(self) -> int:
        """A descriptor that becomes readable when the process ends.

        -1 if there is none: then look at `alive` now and then.
        """
        return self._pidfd

    @property
    def alive(self) -> bool:
        """Whether the process still runs; without a pidfd, whether anybody has come after."""
        if not self._gone:
            self._gone = bool(self._poll.poll(0)) if self._pidfd >= 0 else not self._succeeded()
        return not self._gone

    def close(self) -> None:
        """Close the pidfd."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
