"""Every undocumented name of uvicorn that this package uses, and what needs it."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence

from hotrestart_plugins.core import events
from hotrestart_plugins.core.journal import Journal
from hotrestart_plugins.uvicorn._compat.table import Feature, Name, missing

_HTTP = "uvicorn.protocols.http"
_H11 = f"{_HTTP}.h11_impl"
_HTTPTOOLS = f"{_HTTP}.httptools_impl"
_HTTP2 = f"{_HTTP}.zttp_h2_impl"
_SERVER = "uvicorn.server.Server"
_STATE = "uvicorn.server.ServerState"
_CONFIG = "uvicorn.config.Config"
_LIFESPAN = "uvicorn.lifespan.on.LifespanOn"
_SUPERVISOR = "uvicorn.supervisors.multiprocess.Multiprocess"
_PROCESS = "uvicorn.supervisors.multiprocess.Process"

_ALL = Feature.HOT_RESTART
_WORKERS = Feature.SUPERVISOR
_HANDOVER = Feature.CONNECTION_HANDOVER
_CLOSE = Feature.ANNOUNCE_CLOSE
_STREAMS = Feature.EVENT_STREAMS
_COUNT = Feature.STATISTICS


def _rows(owner: str, attribute: str, *features: Feature, since: str = "") -> Sequence[Name]:
    return [Name(owner, attribute, feature, since) for feature in features]


def _protocol(module: str, protocol: str, attribute: str, *features: Feature) -> Sequence[Name]:
    return _rows(f"{module}.{protocol}", attribute, *features)


def _cycle(module: str, attribute: str, *features: Feature) -> Sequence[Name]:
    return _rows(f"{module}.RequestResponseCycle", attribute, *features)


NAMES: Sequence[Name] = (
    *_rows(_SERVER, "startup", _ALL),
    *_rows(_SERVER, "shutdown", _ALL),
    *_rows(_SERVER, "started", _ALL),
    *_rows(_SERVER, "servers", _ALL),
    *_rows(_SERVER, "server_state", _ALL),
    *_rows(_SERVER, "lifespan", _ALL),
    *_rows(_SERVER, "force_exit", _ALL),
    *_rows(_SERVER, "limit_max_requests", Feature.REQUEST_LIMIT, since="0.38"),
    *_rows(_SERVER, "handle_exit", Feature.QUICK_CTRL_C),
    *_rows(_SERVER, "on_tick", Feature.GUNICORN_WORKER),
    *_rows(_SERVER, "capture_signals", Feature.GUNICORN_WORKER, since="0.29"),
    *_rows(_SERVER, "_captured_signals", Feature.GUNICORN_WORKER, since="0.29"),
    *_rows(_STATE, "connections", _ALL),
    *_rows(_STATE, "tasks", _ALL),
    *_rows(_STATE, "default_headers", _CLOSE),
    *_rows(_STATE, "total_requests", _COUNT, Feature.REQUEST_LIMIT),
    *_rows(_CONFIG, "http_protocol_class", _ALL),
    *_rows(_CONFIG, "ws_protocol_class", Feature.WEBSOCKETS, _CLOSE),
    *_rows(_CONFIG, "encoded_headers", _CLOSE),
    *_rows(_CONFIG, "loaded_app", _STREAMS),
    *_rows(_CONFIG, "loaded", _ALL),
    *_rows(_CONFIG, "load", _ALL),
    *_rows(_CONFIG, "ssl", _ALL),
    *_rows(_LIFESPAN, "startup", _ALL),
    *_rows(_LIFESPAN, "shutdown", _ALL),
    *_rows(_LIFESPAN, "should_exit", _ALL),
    *_rows(_LIFESPAN, "state", _ALL),
    *_rows("uvicorn.supervisors.multiprocess", "Process", _WORKERS),
    *_rows(_SUPERVISOR, "sockets", _WORKERS),
    *_rows(_SUPERVISOR, "should_exit", _WORKERS),
    *_rows(_SUPERVISOR, "processes", _WORKERS, since="0.30"),
    *_rows(_SUPERVISOR, "processes_num", _WORKERS, since="0.30"),
    *_rows(_SUPERVISOR, "signal_queue", _WORKERS, since="0.30"),
    *_rows(_SUPERVISOR, "init_processes", _WORKERS, since="0.30"),
    *_rows(_SUPERVISOR, "terminate_all", _WORKERS, since="0.30"),
    *_rows(_SUPERVISOR, "join_all", _WORKERS, since="0.30"),
    *_rows(_SUPERVISOR, "keep_subprocess_alive", _WORKERS, since="0.30"),
    *_rows(_SUPERVISOR, "handle_signals", _WORKERS, since="0.30"),
    *_rows(_PROCESS, "process", _WORKERS),
    *_rows(_PROCESS, "server", _WORKERS),
    *_rows(_PROCESS, "start", _WORKERS),
    *_protocol(_H11, "H11Protocol", "shutdown", _ALL),
    *_protocol(_H11, "H11Protocol", "transport", _HANDOVER, _COUNT),
    *_protocol(_H11, "H11Protocol", "cycle", _HANDOVER, _CLOSE, _STREAMS, _COUNT),
    *_protocol(_H11, "H11Protocol", "conn", _HANDOVER),
    *_protocol(_H11, "H11Protocol", "on_response_complete", _HANDOVER),
    *_protocol(_H11, "H11Protocol", "timeout_keep_alive", _HANDOVER),
    *_protocol(_H11, "H11Protocol", "timeout_keep_alive_task", _HANDOVER),
    *_protocol(_H11, "H11Protocol", "timeout_keep_alive_handler", _HANDOVER),
    *_protocol(_HTTPTOOLS, "HttpToolsProtocol", "cycle", _HANDOVER, _CLOSE, _STREAMS, _COUNT),
    *_protocol(_HTTPTOOLS, "HttpToolsProtocol", "pipeline", _HANDOVER),
    *_protocol(_HTTPTOOLS, "HttpToolsProtocol", "scope", _HANDOVER),
    *_protocol(_HTTP2, "ZttpH2Protocol", "cycles", _CLOSE, _STREAMS, _COUNT),
    *_protocol(_HTTP2, "ZttpH2Protocol", "conn", _CLOSE),
    *_protocol(_HTTP2, "ZttpH2Protocol", "flush", _CLOSE),
    *_cycle(_H11, "response_started", _CLOSE),
    *_cycle(_H11, "response_complete", _HANDOVER, _COUNT),
    *_cycle(_H11, "default_headers", _CLOSE),
    *_cycle(_H11, "keep_alive", _HANDOVER, _STREAMS),
    *_cycle(_H11, "on_response", _HANDOVER),
    *_cycle(_H11, "disconnected", _STREAMS),
    *_cycle(_HTTPTOOLS, "more_body", _HANDOVER),
    *_cycle(_HTTPTOOLS, "scope", _HANDOVER),
)
"""The table. What every parser has alike stands there once, with h11, which is always installed."""


@functools.cache
def features_off() -> Mapping[Feature, Sequence[Name]]:
    """Return what the installed uvicorn cannot be used for, with the names that it lacks."""
    return missing(NAMES)


def has(feature: Feature) -> bool:
    """Whether the installed uvicorn has every name that the feature needs."""
    return feature not in features_off()


def lacks(attribute: str) -> bool:
    """Whether a name of the table is missing, whatever it is needed for."""
    return any(name.attribute == attribute for rows in features_off().values() for name in rows)


def say_what_is_missing(journal: Journal) -> None:
    """Say in one line what the installed uvicorn lacks, and what happens instead, if anything."""
    off = features_off()
    if off:
        names = sorted({str(name) for rows in off.values() for name in rows})
        journal.emit(
            events.NAMES_MISSING,
            server=f"uvicorn {importlib.metadata.version('uvicorn')}",
            names=", ".join(names),
            instead="; ".join(feature.value for feature in Feature if feature in off),
        )
