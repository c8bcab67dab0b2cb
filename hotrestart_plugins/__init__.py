"""Zero-downtime restarts for Python's web servers: start the same command again to deploy.

The core: `HotRestart`, the process-wide `DEFAULT_HOT_RESTART`, and the reference's verbs on it.
The servers are in `hotrestart_plugins.uvicorn` and `hotrestart_plugins.gunicorn_conf`; importing
this package imports neither.
"""

from hotrestart_plugins.errors import (
    AddressError,
    Busy,
    ConfigurationError,
    HotRestartError,
    MeetingPlaceError,
    MessageError,
    NoAnswer,
    NotReady,
    ParentGone,
    TakeoverError,
    WrongDescriptor,
    WrongPeer,
)
from hotrestart_plugins.protocol import DEFAULT_HOT_RESTART, After, HotRestart, Moment, Role
from hotrestart_plugins.settings import Settings

initialize = DEFAULT_HOT_RESTART.initialize
register_listener_fd = DEFAULT_HOT_RESTART.register_listener_fd
dup_parent_listener_sock = DEFAULT_HOT_RESTART.dup_parent_listener_sock

__all__ = [
    "DEFAULT_HOT_RESTART",
    "AddressError",
    "After",
    "Busy",
    "ConfigurationError",
    "HotRestart",
    "HotRestartError",
    "MeetingPlaceError",
    "MessageError",
    "Moment",
    "NoAnswer",
    "NotReady",
    "ParentGone",
    "Role",
    "Settings",
    "TakeoverError",
    "WrongDescriptor",
    "WrongPeer",
    "dup_parent_listener_sock",
    "initialize",
    "register_listener_fd",
]
