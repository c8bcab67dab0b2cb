"""Whether a package has a name: a module that is loaded, one that is not, one that is not there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotrestart_plugins.core import private_names
from hotrestart_plugins.core.private_names import Absent, Unreadable

SOURCE = """
settings = []
class Base:
    def __init__(self, other):
        self.inherited = other.foreign = 1
class Server(Base):
    documented = 2
    def run(self):
        def inner():
            self.nested = 3
        return self.only_read, inner
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package that is not loaded, with a module `part`."""
    name = f"package_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "part.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for loaded in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[loaded]


@pytest.mark.parametrize("loaded", [False, True])
def test_what_a_class_has(package: str, *, loaded: bool) -> None:
    """What it defines, and what its methods assign to self."""
    if loaded:
        importlib.import_module(f"{package}.part")
    server = private_names.find(f"{package}.part.Server")
    for name in ("documented", "run", "nested"):
        assert private_names.has(server, name), name
    for name in ("only_read", "foreign", "gone"):
        assert not private_names.has(server, name), name
    assert private_names.has(server, "inherited") is loaded  # code does not tell what it inherits
    assert (f"{package}.part" in sys.modules) is loaded


def test_what_a_module_has(package: str) -> None:
    part = private_names.find(f"{package}.part")
    assert private_names.has(part, "settings")
    assert not private_names.has(part, "gone")
    assert private_names.find(f"{package}.part.Gone") is None
    assert not private_names.has(None, "run")


def test_a_module_that_is_not_there(package: str) -> None:
    assert private_names.find(f"{package}.gone.Server") is Absent
    assert private_names.find(f"{package}_gone") is Absent


def test_a_module_that_cannot_be_read(package: str, tmp_path: Path) -> None:
    """It is believed to have everything: a server must not fail for the sake of a look."""
    (tmp_path / package / "secret.py").symlink_to("/proc/self/mem")  # reading it is EIO
    found = private_names.find(f"{package}.secret.Server")
    assert found is Unreadable
    assert private_names.has(found, "anything")
