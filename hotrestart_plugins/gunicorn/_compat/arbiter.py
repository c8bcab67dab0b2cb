"""The master's part: gunicorn's arbiter, and what it uses."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from gunicorn import config, errors, systemd
from gunicorn import sock as gunicorn_sock

from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter, Config, Listener, Setting
from hotrestart_plugins.gunicorn._compat.table import Feature, Name, lacks

_ARBITER = "gunicorn.arbiter.Arbiter"
_CONTROL = "gunicorn.ctl.server.ControlSocketServer"
_PIDFILE = "gunicorn.pidfile.Pidfile"
_SETTINGS = "gunicorn.config.KNOWN_SETTINGS"

NAMES = (
    Name("gunicorn.errors", "HaltServer", Feature.HOT_RESTART),
    Name("gunicorn.config", "KNOWN_SETTINGS", Feature.HOT_RESTART),
    Name(_ARBITER, "SIG_QUEUE", Feature.HOT_RESTART, "24.0"),
    Name(_ARBITER, "WORKERS", Feature.HOT_RESTART),
    Name(_ARBITER, "LISTENERS", Feature.HOT_RESTART),
    Name(_ARBITER, "reexec_pid", Feature.HOT_RESTART),
    Name(_ARBITER, "num_workers", Feature.HOT_RESTART),
    Name(_ARBITER, "worker_class", Feature.HOT_RESTART),
    Name(_ARBITER, "handle_chld", Feature.HOT_RESTART, composed=True),
    Name(_ARBITER, "handle_term", Feature.HOT_RESTART, composed=True),
    Name(_ARBITER, "handle_int", Feature.HOT_RESTART, composed=True),
    Name(_ARBITER, "handle_quit", Feature.HOT_RESTART, composed=True),
    Name(_ARBITER, "handle_hup", Feature.HOT_RESTART, composed=True),
    Name(_ARBITER, "handle_ttin", Feature.HOT_RESTART, composed=True),
    Name(_ARBITER, "handle_ttou", Feature.HOT_RESTART, composed=True),
    Name(_ARBITER, "handle_usr2", Feature.HOT_RESTART, composed=True),
    Name("gunicorn.sock", "TCPSocket", Feature.HOT_RESTART),
    Name("gunicorn.sock", "TCP6Socket", Feature.HOT_RESTART),
    Name("gunicorn.sock", "UnixSocket", Feature.HOT_RESTART),
    Name("gunicorn.systemd", "listen_fds", Feature.HOT_RESTART),
    Name("gunicorn.systemd", "SD_LISTEN_FDS_START", Feature.HOT_RESTART),
    Name(_ARBITER, "systemd", Feature.HOT_RESTART),
    Name(_ARBITER, "_num_workers", Feature.ROLLBACK),
    Name(_ARBITER, "reap_workers", Feature.STOP_WHOLLY),
    Name(_ARBITER, "spawn_worker", Feature.STOP_WHILE_STARTING),
    Name(_ARBITER, "spawn_worker", Feature.FAST_START),
    Name(_ARBITER, "spawn_workers", Feature.FAST_START),
    Name(_ARBITER, "proc_name", Feature.OWN_DIRTY_ARBITER),
    Name(_ARBITER, "kill_dirty_arbiter", Feature.DIRTY_ARBITER, "25.0"),
    Name(_ARBITER, "reap_dirty_arbiter", Feature.DIRTY_ARBITER, "25.0"),
    Name(_ARBITER, "dirty_arbiter", Feature.DIRTY_ARBITER, "25.0"),
    Name(_ARBITER, "dirty_arbiter_pid", Feature.DIRTY_ARBITER, "25.0"),
    Name("gunicorn.dirty.arbiter.DirtyArbiter", "_cleanup_sync", Feature.DIRTY_ARBITER, "25.0"),
    Name("gunicorn.dirty.arbiter.DirtyArbiter", "pid", Feature.DIRTY_ARBITER, "25.0"),
    Name(_SETTINGS, "dirty_workers", Feature.OWN_DIRTY_ARBITER, "25.0"),
    Name(_SETTINGS, "dirty_apps", Feature.OWN_DIRTY_ARBITER, "25.0"),
    Name("gunicorn.pidfile", "Pidfile", Feature.PID_FILE),
    Name(_ARBITER, "pidfile", Feature.PID_FILE),
    Name(_PIDFILE, "validate", Feature.PID_FILE),
    Name(_PIDFILE, "create", Feature.PID_FILE),
    Name(_PIDFILE, "unlink", Feature.PID_FILE),
    Name(_PIDFILE, "pid", Feature.PID_FILE),
    Name(_SETTINGS, "control_socket_disable", Feature.CONTROL_SOCKET, "25.1"),
    Name(_ARBITER, "_control_server", Feature.CONTROL_SOCKET, "25.1"),
    Name(_ARBITER, "_start_control_server", Feature.CONTROL_SOCKET, "25.1"),
    Name(_ARBITER, "_stop_control_server", Feature.CONTROL_SOCKET, "25.1"),
    Name(_CONTROL, "_ready", Feature.CONTROL_SOCKET, "26.1"),
    Name(_CONTROL, "_shutdown", Feature.CONTROL_SOCKET, "25.1"),
    Name(_CONTROL, "socket_path", Feature.CONTROL_SOCKET, "25.1"),
    Name("gunicorn.sock", "create_sockets", Feature.CHANGE_ADDRESSES),
    Name("gunicorn.sock", "ssl_context", Feature.CHECK_TLS, "21.2"),
    Name("gunicorn.systemd", "sd_notify", Feature.SYSTEMD),
)
"""What `hotrestart_plugins.gunicorn` uses of the arbiter."""


HaltServer: type[BaseException] = getattr(errors, "HaltServer", SystemExit)
"""What ends gunicorn's main loop; made with a reason and an exit status."""


