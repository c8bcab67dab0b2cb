"""The catalogue of events: all that this package ever says about a running instance.

Each event has a name, a level, a sentence with the event's fields in it, and, if it is a step of a
takeover, the name of that step in the handover record. A log line and a step of the record are two
views of the same event; nothing writes either of them in another way.
"""

from __future__ import annotations

import logging
import string
from dataclasses import dataclass
from typing import Any, Protocol


class Logger(Protocol):
    """What is needed of a logger. The standard library's and gunicorn's have it."""

    def debug(self, msg: str, *args: Any, exc_info: Any = None) -> None:
        """Details: each listener."""

    def info(self, msg: str, *args: Any, exc_info: Any = None) -> None:
        """Each step of a takeover."""

    def warning(self, msg: str, *args: Any, exc_info: Any = None) -> None:
        """Something went differently; this instance copes with it."""

    def error(self, msg: str, *args: Any, exc_info: Any = None) -> None:
        """Somebody has to look at it."""


@dataclass(frozen=True)
class Event:
    """One row of the catalogue."""

    name: str
    """Stable, for programs: lower case, words joined by underscores."""
    level: str
    """A method of `Logger`: debug, info, warning or error. Empty: not in the log."""
    sentence: str
    """With a replacement field (`str.format`) for each of the event's fields."""
    step: str = ""
    """The step in the handover record; empty: not in the record."""
    outcome: str = ""
    """What the record's outcome is from then on; empty: as before."""

    @property
    def fields(self) -> frozenset[str]:
        """The names of the values that belong to it."""
        parts = string.Formatter().parse(self.sentence)
        return frozenset(name for _, name, _, _ in parts if name)

    def text(self, **fields: object) -> str:
        """The sentence. Control characters in a value cannot forge a second line."""
        return self.sentence.format(**{name: printable(value) for name, value in fields.items()})


def printable(value: object) -> object:
    """`value` itself if it is a number, else its text without control characters."""
    if isinstance(value, (int, float)):
        return value
    text = str(value)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)


def write(
    logger: Logger,
    event: Event,
    /,
    *,
    traceback: BaseException | None = None,
    **fields: object,
) -> None:
    """Write the event's line to the log, if it has one. `Journal.emit` is what to call."""
    if not event.level:
        return
    # A takeover of a thousand listeners has thousands of details, which mostly nobody reads.
    if (
        event.level == "debug"
        and isinstance(logger, logging.Logger)
        and not logger.isEnabledFor(logging.DEBUG)
    ):
        return
    log = getattr(logger, event.level)
    if traceback is None:
        log("%s", event.text(**fields))
    else:
        log("%s", event.text(**fields), exc_info=traceback)


# -- a new instance, in the order in which it comes to them ----------------------------------------

WAITING_FOR_TURN = Event(
    "waiting_for_turn",
    "info",
    "Waiting up to {seconds:g} s for pid {pid} to finish its takeover",
)
INSTANCE_FOUND = Event(
    "instance_found",
    "debug",
    "Found a running instance in {directory}",
)
NO_INSTANCE_FOUND = Event("no_instance_found", "debug", "Found no running instance in {directory}")
STARTED = Event("started", "", "Started", step="started")
NO_DIRECTORY = Event(
    "no_directory",
    "warning",
    "With port 0 there is no default directory, so this instance cannot be replaced: {option}",
)
LISTENER_MISSING = Event("listener_missing", "debug", "pid {pid} does not listen on {address}")
LISTENER_RECEIVED = Event("listener_received", "debug", "Inherited {address} from pid {pid}")
LISTENER_INHERITED = Event("listener_inherited", "info", "Inherited {address} from pid {pid}")
LISTENERS_INHERITED = Event(
    "listeners_inherited", "", "Inherited or bound every listener", step="listeners inherited"
)
OLD_INSTANCE_CHANGED = Event(
    "old_instance_changed",
    "warning",
    "pid {pid} exited; taking over from the instance that serves now",
)
OLD_INSTANCE_ENDED = Event(
    "old_instance_ended",
    "warning",
    "The old instance (pid {pid}) exited; starting without it",
)
ADDRESS_IN_USE = Event(
    "address_in_use",
    "info",
    "{error}, which may be a worker of a killed instance; waiting (--takeover-timeout)",
)
READY = Event("ready", "", "Ready", step="ready")
TOOK_OVER = Event("took_over", "info", "Took over from pid {pid}")
OLD_INSTANCE_UNTOLD = Event(
    "old_instance_untold", "warning", "pid {pid} exited before it could be told to stop accepting"
)
TAKEN_OVER = Event("taken_over", "", "Taken over", outcome="taken over")
TAKEOVER_FAILED = Event(
    "takeover_failed",
    "error",
    "Takeover failed: {reason}; the running instance (pid {pid}) keeps serving",
    outcome="failed",
)
START_FAILED = Event("start_failed", "error", "Start failed: {reason}", outcome="failed")
OVERTAKEN = Event("overtaken", "info", "Overtaken by pid {pid}", outcome="overtaken")
APP_FAILED = Event("app_failed", "error", "The app failed to start")
WORKER_START_FAILED = Event(
    "worker_start_failed", "error", "Worker [{pid}] failed to start: {error}"
)
RUNNING = Event("running", "info", "Uvicorn running on {place} (Press CTRL+C to quit)")
HOT_RESTART_READY = Event("hot_restart_ready", "info", "Hot restart: ready")


