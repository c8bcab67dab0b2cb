"""Our hooks around the user's own, in the namespace of their config file.

gunicorn reads its settings, hooks among them, from the names that the file leaves behind. So ours
take the places of the user's at the very end of the file, whatever it defines after the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, FunctionType, ModuleType
from typing import Any, cast

from hotrestart_plugins.errors import ConfigurationError
from hotrestart_plugins.gunicorn import entry_points
from hotrestart_plugins.gunicorn._compat import arbiter
from hotrestart_plugins.gunicorn._compat.interfaces import Arbiter, Worker
from hotrestart_plugins.settings import OPTIONS, Settings

Namespace = dict[str, Any]
Hook = Callable[..., Any]

PREFIX = "hotrestart_"
_WRAPS = "__hotrestart_wraps__"

_awaited: list[FrameType] = []  # of modules whose end will have our hooks put in


def install(namespace: Namespace) -> None:
    """Take part in hot restarts: call it with ``globals()`` from a gunicorn config file.

    Hooks that the file defines, before or after the call, are called as gunicorn would call them.
    """
    frame = _module_frame(namespace)
    if frame is None:
        wrap(namespace)
    else:
        _at_end_of(frame, lambda: wrap(namespace))


def _module_frame(namespace: Namespace) -> FrameType | None:
    """The frame that executes the module of this namespace now; None if that is done."""
    found = None
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # public in all but name
    while frame is not None:
        if frame.f_globals is namespace and frame.f_code.co_name == "<module>":
            found = frame  # the outermost: the file may exec() into its own namespace
        frame = frame.f_back
    return found


def _at_end_of(frame: FrameType, then: Callable[[], None]) -> None:
    """Call `then` as the frame returns: no other event comes after the file's last statement."""
    if frame in _awaited:
        return  # a second call in the same file
    _awaited.append(frame)
    earlier = sys.getprofile()

    def watch(current: FrameType, event: str, argument: Any) -> None:
        if current is frame and event == "return":
            _set_profile(earlier)
            _awaited.remove(frame)
            then()
        elif callable(earlier):
            earlier(current, cast("Any", event), argument)

    sys.setprofile(watch)


def _set_profile(earlier: Any) -> None:
    if earlier is None or callable(earlier):
        sys.setprofile(earlier)
    else:  # up to Python 3.11, cProfile's object, which sets itself
        sys.setprofile(None)
        earlier.enable()


def wrap(namespace: Namespace) -> None:
    """Put our hooks around those in the namespace. Doing it again changes nothing."""

    def settings() -> Settings:
        return settings_of(namespace)

    for name, make in _HOOKS.items():
        users = namespace.get(name)
        users = getattr(users, _WRAPS, users)
        if users is not None:
            try:
                users = arbiter.hook_validator(name)(users)
            except TypeError:
                continue  # gunicorn says what is wrong with it, and does not start
        ours = make(users or _nothing, settings)
        setattr(ours, _WRAPS, users)
        namespace[name] = ours


def settings_of(namespace: Namespace) -> Settings:
    """The options among the file's names, or the environment's; raises ConfigurationError."""
    options = {option.config: option for option in OPTIONS if option.gunicorn}
    given: dict[str, object] = {}
    for name, value in namespace.items():
        if not name.startswith(PREFIX) or isinstance(value, (ModuleType, FunctionType, type)):
            continue
        if name not in options:
            known = ", ".join(sorted(options))
            raise ConfigurationError(
                f"{name} is no option of hotrestart_plugins: known are {known}"
            )
        given[options[name].field] = value
    return Settings.gather(given, source=lambda option: option.config)


# -- one maker for each hook: gunicorn checks the number of arguments ------------------------------


def _nothing(*_: object) -> None:
    """What gunicorn's own default of each of these hooks does."""


def _nworkers_changed(users: Hook, settings: Callable[[], Settings]) -> Hook:
    def nworkers_changed(server: Arbiter, new_value: int, old_value: int | None) -> None:
        users(server, new_value, old_value)
        entry_points.configured(server, settings, first=old_value is None)

    return nworkers_changed


def _on_starting(users: Hook, _: object) -> Hook:
    def on_starting(server: Arbiter) -> None:
        users(server)  # may still change server.cfg
        entry_points.starting()

    return on_starting


def _pre_fork(users: Hook, _: object) -> Hook:
    def pre_fork(server: Arbiter, worker: Worker) -> None:
        users(server, worker)
        entry_points.forking()

    return pre_fork


def _post_fork(users: Hook, _: object) -> Hook:
    def post_fork(server: Arbiter, worker: Worker) -> None:
        entry_points.forked(worker)
        users(server, worker)

    return post_fork


def _post_worker_init(users: Hook, _: object) -> Hook:
    def post_worker_init(worker: Worker) -> None:
        users(worker)  # may still replace signal handlers, which ours then wrap
        entry_points.initialised()

    return post_worker_init


def _worker_exit(users: Hook, _: object) -> Hook:
    def worker_exit(server: Arbiter, worker: Worker) -> None:
        try:
            users(server, worker)
        finally:
            entry_points.worker_exiting(worker)

    return worker_exit


def _on_exit(users: Hook, _: object) -> Hook:
    def on_exit(server: Arbiter) -> None:
        reason = sys.exc_info()[1]  # halt() runs while it handles the exception that caused it
        try:
            users(server)
        finally:
            entry_points.exiting(server, reason)

    return on_exit


_HOOKS: dict[str, Callable[[Hook, Callable[[], Settings]], Hook]] = {
    "nworkers_changed": _nworkers_changed,
    "on_starting": _on_starting,
    "pre_fork": _pre_fork,
    "post_fork": _post_fork,
    "post_worker_init": _post_worker_init,
    "worker_exit": _worker_exit,
    "on_exit": _on_exit,
}