def failure(error: BaseException | None) -> str | None:
    """The reason that `error`, a HaltServer, gives for a stop with a status that is not 0.

    None for whatever else ends gunicorn's main loop.
    """
    if isinstance(error, errors.HaltServer) and error.exit_status != 0:
        return str(error.reason)
    return None


def hook_validator(name: str) -> Callable[[object], Any]:
    """The check that gunicorn itself makes of a hook; it raises TypeError."""
    settings: list[Setting] = getattr(config, "KNOWN_SETTINGS", [])
    return next((one.validator for one in settings if one.name == name), lambda hook: hook)


# -- workers ---------------------------------------------------------------------------------------


def workers(server: Arbiter) -> set[int]:
    """The pids of the workers that have not been reaped."""
    return set(server.WORKERS)


def wanted_workers(server: Arbiter) -> int:
    """How many workers there shall be."""
    return server.num_workers


def set_wanted_workers(server: Arbiter, number: int) -> None:
    """Change how many workers there shall be, without a call of the user's nworkers_changed."""
    server._num_workers = number  # noqa: SLF001


def worker_class(server: Arbiter) -> type:
    """The class of the workers."""
    return server.worker_class


def spawn_within(server: Arbiter, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Fork each worker from now on within a context of its own."""
    if lacks(Feature.STOP_WHILE_STARTING):
        return
    spawn = server.spawn_worker

    def spawn_worker() -> int:
        with context():
            return spawn()

    server.spawn_worker = spawn_worker


def spawn_first_at_once(server: Arbiter) -> None:
    """Start the first workers without the pause of up to 0.1 s that gunicorn makes after each.

    Only the first: workers that end while they start may do so again and again.
    """
    if lacks(Feature.FAST_START):
        return

    def spawn_workers() -> None:
        del server.spawn_workers
        for _ in range(server.num_workers - len(server.WORKERS)):
            server.spawn_worker()

    server.spawn_workers = spawn_workers


def reap_wholly(server: Arbiter) -> None:
    """Do not let a worker that fails to start end gunicorn in the middle of its stop."""
    if lacks(Feature.STOP_WHOLLY):
        return
    kind: Any = type(server)  # not the instance's: this may have been called before
    reap = kind.reap_workers

    def reap_workers() -> None:
        while True:
            with contextlib.suppress(HaltServer):
                reap(server)
                return

    server.reap_workers = reap_workers


# -- signals ---------------------------------------------------------------------------------------


def waker(server: Arbiter) -> Callable[[], None]:
    """A function that wakes the main loop as SIGCHLD does. A signal handler may call it."""
    put = server.SIG_QUEUE.put_nowait
    return lambda: put(signal.SIGCHLD)


def wrap_handler(server: Arbiter, name: str, wrapper: Callable[[Callable[[], None]], None]) -> None:
    """Call `wrapper` with gunicorn's own handler whenever the main loop handles a signal.

    `name`: of the signal, in lower case, without ``sig``.
    """
    original: Callable[[], None] = getattr(server, f"handle_{name}")

    def handler() -> None:
        wrapper(original)

    setattr(server, f"handle_{name}", handler)
    if name == "chld":  # the same signal has both names
        server.handle_cld = handler


# -- listeners -------------------------------------------------------------------------------------


def listeners(server: Arbiter) -> list[Listener]:
    """The arbiter's sockets."""
    return server.LISTENERS


def set_listeners(server: Arbiter, sockets: list[Listener]) -> None:
    """Give the arbiter its sockets: it makes none if it has some."""
    server.LISTENERS = sockets


def make_listener(
    server: Arbiter, family: socket.AddressFamily, bind: Any, sock: socket.socket
) -> Listener:
    """A socket of gunicorn's class for a family. It takes the descriptor over from `sock`.

    `bind`: what gunicorn calls the address.
    """
    classes = {
        socket.AF_INET: gunicorn_sock.TCPSocket,
        socket.AF_INET6: gunicorn_sock.TCP6Socket,
        socket.AF_UNIX: gunicorn_sock.UnixSocket,
    }
    # The class duplicates the descriptor that it is given, and closes that one.
    made: Listener = classes[family](bind, server.cfg, server.log, fd=sock.detach())
    return made


def replace_listeners(server: Arbiter, old: list[Listener], new: list[Listener]) -> None:
    """While gunicorn reloads: have it close the `old` ones, and go on with the `new` ones."""
    server.LISTENERS = old
    original = gunicorn_sock.create_sockets

    def create_sockets(*_: object) -> list[Listener]:
        gunicorn_sock.create_sockets = original
        return new

    gunicorn_sock.create_sockets = create_sockets


def keep_paths(server: Arbiter) -> None:
    """Have gunicorn unlink no Unix socket's path when it stops, and refuse USR2.

    It believes that USR2 has started another master.
    """
    if server.reexec_pid == 0:
        server.reexec_pid = -1


def may_unlink_paths(server: Arbiter) -> None:
    """Undo `keep_paths`."""
    if server.reexec_pid == -1:
        server.reexec_pid = 0


def load_certificate(cfg: Config) -> None:
    """Raise what makes the certificate unusable: OSError, ssl.SSLError, ValueError."""
    if not lacks(Feature.CHECK_TLS):
        gunicorn_sock.ssl_context(cfg)


# -- systemd ---------------------------------------------------------------------------------------


def systemd_descriptors(server: Arbiter) -> range:
    """The listeners that systemd has passed in; takes them out of the environment.

    gunicorn then leaves the paths of Unix sockets to systemd.
    """
    first = systemd.SD_LISTEN_FDS_START
    count = systemd.listen_fds()
    if count:
        server.systemd = True
    return range(first, first + count)


def notify_systemd(server: Arbiter, state: str) -> None:
    """Send the state to systemd, if this is a service. Never raises."""
    if not lacks(Feature.SYSTEMD):
        systemd.sd_notify(state, server.log)


# -- the dirty arbiter -----------------------------------------------------------------------------


def name_process(server: Arbiter, name: str) -> None:
    """Give the master a name of its own: a dirty arbiter kills another of the same name."""
    server.proc_name = name
    server.cfg.set("proc_name", name)


def has_dirty_arbiter(server: Arbiter) -> bool:
    """Whether the config asks for one."""
    if lacks(Feature.OWN_DIRTY_ARBITER):
        return False
    return server.cfg.dirty_workers > 0 and bool(server.cfg.dirty_apps)
