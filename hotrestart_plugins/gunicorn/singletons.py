"""What only one instance can have: the pid file, the control socket, systemd's main process.

They pass to the new instance when it takes over, and back if it crashes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable

from hotrestart_plugins.core import credentials
from hotrestart_plugins.gunicorn._compat import arbiter, singletons
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter, Config
from hotrestart_plugins.gunicorn._compat.table import Feature, lacks

_PERMISSIONS = 0o644  # of gunicorn's own pid file
_CONTROL_ANSWER = 1.0  # seconds for the control server to notice that a client has left


class Singletons:
    """What one arbiter claims for itself when it is the instance that serves."""

    def __init__(self, server: Arbiter) -> None:
        self._server = server
        self._pidfile = singletons.MasterPidfile(server)
        self._pid_path: str | None = None
        self._suppressed: Config | None = None
        self._control_disabled = False
        self._before: bytes | None = None
        self._reloading = False

    def suppress(self) -> None:
        """Keep gunicorn from claiming anything by itself. Call it whenever the config was read."""
        cfg = self._server.cfg
        if cfg is self._suppressed:
            return
        self._suppressed = cfg
        self._pid_path = None if lacks(Feature.PID_FILE) else cfg.pidfile
        self._control_disabled = singletons.control_disabled(self._server)
        cfg.set("pidfile", None)
        singletons.disable_control(self._server, disable=True)

    def restore(self) -> None:
        """Make the config read as the user wrote it."""
        self._server.cfg.set("pidfile", self._pid_path)
        singletons.disable_control(self._server, disable=self._control_disabled)

    # -- the pid file --------------------------------------------------------------------------

    def check_pidfile(self, parent_pid: int) -> None:
        """Check the pid file as gunicorn does at its start, but let it name the old instance.

        Raises RuntimeError ('Already running on PID ...') if it names another live process. If
        there is no old instance (`parent_pid` is 0), it names this process from now on.
        """
        if self._pid_path and (not parent_pid or self._pidfile.names(self._pid_path) != parent_pid):
            self._pidfile.create(self._pid_path)

    def write_pidfile(self) -> None:
        """Make the file name this process; at each instant it names one. Raises OSError."""
        if not self._pid_path:
            return
        path = self._pid_path
        self._before = None
        with contextlib.suppress(OSError), open(path, "rb") as existing:
            self._before = existing.read()
        _replace(path, b"%d\n" % os.getpid())
        self._pidfile.adopt(path)

    def restore_pidfile(self) -> None:
        """Undo `write_pidfile`."""
        if self._pid_path and self._pidfile.remove() and self._before is not None:
            _replace(self._pid_path, self._before)

    def reload_without_pidfile(self, reload: Callable[[], None]) -> None:
        """Reload while a new instance may be writing the file: gunicorn must not touch it.

        gunicorn would unlink it and write it again, or end because it names the new instance.
        """
        held = self._pidfile.take()
        self._reloading = True
        try:
            reload()
        finally:
            self._reloading = False
            self._pidfile.give(held)
            self._server.cfg.set("pidfile", self._pid_path)

    def reconfigured(self) -> None:
        """The config of an instance that serves was read again."""
        self._pid_path = None if lacks(Feature.PID_FILE) else self._server.cfg.pidfile
        if self._reloading or lacks(Feature.PID_FILE):
            self._server.cfg.set("pidfile", None)
        if lacks(Feature.CONTROL_SOCKET):
            singletons.disable_control(self._server, disable=True)

    # -- the control socket --------------------------------------------------------------------

    def start_control(self) -> None:
        """Start gunicorn's control server, unless the user has turned it off."""
        singletons.start_control(self._server)

    def stop_control(self) -> None:
        """Stop it, and close the connections of its clients."""
        path = singletons.control_path(self._server)
        if path is None:
            return
        if _serves_at(path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        singletons.stop_control(self._server)

    # -- systemd -------------------------------------------------------------------------------

    def announce(self, status: str) -> None:
        """Tell systemd that this is the main process."""
        state = f"READY=1\nMAINPID={os.getpid()}\nSTATUS={status}"
        arbiter.notify_systemd(self._server, state)


def _serves_at(path: str) -> bool:
    """Whether the control server that has bound the path is this process's.

    Returns only when the server has closed the connection: asyncio logs tracebacks if a server
    closes while it accepts a connection.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONTROL_ANSWER)
        client.connect(path)
        if credentials.of_peer(client).pid == os.getpid():
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(TimeoutError):
                client.recv(1)
            return True
    return False


def _replace(path: str, content: bytes) -> None:
    fd, aside = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".gunicorn-pid-")
    try:
        with open(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, _PERMISSIONS)
        os.rename(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
