"""A gunicorn that has renamed what this package uses of its workers: each name in its turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from demo_app.deploys import DEADLINE, TOOK_OVER, Deploys
from demo_app.load import LoadProcess, Mix
from hotrestart_plugins.gunicorn._compat.table import Feature, Name
from hotrestart_plugins.gunicorn._compat.workers import BY_CLASS
from tests.support.gunicorns import QUICK, gunicorn, only_line, start, up
from tests.support.raw import ask
from tests.support.renamed import renamed

_WORKERS = {
    "gunicorn.workers.sync.SyncWorker": "sync",
    "gunicorn.workers.gthread.ThreadWorker": "gthread",
    "gunicorn.workers.ggevent.GeventWorker": "gevent",
    "gunicorn.workers.gtornado.TornadoWorker": "tornado",
    "gunicorn.workers.gasgi.ASGIWorker": "asgi",
    "uvicorn_worker._workers.UvicornWorker": "uvicorn",
}
_QUICK = {
    ("sync", "notify"),
    ("sync", "wait_fds"),
    ("gthread", "must_close"),
    ("gthread", "keepalived_conns"),
    ("asgi", "_awaiting_request"),
}
"""One for each of the ways in which a missing name matters."""
_CUT_OFF = {
    ("tornado", Feature.PAUSE),
    ("asgi", Feature.PAUSE),
    ("uvicorn", Feature.PAUSE),
    ("tornado", Feature.CLOSE),
}
"""Without these features idle connections are closed, as at a stop of the plain server."""


def _rows() -> Iterator[ParameterSet]:
    for path, names in BY_CLASS.items():
        worker = _WORKERS.get(path)
        for name in names if worker is not None else ():
            marks = [] if (worker, name.attribute) in _QUICK else [pytest.mark.long]
            row = f"{worker}-{name.owner.rpartition('.')[2]}.{name.attribute}"
            yield pytest.param(worker, name, id=row, marks=marks)


@pytest.mark.once
@pytest.mark.parametrize(("worker", "name"), list(_rows()))
def test_without_a_name_it_serves_and_drains(
    place: Deploys, address: str, tmp_path: Path, worker: str, name: Name
) -> None:
    """No request fails, the old instance ends with 0, and each says once what is switched off."""
    args = gunicorn("gevent" if worker == "tornado" else worker, address)
    if worker == "tornado":
        args += ["-k", "tornado"]
    env = {**renamed(name.owner, name.attribute, tmp_path), "PYTHONWARNINGS": ""}
    if name.feature is Feature.PROBE:
        env["HOTRESTART_PROBE"] = "/"
    if name.feature is Feature.HOT_RESTART:
        old = start(place, args, **env)
        old.wait_for(name.feature.value)
        old.wait_for("Booting worker with pid")
        assert ask(address).status == 200
        assert old.stop() == 0
        return
    old = up(place, args, **env)
    keep_alive = 0 if (worker, name.feature) in _CUT_OFF else 4
    with LoadProcess(address, Mix(one_shot=2, keep_alive=keep_alive)) as load:
        load.wait(answers=20)
        new = start(place, args, **{**QUICK, **env})
        new.wait_for(TOOK_OVER)
        assert old.wait(DEADLINE) == 0, old.log
        load.wait(answers=20)
        report = load.stop()
    # uvicorn drops connections that were accepted and not read when it is stopped at once.
    assert not report.failures or (worker, name.feature) == ("uvicorn", Feature.PAUSE), report
    for instance in (old, new):
        line = only_line(instance.log, f"{name.owner}.{name.attribute}")
        assert name.feature.value in line
        assert "Traceback" not in instance.log
