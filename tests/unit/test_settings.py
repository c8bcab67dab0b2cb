"""The options: where each may be written, which one counts, and what a bad one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hotrestart_plugins.errors import ConfigurationError
from hotrestart_plugins.settings import DEFAULTS, OPTIONS, Option, Settings

BY_FIELD = {option.field: option for option in OPTIONS}

GOOD: list[tuple[str, object, str, Any]] = [
    # the field, as given in a call, as written in the environment, the value
    ("bind", ["127.0.0.1:1", "unix:/a"], "127.0.0.1:1,unix:/a", ("127.0.0.1:1", "unix:/a")),
    ("bind", ("[::1]:1",), " [::1]:1 ", ("[::1]:1",)),
    ("bind", [], "", ()),
    ("directory", Path("/tmp/x"), "/tmp/x", Path("/tmp/x")),
    ("takeover_timeout", 5, "5", 5.0),
    ("takeover_timeout", 0.5, "0.5", 0.5),
    ("ready_timeout", 60, "60", 60.0),
    ("drain_timeout", "1e3", "1e3", 1000.0),
    ("rollback_window", 0, "0", 0.0),
    ("rollback_window", 2.5, "2.5", 2.5),
    ("disable", True, "1", True),
    ("disable", True, "true", True),
    ("disable", True, "YES", True),
    ("disable", True, "on", True),
    ("disable", False, "0", False),
    ("disable", False, "no", False),
    ("disable", False, "", False),
]

BAD: list[tuple[str, str]] = [
    *((field, bad) for field in ("takeover_timeout", "ready_timeout", "drain_timeout")
      for bad in ("0", "-1", "nan", "inf", "soon", "", "1 s")),
    *(("rollback_window", bad) for bad in ("-1", "nan", "inf", "never", "")),
    ("directory", ""),
    ("directory", "/tmp/a\0b"),
    *(("disable", bad) for bad in ("2", "maybe", "-")),
]  # fmt: skip

WRONG_TYPES: list[tuple[str, object]] = [
    ("takeover_timeout", True),
    ("takeover_timeout", [1]),
    ("rollback_window", False),
    ("rollback_window", object()),
    ("bind", 8000),
    ("bind", b"127.0.0.1:1"),
    ("disable", []),
]


def test_the_table_is_complete() -> None:
    """Every setting has its row, and every row its setting, a flag, an environment name, a help."""
    assert set(BY_FIELD) == set(DEFAULTS)
    for option in OPTIONS:
        assert option.flag.startswith("--") == option.uvicorn
        assert option.env.startswith("HOTRESTART_")
        assert option.config == option.env.lower()
        assert option.help.endswith(".")
        assert option.wants
    assert len({option.flag for option in OPTIONS}) == len(OPTIONS)
    assert len({option.env for option in OPTIONS}) == len(OPTIONS)


def test_the_defaults() -> None:
    """Nothing given, nothing in the environment: the defaults."""
    assert Settings.gather({}, {}) == Settings()
    assert Settings.gather(dict.fromkeys(BY_FIELD), {}) == Settings()


@pytest.mark.parametrize(("field", "given", "written", "value"), GOOD)
def test_a_good_value(field: str, given: object, written: str, value: object) -> None:
    """Each option can be given in a call, or in the environment, and means the same."""
    option = BY_FIELD[field]
    by_call = getattr(Settings.gather({field: given}, {}), field)
    by_environment = getattr(Settings.gather({}, {option.env: written}), field)
    assert (by_call, by_environment) == (value, value)
    assert type(by_call) is type(by_environment)


@pytest.mark.parametrize(("field", "given", "written", "value"), GOOD)
def test_the_call_counts_before_the_environment(
    field: str, given: object, written: str, value: object
) -> None:
    """What is given in the call wins; the environment is not even looked at."""
    found = Settings.gather({field: given}, {BY_FIELD[field].env: "\0 no good value of anything"})
    assert getattr(found, field) == value


@pytest.mark.parametrize(("field", "bad"), BAD)
def test_a_bad_value(field: str, bad: str) -> None:
    """A bad value is one line: where it was written, what it was, what is wanted."""
    option = BY_FIELD[field]
    ways: list[tuple[dict[str, object], dict[str, str], str]] = [({field: bad}, {}, option.flag)]
    if bad:
        ways.append(({}, {option.env: bad}, option.env))
    for given, environ, where in ways:
        with pytest.raises(ConfigurationError) as error:
            Settings.gather(given, environ)
        assert str(error.value) == f"{where}: {bad!r} is not {option.wants}"


def test_an_empty_variable_is_as_if_unset() -> None:
    """Whoever fills a template in may leave it empty; an option that is given empty is an error."""
    assert Settings.gather({}, {option.env: "" for option in OPTIONS}) == Settings()


@pytest.mark.parametrize(("field", "bad"), WRONG_TYPES)
def test_a_value_of_a_wrong_type(field: str, bad: object) -> None:
    """In a call any object may come; one that is none of what is wanted is refused in words."""
    with pytest.raises(ConfigurationError, match=BY_FIELD[field].flag):
        Settings.gather({field: bad}, {})


def test_the_error_names_the_option_as_it_was_written() -> None:
    """A config file's own name for an option stands in the error about it."""

    def in_the_file(option: Option) -> str:
        return f"gunicorn.conf.py: {option.config}"

    with pytest.raises(ConfigurationError) as error:
        Settings.gather({"drain_timeout": "x"}, {}, source=in_the_file)
    assert str(error.value).startswith("gunicorn.conf.py: hotrestart_drain_timeout: 'x' is not ")


def test_the_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an environment given, it is that of the process."""
    monkeypatch.setenv("HOTRESTART_DRAIN_TIMEOUT", "7")
    assert Settings.gather().drain_timeout == 7.0
