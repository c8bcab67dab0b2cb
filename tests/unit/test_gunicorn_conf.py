"""How our hooks get around the user's own, wherever in the file `install` is called."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gunicorn.app.base import Application
from gunicorn.config import KNOWN_SETTINGS, Config

from hotrestart_plugins.errors import ConfigurationError
from hotrestart_plugins.gunicorn import entry_points, hooks
from hotrestart_plugins.settings import OPTIONS

OURS = (
    "nworkers_changed",
    "on_starting",
    "pre_fork",
    "post_fork",
    "post_worker_init",
    "worker_exit",
    "on_exit",
)
IMPORT = "from hotrestart_plugins.gunicorn import install\n"
CALL = "install(globals())\n"

Read = Callable[[str], dict[str, Any]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a config as gunicorn does, and returns what the file leaves behind."""

    def read(text: str) -> dict[str, Any]:
        path = tmp_path / "some.conf.py"
        path.write_text(textwrap.dedent(text))
        found: dict[str, Any] = Application.get_config_from_filename(None, str(path))
        return found

    return read


def all_hooks() -> dict[str, int]:
    """Each hook of the installed gunicorn that is called with a fixed number of arguments."""
    found = {}
    for setting in KNOWN_SETTINGS:
        if inspect.isfunction(setting.default) and setting.name != "ssl_context":
            found[setting.name] = len(inspect.signature(setting.default).parameters)
    return found


def text_of_all_hooks() -> str:
    text = "calls = []\n"
    for name, arity in all_hooks().items():
        names = ", ".join(f"a{number}" for number in range(arity))
        text += f"def {name}({names}):\n    calls.append(({name!r}, {names},))\n"
    return text


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_a_config_that_defines_every_hook(
    read: Read, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """gunicorn accepts each, and each of the user's is called, once, with what gunicorn gave."""
    define = text_of_all_hooks()
    text = {
        "before": IMPORT + define + CALL,
        "after": IMPORT + CALL + define,
        "both": IMPORT + CALL + define + CALL,
    }[order]
    found = read(text)
    told: list[str] = []
    monkeypatch.setattr(entry_points, "configured", lambda *_, **__: told.append("configured"))
    for name in ("starting", "forked", "initialised", "exiting"):
        monkeypatch.setattr(entry_points, name, lambda *_, name=name: told.append(name))
    config = Config()
    for name, arity in all_hooks().items():
        config.set(name, found[name])
        arguments = [f"{name} {number}" for number in range(arity)]
        getattr(config, name)(*arguments)
        assert found["calls"] == [(name, *arguments)]
        found["calls"].clear()
    assert sorted(told) == ["configured", "exiting", "forked", "initialised", "starting"]
    assert sys.getprofile() is None


@pytest.mark.parametrize("name", OURS)
def test_our_hooks_have_the_arity_that_gunicorn_asks_for(read: Read, name: str) -> None:
    """Without any of the user's, too."""
    found = read(IMPORT + CALL)
    Config().set(name, found[name])


def test_a_hook_named_by_a_string(read: Read) -> None:
    """gunicorn takes 'module.function' for a hook."""
    found = read(IMPORT + CALL + "on_starting = 'os.path.basename'\n")
    assert callable(found["on_starting"])


@pytest.mark.parametrize("value", ["'nowhere.at_all'", "lambda: None", "7"])
def test_a_hook_that_gunicorn_refuses_is_left_to_it(read: Read, value: str) -> None:
    found = read(IMPORT + CALL + f"on_starting = {value}\n")
    with pytest.raises(TypeError):
        Config().set("on_starting", found["on_starting"])


def test_an_exception_of_the_users_hook_is_gunicorns_to_handle(read: Read) -> None:
    found = read(IMPORT + "def on_starting(server):\n    raise KeyError(server)\n" + CALL)
    with pytest.raises(KeyError, match="the server"):
        found["on_starting"]("the server")


def test_ours_is_told_of_the_end_even_if_the_users_hook_fails(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(IMPORT + CALL + "def on_exit(server):\n    raise KeyError(server)\n")
    told: list[Any] = []
    monkeypatch.setattr(entry_points, "exiting", lambda _, reason: told.append(reason))
    halting = RuntimeError("the reason")
    try:
        raise halting
    except RuntimeError:
        with pytest.raises(KeyError):
            found["on_exit"]("the server")
    assert told == [halting]


def test_a_call_from_a_function_and_from_exec(read: Read) -> None:
    """Whatever calls it while the file is executed, the file's end is what counts."""
    for call in ("def late():\n    install(globals())\nlate()\n", f"exec({CALL!r}, globals())\n"):
        found = read(IMPORT + call + "def on_starting(server): pass\n")
        assert hasattr(found["on_starting"], "__hotrestart_wraps__")


def test_a_call_after_the_file_has_been_read() -> None:
    namespace: dict[str, Any] = {"on_starting": lambda server: server}
    hooks.install(namespace)
    assert set(OURS) <= namespace.keys()


def test_an_earlier_profile_function_goes_on(read: Read) -> None:
    """It sees what happens while the file is read, and is in place again afterwards."""
    seen: list[str] = []

    def profile(frame: Any, event: str, argument: object) -> None:
        if event == "call":
            seen.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        read(IMPORT + CALL + "def later(): pass\nlater()\n")
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert "later" in seen


def test_a_file_that_fails_leaves_no_profile_function(
    read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(IMPORT + CALL + "raise KeyError('in the file')\n")
    assert sys.getprofile() is None
    assert "KeyError: 'in the file'" in capsys.readouterr().err


# -- options ---------------------------------------------------------------------------------------


def test_every_option_has_a_name_in_the_file() -> None:
    for option in OPTIONS:
        if option.gunicorn:
            assert hooks.settings_of({option.config: "1"}) != hooks.settings_of({})
    settings = hooks.settings_of({"hotrestart_dir": "/some/where", "hotrestart_disable": True})
    assert str(settings.directory) == "/some/where"
    assert settings.disable


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="hotrestart_drian_timeout is no option") as caught:
        hooks.settings_of({"hotrestart_drian_timeout": 7})
    assert "hotrestart_drain_timeout" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_value_names_the_option_as_it_is_written() -> None:
    with pytest.raises(ConfigurationError, match="hotrestart_drain_timeout: 'soon' is not"):
        hooks.settings_of({"hotrestart_drain_timeout": "soon"})


def test_modules_and_functions_are_no_options(read: Read) -> None:
    found = read("import hotrestart_plugins\ndef hotrestart_helper(): pass\n")
    assert hooks.settings_of(found).drain_timeout == 60.0
