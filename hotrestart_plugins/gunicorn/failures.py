"""How a master that cannot go on says so: in the config's words, and by its exit status."""

from __future__ import annotations

from hotrestart_plugins.errors import ConfigurationError, Overtaken
from hotrestart_plugins.settings import OPTIONS

EX_SOFTWARE = 70  # sysexits.h: a fault of ours
EX_TEMPFAIL = 75  # sysexits.h: it could not take over; try again
EX_CONFIG = 78  # sysexits.h: it cannot work as it is configured


def status_of(error: Exception) -> int:
    """The exit status of a master that cannot serve because of `error`."""
    return error.status if isinstance(error, (ConfigurationError, Overtaken)) else EX_TEMPFAIL


def in_config_words(error: Exception) -> str:
    """The message, with the names that the options have in a gunicorn config file."""
    text = str(error)
    for option in OPTIONS:
        if option.flag:
            text = text.replace(option.flag, option.config)
    return text
