"""Zero-downtime restarts for Python's web servers: start the same command again to deploy.

The core: `HotRestart`, the process-wide `DEFAULT_HOT_RESTART`, and the reference's verbs on it.
The servers are in `hotrestart_plugins.uvicorn` and `hotrestart_plugins.gunicorn_conf`; importing
this package imports neither.
"""

from hotrestart_plugins.core.hot_restart import (
    DEFAULT_HOT_RESTART,
    ChildExitAction,
    HotRestart,
    Role,
    TerminatePolicy,
)
from hotrestart_plugins.errors import (
    AddressError,
    Busy,
    ConfigurationError,
    HotRestartError,
    MessageError,
    NoAnswer,
    NotReady,
    Overtaken,
    ParentGone,
    RendezvousError,
    TakeoverError,
    WrongDescriptor,
    WrongPeer,
)
from hotrestart_plugins.settings import Settings

initialize = DEFAULT_HOT_RESTART.initialize
register_listener_fd = DEFAULT_HOT_RESTART.register_listener_fd
dup_parent_listener_sock = DEFAULT_HOT_RESTART.dup_parent_listener_sock

__all__ = [
    "DEFAULT_HOT_RESTART",
    "AddressError",
    "Busy",
    "ChildExitAction",
    "ConfigurationError",
    "HotRestart",
    "HotRestartError",
    "MessageError",
    "NoAnswer",
    "NotReady",
    "Overtaken",
    "ParentGone",
    "RendezvousError",
    "Role",
    "Settings",
    "TakeoverError",
    "TerminatePolicy",
    "WrongDescriptor",
    "WrongPeer",
    "dup_parent_listener_sock",
    "initialize",
    "register_listener_fd",
]
