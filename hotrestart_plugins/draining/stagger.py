"""The last part of a drain, over which what lasts until somebody ends it is ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_LAST_PART = 0.2  # of a drain
_MAX_SECONDS = 10.0  # seconds; a longer one helps no client
_SPREAD = 0.75  # of the last part; the rest is the apps', to notice and to end


class StaggeredClose:
    """Ends one after another, so that the clients do not all come back at once."""

    def __init__(
        self,
        find: Callable[[], list[Any]],
        end: Callable[[Any], None],
    ) -> None:
        """`find` is called once, when the last part begins; `end` for each that it has found."""
        self._find = find
        self._end = end
        self._found: list[Any] | None = None
        self._done = 0

    def step(self, left: float, whole: float, least: float = 0.0) -> None:
        """With `left` of `whole` seconds to go, end as many as is due.

        The last part takes `least` seconds at least.
        """
        part = min(max(whole * _LAST_PART, least), _MAX_SECONDS)
        if left > part:
            return
        if self._found is None:
            self._found = self._find()
        spent = min(1.0, (part - left) / (part * _SPREAD)) if part else 1.0
        due = max(1, round(len(self._found) * spent))
        for item in self._found[self._done : due]:
            self._end(item)
        self._done = max(self._done, due)
