"""For ``gunicorn -c python:hotrestart_plugins.gunicorn_conf``: your config file, and our hooks.

gunicorn reads no ``./gunicorn.conf.py`` when it is given another config; so that one is read here
first, and all its settings are taken over. To use a file of another name, or to keep `-c` for it,
call `hotrestart_plugins.gunicorn.install` in it instead.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback

from hotrestart_plugins.gunicorn import install


def _users_settings() -> dict[str, object]:
    """What ``./gunicorn.conf.py`` defines; nothing if there is none. Exits as gunicorn does."""
    path = os.path.abspath("gunicorn.conf.py")
    if not os.path.exists(path):
        return {}
    try:
        # The name, and its place in sys.modules, are those that gunicorn gives.
        spec = importlib.util.spec_from_file_location("__config__", path)
        assert spec is not None and spec.loader is not None  # noqa: S101, PT018  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules["__config__"] = module
        spec.loader.exec_module(module)
    except Exception:  # noqa: BLE001  # whatever the user's file raises
        sys.stderr.write(f"Failed to read config file: {path}\n")
        traceback.print_exc()
        sys.exit(1)
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


globals().update(_users_settings())
install(globals())
