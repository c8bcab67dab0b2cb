"""Django, Flask and FastAPI: no request fails in ten takeovers in a row, and no form is lost."""

from __future__ import annotations

import json
import re
import threading
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import pytest

from demo_app.deploys import Deploys, command
from demo_app.load import LoadProcess, Mix
from tests.support.gunicorns import gunicorn, successor, up

pytestmark = pytest.mark.long

if TYPE_CHECKING:
    from typing_extensions import Self

APPS = Path(__file__).resolve().parents[1] / "support" / "apps"
TAKEOVERS = 10
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Posts:
    """Posts forms, one after the other over a connection that is kept alive, from a thread."""

    def __init__(self, address: str, framework: str) -> None:
        host, _, port = address.rpartition(":")
        self._connection = HTTPConnection(host, int(port), timeout=30)
        self._framework = framework
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answered = 0
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        try:
            while not self._over.wait(0.01):
                self._post(f"number {self.answered}")
                self.answered += 1
        except Exception as error:  # noqa: BLE001  # told to the test
            self.error = error

    def _post(self, name: str) -> None:
        if self._framework == "fastapi":
            headers = {"Content-Type": "application/json"}
            said = json.loads(self._ask("POST", json.dumps({"name": name}), headers))["said"]
        elif self._framework == "django":
            page = self._ask("GET", None, {})
            (token,) = re.findall('name="csrfmiddlewaretoken" value="([^"]+)"', page)
            fields = {"name": name, "csrfmiddlewaretoken": token}
            headers = {**FORM, "Cookie": f"csrftoken={self._cookie}"}
            said = self._ask("POST", urlencode(fields), headers)
        else:
            said = self._ask("POST", urlencode({"name": name}), FORM)
        assert said == f"Hello, {name}"

    def _ask(self, method: str, body: str | None, headers: dict[str, str]) -> str:
        """The connection is made anew only where the answer before had said that it closes."""
        self._connection.request(method, "/greet", body, headers)
        response = self._connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        cookie = response.getheader("Set-Cookie", "")
        if cookie.startswith("csrftoken="):
            self._cookie = cookie.removeprefix("csrftoken=").partition(";")[0]
        return text


@pytest.mark.parametrize(
    ("framework", "server"),
    [
        ("django", "gthread"),
        ("flask", "gthread"),
        ("fastapi", "asgi"),
        ("fastapi", "uvicorn"),
        ("fastapi", "hotrestart-uvicorn"),
    ],
)
def test_no_request_fails(place: Deploys, address: str, framework: str, server: str) -> None:
    """One-shot and kept-alive, pages and forms."""
    if server == "hotrestart-uvicorn":
        args = [*command("uvicorn", address), "--app-dir", str(APPS)]
    else:
        args = [*gunicorn(server, address), "--pythonpath", str(APPS)]
    args = [f"{framework}_app:app" if arg in ("app:app", "wsgi:app") else arg for arg in args]
    current = up(place, args)
    with (
        LoadProcess(address, Mix(one_shot=4, keep_alive=4)) as load,
        Posts(address, framework) as posts,
    ):
        load.wait(answers=100)
        for _ in range(TAKEOVERS):
            before, current = posts.answered, successor(place, current, args)
            load.wait(answers=50)
            assert posts.error is None, posts.error
            assert posts.answered > before
        report = load.stop()
    assert not report.failures, report
    assert not report.closed_idle, report
