"""Spreads the end of long-lived connections over the last part of a drain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")

_LAST_PART = 0.2  # of a drain
_MAX_SECONDS = 10.0  # a longer last part helps no client
_SPREAD = 0.75  # of the last part; the rest is for the app, to notice and to finish


class StaggeredClose(Generic[ItemT]):
    """Ends items one after another, so that their clients do not all reconnect at once."""

    def __init__(self, find: Callable[[], list[ItemT]], end: Callable[[ItemT], None]) -> None:
        """`find` is called once, when the last part begins; `end` for each item it returned."""
        self._find = find
        self._end = end
        self._found: list[ItemT] | None = None
        self._ended = 0

    def step(self, left: float, whole: float, least: float = 0.0) -> None:
        """End as many items as are due with `left` of the drain's `whole` seconds to go.

        The last part takes at least `least` seconds.
        """
        part = min(max(whole * _LAST_PART, least), _MAX_SECONDS)
        if left > part:
            return
        if self._found is None:
            self._found = self._find()
        spent = min(1.0, (part - left) / (part * _SPREAD)) if part else 1.0
        due = max(1, round(len(self._found) * spent))
        for item in self._found[self._ended : due]:
            self._end(item)
        self._ended = max(self._ended, due)