# -- the running instance --------------------------------------------------------------------------

TAKEOVER_STARTED = Event("takeover_started", "info", "Takeover started by pid {pid}")
OTHER_PID_NAMESPACE = Event(
    "other_pid_namespace",
    "warning",
    "The new instance is in another pid namespace, so its exit is noticed late; let both share one",
)
LISTENER_GIVEN = Event("listener_given", "debug", "Sent the listener on {address} to pid {pid}")
LISTENER_REFUSED = Event(
    "listener_refused", "debug", "Told pid {pid} that this instance does not listen on {address}"
)
ANSWER_FAILED = Event(
    "answer_failed", "warning", "Could not answer the request of pid {pid} for {address}: {error}"
)
DATAGRAM_DROPPED = Event(
    "datagram_dropped", "warning", "Dropped a datagram from pid {pid}: {reason}"
)
DATAGRAM_DROPPED_AGAIN = Event(
    "datagram_dropped_again", "debug", "Dropped a datagram from pid {pid}: {reason}"
)
REQUEST_FAILED = Event(
    "request_failed",
    "error",
    "Error while handling a datagram from pid {pid}; this instance keeps serving",
)
SOCKET_UNREADABLE = Event("socket_unreadable", "error", "Could not read the parent socket: {error}")
NEW_INSTANCE_FAILED = Event(
    "new_instance_failed",
    "warning",
    "pid {pid} exited before it had taken over; this instance keeps serving",
    outcome="failed",
)
TAKEOVER_GIVEN_UP = Event(
    "takeover_given_up",
    "",
    "The new instance exited before it had taken over",
    outcome="failed",
)

# -- at any time -----------------------------------------------------------------------------------

NAMES_MISSING = Event("names_missing", "warning", "{server} has no {names}: {instead}")
FAULT = Event("fault", "error", "Error in hotrestart_plugins; this instance keeps serving")

# -- the old instance ------------------------------------------------------------------------------

