"""What the steps of a takeover are reported to."""

from __future__ import annotations

from typing import Any, Protocol


class Logger(Protocol):
    """What is needed of a logger: the standard one's methods, gunicorn's have them too."""

    def debug(self, msg: str, *args: Any) -> None:
        """Each listener."""

    def info(self, msg: str, *args: Any) -> None:
        """Each step."""

    def warning(self, msg: str, *args: Any) -> None:
        """What went otherwise."""

    def error(self, msg: str, *args: Any) -> None:
        """What somebody has to look at."""
