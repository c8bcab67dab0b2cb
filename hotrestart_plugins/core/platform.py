"""poll(2) from the operating system itself."""

from __future__ import annotations

import importlib.util
import select
from typing import Any


def unpatched_poll() -> Any:
    """poll(2), also where gevent has put its own in the place of it.

    That one waits in the hub even for no time at all, and fails where the hub itself calls.
    """
    found: Any = select.poll
    spec = importlib.util.find_spec("select")
    if isinstance(found, type(len)) or spec is None or spec.loader is None:
        return found
    untouched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    return untouched.poll


poll = unpatched_poll()
