"""The `hotrestart-uvicorn` command: that of uvicorn, with a few more options."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click
from click.core import ParameterSource

from hotrestart_plugins.errors import ConfigurationError
from hotrestart_plugins.settings import DEFAULTS, OPTIONS, Option, Settings
from hotrestart_plugins.uvicorn._compat import command as _compat
from hotrestart_plugins.uvicorn.server import run

_EPILOG = (
    "Start the same command again to deploy: the new instance takes the listening sockets over "
    "from the running one, which drains and exits with 0. If the new one fails, it exits with "
    "3 (the app did not start), 75 (it could not take over; try again) or 78 (a setting cannot "
    "work), and the running one serves on."
)

_OPTIONS = [option for option in OPTIONS if option.uvicorn]


class _Refused(click.ClickException):
    """A setting that cannot work. What click cannot read is an error of its own, with status 2."""

    exit_code = ConfigurationError.status


def _parameter(option: Option) -> click.Option:
    default = DEFAULTS[option.field]
    shown = f" Default: {default:g}." if isinstance(default, float) else ""
    help_text = f"{option.help}{shown} [env: {option.env}]"
    if isinstance(default, bool):
        return click.Option([option.flag, option.field], is_flag=True, default=None, help=help_text)
    return click.Option(
        [option.flag, option.field],
        multiple=isinstance(default, tuple),
        metavar=option.metavar,
        help=help_text,
    )


def _command() -> click.Command:
    theirs = _compat.command()
    return click.Command(
        name="hotrestart-uvicorn",
        params=[*theirs.params, *(_parameter(option) for option in _OPTIONS)],
        callback=_called,
        context_settings=theirs.context_settings,
        epilog=_EPILOG,
    )


def _called(**parameters: Any) -> None:
    given = {option.field: parameters.pop(option.field) for option in _OPTIONS}
    given["bind"] = given["bind"] or None  # click's () is 'not given'
    context = click.get_current_context()
    places = [
        f"--{name}"
        for name in ("host", "port", "uds", "fd")
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]

    def ours(app: Any, **options: Any) -> None:
        try:
            if places and given["bind"]:
                raise ConfigurationError(
                    f"--bind and {places[0]} do not go together: leave one out, or pass --bind "
                    "for each address"
                )
            if places:
                given["bind"] = ()  # whatever the environment has
            if options.get("env_file"):  # uvicorn's Config reads it only later
                _load(options["env_file"])
            settings = Settings.gather(given)
        except ConfigurationError as error:
            raise _Refused(str(error)) from None
        run(app, hot_restart=settings, **options)

    # uvicorn's command turns its options into the arguments of its `run`. Ours takes that place,
    # so that an option of a later uvicorn arrives here without being known here.
    callback = _compat.command().callback
    if callback is not None:
        with _compat.run_replaced_by(ours):
            callback(**parameters)


def _load(env_file: str) -> None:
    """Read the file as uvicorn does: variables that are set already stay."""
    try:
        dotenv = importlib.import_module("dotenv")
    except ImportError:
        raise ConfigurationError("--env-file needs the package python-dotenv: install it") from None
    dotenv.load_dotenv(env_file)


main = _command()

if __name__ == "__main__":
    sys.exit(main())
