"""gunicorn ships no types: what this package uses of its objects.

Only modules in this package may use the attributes that are not documented.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from hotrestart_plugins.core.events import Logger

Bind = tuple[str, int] | str | int
"""An entry of `Config.address`: host and port, the path of a Unix socket, or a descriptor."""


class Setting(Protocol):
    """One setting of a config, or in `gunicorn.config.KNOWN_SETTINGS`."""

    name: str
    default: Any
    validator: Callable[[object], Any]

    def get(self) -> Any:
        """The value."""


class Config(Protocol):
    """gunicorn's settings: those of a config file, by their names."""

    address: list[Bind]
    pidfile: str | None
    preload_app: bool
    reuse_port: bool
    proc_name: str
    dirty_workers: int
    dirty_apps: list[str]
    control_socket_disable: bool
    graceful_timeout: int
    worker_class_str: str
    certfile: str | None
    keyfile: str | None
    is_ssl: bool
    umask: int
    uid: int
    gid: int
    backlog: int
    asgi_lifespan: str
    proxy_protocol: str | bool
    pre_request: Callable[..., object]
    post_request: Callable[..., object]
    settings: Mapping[str, Setting]

    def set(self, name: str, value: object) -> None:
        """Change a setting."""


class Worker(Protocol):
    """A worker, as the hooks get it."""

    pid: int
    cfg: Config
    log: Logger


class Listener(Protocol):
    """A socket of one of gunicorn's classes; owns its descriptor."""

    def fileno(self) -> int:
        """The descriptor."""

    def close(self) -> None:
        """Close it."""


class Pidfile(Protocol):
    """gunicorn's pid file."""

    fname: str
    pid: int | None

    def create(self, pid: int) -> None:
        """Write it. Raises RuntimeError if it names another process that lives."""

    def validate(self) -> int | None:
        """The process that it names, if that lives."""

    def unlink(self) -> None:
        """Remove it if it names this process."""


class ControlServer(Protocol):
    """The server of gunicorn's control socket."""

    socket_path: str
    _ready: Any
    _shutdown: Callable[[], None]


class DirtyArbiter(Protocol):
    """gunicorn's arbiter of dirty workers."""

    pid: int

    def _cleanup_sync(self) -> None: ...


class Arbiter(Protocol):
    """gunicorn's master."""

    cfg: Config
    log: Logger

    SIG_QUEUE: queue.SimpleQueue[int]
    WORKERS: dict[int, Worker]
    LISTENERS: list[Listener]
    worker_class: type
    num_workers: int
    reexec_pid: int
    systemd: bool
    proc_name: str
    pidfile: Pidfile | None
    dirty_arbiter: DirtyArbiter | None
    dirty_arbiter_pid: int
    spawn_worker: Callable[[], int]
    spawn_workers: Callable[[], None]
    reap_workers: Callable[[], None]
    kill_dirty_arbiter: Callable[[int], None]
    reap_dirty_arbiter: Callable[[], None]
    handle_chld: Callable[[], None]
    handle_cld: Callable[[], None]
    _num_workers: int
    _control_server: ControlServer | None
    _start_control_server: Callable[[], None]
    _stop_control_server: Callable[[], None]
