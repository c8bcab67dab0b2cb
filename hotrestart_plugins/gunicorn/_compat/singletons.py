"""gunicorn's pid file and its control server."""

from __future__ import annotations

import os

from gunicorn import pidfile

from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter, Pidfile
from hotrestart_plugins.gunicorn._compat.table import Feature, lacks

_CONTROL_START = 2.0  # seconds that gunicorn gives its control server to start


class MasterPidfile:
    """The pid file of one arbiter, which removes it when it ends."""

    def __init__(self, server: Arbiter) -> None:
        self._server = server

    def names(self, path: str) -> int:
        """The pid of the live process that the file names; 0: none."""
        return _pidfile(path).validate() or 0

    def create(self, path: str) -> None:
        """Write it as gunicorn does. Raises RuntimeError if it names another live process."""
        found = _pidfile(path)
        found.create(os.getpid())
        self._server.pidfile = found

    def adopt(self, path: str) -> None:
        """The file there names this process: it is the arbiter's from now on."""
        found = _pidfile(path)
        found.pid = os.getpid()
        self._server.pidfile = found

    def remove(self) -> bool:
        """Remove it if it names this process; return whether the arbiter had one."""
        found, self._server.pidfile = self._server.pidfile, None
        if found is not None:
            found.unlink()
        return found is not None

    def take(self) -> Pidfile | None:
        """Take it from the arbiter, which then leaves the file alone."""
        if lacks(Feature.PID_FILE):
            return None
        found, self._server.pidfile = self._server.pidfile, None
        return found

    def give(self, found: Pidfile | None) -> None:
        """Undo `take`."""
        if not lacks(Feature.PID_FILE):
            self._server.pidfile = found


def _pidfile(path: str) -> Pidfile:
    found: Pidfile = pidfile.Pidfile(path)
    return found


def control_disabled(server: Arbiter) -> bool:
    """Whether the config turns the control server off."""
    return lacks(Feature.CONTROL_SOCKET) or server.cfg.control_socket_disable


def disable_control(server: Arbiter, *, disable: bool) -> None:
    """Change whether the config turns it off; gunicorn looks at that when it starts it."""
    if "control_socket_disable" in server.cfg.settings:
        server.cfg.set("control_socket_disable", disable)


def start_control(server: Arbiter) -> None:
    """Start the control server if it does not run and the config does not turn it off."""
    if not lacks(Feature.CONTROL_SOCKET) and server._control_server is None:  # noqa: SLF001
        server._start_control_server()  # noqa: SLF001


def control_path(server: Arbiter) -> str | None:
    """The path that the control server has bound; None: it does not run."""
    control = None if lacks(Feature.CONTROL_SOCKET) else server._control_server  # noqa: SLF001
    if control is None:
        return None
    control._ready.wait(_CONTROL_START)  # noqa: SLF001  # it binds in a thread
    return os.path.abspath(control.socket_path)


def stop_control(server: Arbiter) -> None:
    """Stop the running control server and its clients, and let it remove no path.

    gunicorn would wait two seconds for the clients. When they leave it would remove the path once
    more, which another instance may have bound by then.
    """
    control = server._control_server  # noqa: SLF001
    if control is not None:
        control.socket_path += f".{os.getpid()}"  # a path that does not exist
        control._shutdown = _cancel_every_task  # noqa: SLF001
        server._stop_control_server()  # noqa: SLF001


def _cancel_every_task() -> None:
    """Runs in the thread of the control server."""
    import asyncio  # noqa: PLC0415  # must not be loaded before a gevent worker patches it

    for task in asyncio.all_tasks():
        task.cancel()
