"""A gate in the import of an app: the processes that come to it wait for the test."""

from __future__ import annotations

import os
import socket
from pathlib import Path

GATED = """
import os, socket
if "GATE" in os.environ:
    with socket.socket(socket.AF_UNIX) as gate:
        gate.connect(os.environ["GATE"])
        gate.recv(1)
from {module} import app
"""


class Gate:
    """Holds the import of the app in each process that comes to it."""

    def __init__(self, directory: Path, args: list[str]) -> None:
        app = next(arg for arg in args if arg.endswith(":app"))
        (directory / "gated.py").write_text(GATED.format(module=app.removesuffix(":app")))
        self.args = ["gated:app" if arg == app else arg for arg in args]
        """The command, of the app behind the gate."""
        path = os.environ.get("PYTHONPATH")
        self.open = {"PYTHONPATH": os.pathsep.join([str(directory), *([path] if path else [])])}
        self.closed = {**self.open, "GATE": str(directory / "gate")}
        """The environments of instances that pass, and that wait."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(60)
        self._listener.bind(self.closed["GATE"])
        self._listener.listen()
        self._waiting: list[socket.socket] = []

    def wait(self) -> None:
        """Until one process more is in the import."""
        self._waiting.append(self._listener.accept()[0])

    def let_one_through(self) -> None:
        self._waiting.pop().close()

    def close(self) -> None:
        for one in (self._listener, *self._waiting):
            one.close()
