"""What only one instance can have: the pid file, the control socket, systemd's main pid.

They pass to the new instance at the handover, and back if it dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

from gunicorn import systemd
from gunicorn.pidfile import Pidfile

from hotrestart_plugins.core import credentials

_PERMISSIONS = 0o644  # of gunicorn's own pid file
_CONTROL_START = 2.0  # seconds that gunicorn gives its control server to start
_CONTROL_ANSWER = 1.0  # seconds until it has seen that a client has left


class Singletons:
    """One arbiter's claim to be the instance."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._pid_path: str | None = None
        self._suppressed: Any = None  # the config object whose values are held back
        self._control_disabled = False
        self._before: bytes | None = None
        self._reloading = False

    def suppress(self) -> None:
        """Keep gunicorn from claiming anything by itself: after each reading of the config."""
        cfg = self._server.cfg
        if cfg is self._suppressed:
            return
        self._suppressed = cfg
        self._pid_path = cfg.pidfile
        self._control_disabled = cfg.control_socket_disable
        cfg.set("pidfile", None)
        cfg.set("control_socket_disable", True)

    def restore(self) -> None:
        """The config reads as the user wrote it, again."""
        self._server.cfg.set("pidfile", self._pid_path)
        self._server.cfg.set("control_socket_disable", self._control_disabled)

    # -- the pid file --------------------------------------------------------------------------

    def check_pidfile(self, parent_pid: int) -> None:
        """As gunicorn does at its start, but the instance taken over from may be named.

        Raises RuntimeError ('Already running on PID ...') if another live process is. Without a
        parent the file names this process from now on, as with gunicorn alone.
        """
        if not self._pid_path:
            return
        found = Pidfile(self._pid_path)
        if not parent_pid or found.validate() != parent_pid:
            found.create(os.getpid())
            self._server.pidfile = found

    def write_pidfile(self) -> None:
        """The file names this process from now on, at no instant nobody. Raises OSError."""
        if not self._pid_path:
            return
        path = self._pid_path
        self._before = None
        with contextlib.suppress(OSError), open(path, "rb") as existing:
            self._before = existing.read()
        _replace(path, b"%d\n" % os.getpid())
        self._server.pidfile = Pidfile(path)
        self._server.pidfile.pid = os.getpid()

    def restore_pidfile(self) -> None:
        """Undo `write_pidfile`."""
        if self._pid_path and self._server.pidfile is not None:
            self._server.pidfile.unlink()
            self._server.pidfile = None
            if self._before is not None:
                _replace(self._pid_path, self._before)

    def reload_without_pidfile(self, reload: Callable[[], None]) -> None:
        """HUP while another instance may be writing the file: it is none of gunicorn's affair.

        gunicorn would unlink it, write it anew, and end if it already names the other one.
        """
        held, self._server.pidfile = self._server.pidfile, None
        self._reloading = True
        try:
            reload()
        finally:
            self._reloading = False
            self._server.pidfile = held
            self._server.cfg.set("pidfile", self._pid_path)

    def reconfigured(self) -> None:
        """The config has been read again by an instance that serves."""
        self._pid_path = self._server.cfg.pidfile
        if self._reloading:
            self._server.cfg.set("pidfile", None)

    # -- the control socket --------------------------------------------------------------------

    def start_control(self) -> None:
        """Start gunicorn's control server, if the user has not turned it off."""
        if self._server._control_server is None:  # noqa: SLF001
            self._server._start_control_server()  # noqa: SLF001

    def stop_control(self) -> None:
        """Stop it, and end what its clients have open.

        gunicorn would wait two seconds for them, and again when they leave remove the path, which
        is another instance's by then.
        """
        control = self._server._control_server  # noqa: SLF001
        if control is None:
            return
        control._ready.wait(_CONTROL_START)  # noqa: SLF001  # it binds in a thread
        path = os.path.abspath(control.socket_path)
        if _is_ours(path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        control.socket_path += f".{os.getpid()}"  # a path that is not there
        control._shutdown = _end_every_task  # noqa: SLF001
        self._server._stop_control_server()  # noqa: SLF001

    # -- systemd -------------------------------------------------------------------------------

    def announce(self, status: str) -> None:
        """Tell systemd which process is the main one."""
        state = f"READY=1\nMAINPID={os.getpid()}\nSTATUS={status}"
        systemd.sd_notify(state, self._server.log)


def _is_ours(path: str) -> bool:
    """Whether this process's control server is bound there.

    Back only when the server is done with the question: a server that closes while a connection is
    being accepted logs tracebacks.
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


def _end_every_task() -> None:
    """In the thread of the control server."""
    import asyncio  # noqa: PLC0415  # loaded by the control server, and not before gevent patches it

    for task in asyncio.all_tasks():
        task.cancel()


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