REPLACED = Event("replaced", "info", "pid {pid} has taken over")
ADDRESS_DROPPED = Event(
    "address_dropped",
    "warning",
    "pid {pid} does not use {address}; it will be closed when this process exits",
)
STOPPED_ACCEPTING = Event(
    "stopped_accepting", "info", "Stopped accepting; draining", step="stopped accepting"
)
CLOSE_NOT_ANNOUNCED = Event(
    "close_not_announced", "error", "Could not announce the close of a connection"
)
DRAIN_STARTED = Event("drain_started", "", "Draining")
DRAIN_ENDED = Event("drain_ended", "", "Drained", step="drained")
DRAINED = Event("drained", "info", "Drained: {stats}; exiting")
DRAIN_TIMED_OUT = Event("drain_timed_out", "warning", "The drain timeout ended: aborted {aborted}")
DRAIN_FAILED = Event("drain_failed", "error", "Error while draining")
REPLACEMENT_FAILED = Event(
    "replacement_failed",
    "error",
    "Error during the takeover; draining and exiting",
)
WORKER_KILLED = Event(
    "worker_killed", "warning", "Worker [{pid}] did not drain in time; killing it"
)
LATE_WORKER_KILLED = Event(
    "late_worker_killed", "info", "Worker [{pid}] was started after the takeover; killing it"
)
COMMAND_FAILED = Event(
    "command_failed", "error", "Worker [{pid}] could not {command}; draining and exiting"
)
SUPERVISOR_ENDED = Event(
    "supervisor_ended", "warning", "The supervisor exited; worker [{pid}] drains and exits"
)
MASTER_ENDED = Event("master_ended", "info", "The master exited; shutting down {worker}")
SIGNAL_IGNORED = Event(
    "signal_ignored", "warning", "Ignored {signal}: another instance has taken over"
)
NEW_INSTANCE_LEFT = Event(
    "new_instance_left", "info", "pid {pid} was stopped on purpose; not rolling back"
)
NEW_INSTANCE_ENDED_LATE = Event(
    "new_instance_ended_late",
    "info",
    "pid {pid} exited after the rollback window; not rolling back",
)
NEW_INSTANCE_CRASHED = Event(
    "new_instance_crashed",
    "error",
    "pid {pid} crashed after it had taken over; this instance serves again",
)
CLAIM_NOT_EXCLUSIVE = Event(
    "claim_not_exclusive", "warning", "Deciding who serves without the lock: {error}"
)
NAME_NOT_TAKEN_BACK = Event(
    "name_not_taken_back", "error", "Could not take the parent socket back: {error}"
)
ACCEPTING_AGAIN = Event(
    "accepting_again",
    "warning",
    "Accepting again",
    step="accepting again",
    outcome="rolled back",
)
FEWER_WORKERS = Event(
    "fewer_workers",
    "warning",
    "{left} of {wanted} workers are left; new ones would run the code that is on disk "
    "now. {remedy}",
)

# -- connections that are handed over --------------------------------------------------------------

HANDOVER_FAILED = Event(
    "handover_failed", "warning", "Connection handover failed, connections stay here: {error}"
)
HANDOVER_TIMED_OUT = Event(
    "handover_timed_out",
    "warning",
    "Connection handover failed, connections stay here: no reply within {seconds:g} s",
)
RECEIVER_FAILED = Event(
    "receiver_failed", "info", "Could not listen for connections at {path}: {error}"
)
ADOPTION_FAILED = Event("adoption_failed", "warning", "Could not receive connections: {error}")
DESCRIPTORS_REFUSED = Event(
    "descriptors_refused",
    "warning",
    "Closed descriptors that are not TCP or Unix connections: {kinds}",
)
HANDOVER_FAULT = Event("handover_fault", "error", "Error during the connection handover")
CHANNEL_DROPPED = Event("channel_dropped", "warning", "Dropped a handover channel: {error}")

# -- gunicorn --------------------------------------------------------------------------------------

STARTED_BY_USR2 = Event("started_by_usr2", "info", "Started by USR2 from pid {pid}")
STARTED_BY_USR2_ALONE = Event(
    "started_by_usr2_alone",
    "warning",
    "Started by USR2 from pid {pid}; hot restart is off in this instance (hotrestart_manual_usr2)",
)
CONFIGURATION_REFUSED = Event("configuration_refused", "error", "{error}")
SETTINGS_UNCHANGED = Event("settings_unchanged", "error", "{error}; keeping the previous settings")
ADDRESSES_UNCHANGED = Event(
    "addresses_unchanged", "error", "{error}; keeping the previous addresses"
)
DIRECTORY_UNCHANGED = Event(
    "directory_unchanged",
    "warning",
    "The next instance would look for this one in {named}, but this one stays in "
    "{directory}: set hotrestart_dir to that, or no instance can take over from it",
)
PRELOAD_TIMED_OUT = Event(
    "preload_timed_out",
    "error",
    "Start failed: the app was not loaded within {seconds:g} s (hotrestart_ready_timeout)",
)
CANNOT_PAUSE = Event(
    "cannot_pause",
    "warning",
    "Workers of class {worker_class} cannot stop accepting without exiting: a takeover "
    "stops them at once, and they cannot serve again if the new instance crashes",
)
OWN_SERVERS = Event(
    "own_servers",
    "warning",
    "Workers of class {worker_class} make their own servers: a takeover stops them at "
    "once, and they cannot serve again if the new instance crashes",
)
WORKER_NOT_READY = Event("worker_not_ready", "error", "{error}")


# -- the record ------------------------------------------------------------------------------------

RECORD_FAILED = Event(
    "record_failed", "warning", "Could not write the takeover record {path}: {error}"
)

CATALOGUE = tuple(value for value in list(globals().values()) if isinstance(value, Event))
"""All of them, in the order of this file."""
