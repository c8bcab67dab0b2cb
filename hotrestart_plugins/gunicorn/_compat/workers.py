"""The workers' part: gunicorn's worker classes, and what they are made of."""

from __future__ import annotations

from hotrestart_plugins.gunicorn._compat.table import Name

NAMES: tuple[Name, ...] = ()
"""What `hotrestart_plugins.gunicorn.adapters` uses of the worker classes."""
