"""The demo app for gunicorn (plain WSGI, no framework): the twin of app.py, without WebSockets.

    cd demo_app && gunicorn -k gthread --threads 16 wsgi:app

Start it, start it again with DEMO_VERSION=2, and watch the pid and the version change.
To see what a failed deployment does, set DEMO_FAIL for the second start:

    import    raises while it is imported
    hang      never finishes its import
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

VERSION = os.environ.get("DEMO_VERSION", "1")
FAIL = os.environ.get("DEMO_FAIL", "")
SINCE = datetime.now(timezone.utc).isoformat(timespec="milliseconds")

requests_seen = itertools.count(1)  # next() is atomic: threads need no lock

if FAIL == "import":
    raise RuntimeError("DEMO_FAIL=import: this version cannot be imported")
while FAIL == "hang":
    time.sleep(60)  # DEMO_FAIL=hang: for ever, where gevent would notice that no event can come

Environ = dict[str, Any]
Answer = tuple[str, Iterable[bytes]]  # content type, body


def number(environ: Environ, name: str, default: float, most: float) -> float:
    """The query parameter `name`, from 0 to `most`."""
    value = parse_qs(environ.get("QUERY_STRING", "")).get(name, [default])[0]
    return min(max(0.0, float(value)), most)


def json_answer(**fields: object) -> Answer:
    return "application/json", [json.dumps(fields).encode()]


def who(environ: Environ) -> Answer:
    port = environ.get("REMOTE_PORT")
    return json_answer(
        pid=os.getpid(),
        version=VERSION,
        since=SINCE,
        requests=environ["demo.request"],
        client_port=int(port) if port else None,
    )


def slow(environ: Environ) -> Answer:
    time.sleep(number(environ, "seconds", default=1, most=60))
    return who(environ)


def upload(environ: Environ) -> Answer:
    size, digest = 0, hashlib.sha256()
    while piece := environ["wsgi.input"].read(65536):
        size += len(piece)
        digest.update(piece)
    return json_answer(pid=os.getpid(), bytes=size, sha256=digest.hexdigest())


def events(environ: Environ) -> Answer:
    """Server-sent events, ten a second: without ?count=N there is no last one."""
    endless = "count=" not in environ.get("QUERY_STRING", "")
    count = int(number(environ, "count", default=0, most=1_000_000))

    def stream() -> Iterator[bytes]:
        for event in itertools.count() if endless else range(count):
            yield f"data: {json.dumps({'pid': os.getpid(), 'event': event})}\n\n".encode()
            time.sleep(0.1)

    return "text/event-stream", stream()


def health(_environ: Environ) -> Answer:
    return "text/plain", [b"ok\n"]


ROUTES: dict[tuple[str, str], Callable[[Environ], Answer]] = {
    ("GET", "/"): who,
    ("GET", "/slow"): slow,
    ("POST", "/upload"): upload,
    ("GET", "/events"): events,
    ("GET", "/health"): health,
}


def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    environ["demo.request"] = next(requests_seen)
    route = ROUTES.get((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
    status = HTTPStatus.OK if route else HTTPStatus.NOT_FOUND
    try:
        content_type, body = route(environ) if route else ("text/plain", [b"not found\n"])
    except ValueError as error:
        status, content_type, body = HTTPStatus.BAD_REQUEST, "text/plain", [f"{error}\n".encode()]
    headers = [("Content-Type", content_type), ("X-Served-By", str(os.getpid()))]
    if isinstance(body, list):
        headers.append(("Content-Length", str(sum(map(len, body)))))
    start_response(f"{status.value} {status.phrase}", headers)
    return body
