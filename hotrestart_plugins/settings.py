"""The options: one table for the command line, the environment, gunicorn's config and the docs.

An option is looked up in this order: the command line (or the call, or gunicorn's config file),
the environment, the default. A variable that is set to nothing is as if it were not set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hotrestart_plugins.errors import ConfigurationError

ENV_PREFIX = "HOTRESTART_"


def _seconds(value: object) -> float:
    number = float(str(value))
    if not (number > 0 and math.isfinite(number)):
        raise ValueError("a number of seconds greater than 0")
    return number


def _seconds_or_none(value: object) -> float:
    return 0.0 if float(str(value)) == 0 else _seconds(value)


def _directory(value: object) -> Path:
    if not str(value) or "\0" in str(value):
        raise ValueError("a directory")
    return Path(str(value))


def _text(value: object) -> str:
    if not str(value):
        raise ValueError("something")
    return str(value)


def _addresses(value: object) -> tuple[str, ...]:
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise TypeError("addresses")
    return tuple(str(part) for part in parts)


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False, "": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise ValueError("1 or 0") from None


@dataclass(frozen=True)
class Option:
    """One row of the table."""

    field: str
    """The name in `Settings` and of the keyword argument."""
    flag: str
    """On the command line of hotrestart-uvicorn, if it is one of uvicorn's."""
    key: str
    """What follows HOTRESTART_ in the environment, and in lower case hotrestart_ in a gunicorn
    config file."""
    check: Callable[[object], Any]
    """From what was written to the value; raises ValueError or TypeError."""
    wants: str
    """What a good value is, for the error."""
    help: str
    metavar: str = ""
    gunicorn: bool = True
    """False for what gunicorn has an option of its own for, or has not."""
    uvicorn: bool = True
    """False for what uvicorn has not."""

    @property
    def env(self) -> str:
        """Its name in the environment."""
        return ENV_PREFIX + self.key

    @property
    def config(self) -> str:
        """Its name in a gunicorn config file."""
        return self.env.lower()

    def value(self, written: object, where: str) -> Any:
        """The checked value; raises ConfigurationError, naming where the bad one was written."""
        try:
            return self.check(written)
        except (ValueError, TypeError):
            raise ConfigurationError(f"{where}: {written!r} is not {self.wants}") from None


OPTIONS = (
    Option(
        "bind",
        "--bind",
        "BIND",
        _addresses,
        "a list of addresses",
        "Listen on this address instead of --host, --port, --uds or --fd: host:port, [v6]:port, "
        "unix:PATH, unix:@ABSTRACT or fd://N. Repeatable.",
        "ADDRESS",
        gunicorn=False,
    ),
    Option(
        "directory",
        "--hot-restart-dir",
        "DIR",
        _directory,
        "a directory",
        "Directory in which the running and the new instance find each other. "
        "Default: /run/hotrestart/ADDRESS for root, /tmp/hotrestart-UID/ADDRESS for others.",
        "DIR",
    ),
    Option(
        "takeover_timeout",
        "--takeover-timeout",
        "TAKEOVER_TIMEOUT",
        _seconds,
        "a number of seconds greater than 0",
        "Seconds to wait for each reply from the running instance. For another takeover to finish, "
        "this instance waits that long plus the ready timeout.",
        "SECONDS",
    ),
    Option(
        "ready_timeout",
        "--ready-timeout",
        "READY_TIMEOUT",
        _seconds,
        "a number of seconds greater than 0",
        "Seconds within which the app must be ready. If it is not, this instance exits and the "
        "running one keeps serving.",
        "SECONDS",
    ),
    Option(
        "drain_timeout",
        "--drain-timeout",
        "DRAIN_TIMEOUT",
        _seconds,
        "a number of seconds greater than 0",
        "Seconds that a replaced instance has to finish the requests in flight.",
        "SECONDS",
    ),
    Option(
        "rollback_window",
        "--rollback-window",
        "ROLLBACK_WINDOW",
        _seconds_or_none,
        "a number of seconds, or 0 for none",
        "Seconds after a takeover during which the old instance serves again if the new one "
        "crashes. 0: it exits as soon as it has drained.",
        "SECONDS",
    ),
    Option(
        "probe",
        "--probe",
        "PROBE",
        _text,
        "/path or module:function",
        "Health check to pass before taking over: a path that must answer with 2xx or 3xx, or a "
        "function that must not raise or return False.",
        "PATH|MODULE:FUNCTION",
    ),
    Option(
        "no_handover",
        "--no-connection-handover",
        "NO_CONNECTION_HANDOVER",
        _switch,
        "1 or 0",
        "Do not hand kept-alive connections over to the next instance; answer each once more, with "
        "Connection: close.",
    ),
    Option(
        "manual_usr2",
        "",
        "MANUAL_USR2",
        _switch,
        "1 or 0",
        "Leave SIGUSR2 to gunicorn: it starts a second master, and further signals do the rest. "
        "Otherwise it starts the next instance, which takes over.",
        uvicorn=False,
    ),
    Option(
        "disable",
        "--no-hot-restart",
        "DISABLE",
        _switch,
        "1 or 0",
        "Neither take over from a running instance nor be replaced by a later one.",
    ),
)


@dataclass(frozen=True)
class Settings:
    """The checked options; the defaults are here."""

    bind: tuple[str, ...] = ()
    directory: Path | None = None
    takeover_timeout: float = 30.0
    ready_timeout: float = 300.0
    drain_timeout: float = 60.0
    rollback_window: float = 10.0
    probe: str = ""
    no_handover: bool = False
    manual_usr2: bool = False
    disable: bool = False

    @classmethod
    def gather(
        cls,
        given: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        *,
        source: Callable[[Option], str] = lambda option: option.flag,
    ) -> Settings:
        """The settings from what was `given` (by field name; None for 'not given') and `environ`.

        `source` names an option the way the user wrote it. Raises ConfigurationError.
        """
        given = given or {}
        environ = os.environ if environ is None else environ
        chosen: dict[str, Any] = {}
        for option in OPTIONS:
            written = given.get(option.field)
            if written is not None:
                chosen[option.field] = option.value(written, source(option))
            elif environ.get(option.env):
                chosen[option.field] = option.value(environ[option.env], option.env)
        return cls(**chosen)


DEFAULTS = {field.name: field.default for field in fields(Settings)}
