"""Real clients, and a real proxy, through takeovers in a row: no failure, and no reconnect."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import requests

from demo_app.deploys import DEADLINE, TOOK_OVER, UP, Deploys, Instance, command, free_port
from demo_app.load import LoadProcess, Mix
from tests.support.browser import Browser, program
from tests.support.instances import QUICK
from tests.support.raw import Connection, ask, request

pytestmark = pytest.mark.long

if TYPE_CHECKING:
    from typing_extensions import Self

TAKEOVERS = 20
CLIENTS = 8  # of the proxy

# Root's nginx would not reach a Unix socket in a directory of root's; others' do not mind the line.
NGINX = """
user root;
daemon off;
worker_processes 1;
pid {here}/nginx.pid;
error_log {here}/error.log warn;
events {{ worker_connections 256; }}
http {{
    log_format tries '$status $upstream_addr';
    access_log {here}/access.log tries;
    client_body_temp_path {here}/body;
    proxy_temp_path {here}/proxy;
    fastcgi_temp_path {here}/fastcgi;
    uwsgi_temp_path {here}/uwsgi;
    scgi_temp_path {here}/scgi;
    keepalive_requests 1000000;
    upstream app {{
        server {upstream};
        keepalive 16;
        keepalive_requests 1000000;
        keepalive_timeout 600;
    }}
    server {{
        listen {address};
        location = /up {{ access_log off; return 200 "up"; }}
        location / {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_request_buffering off;
        }}
    }}
}}
"""


def server(address: str) -> list[str]:
    """A server that keeps idle connections for long."""
    return command("uvicorn", address, "--timeout-keep-alive", "600")


def up(place: Deploys, args: list[str]) -> Instance:
    instance = place.start(args, **QUICK)
    instance.wait_for(*UP)
    return instance


def takeovers(place: Deploys, args: list[str], current: Instance) -> Iterator[Instance]:
    """Replace the instance again and again: each new one, when the old one has gone."""
    for _ in range(TAKEOVERS):
        old, current = current, place.start(args, **QUICK)
        current.wait_for(TOOK_OVER)
        assert old.wait() == 0, old.log
        old.close()
        yield current


class Asking:
    """A client that asks again and again, in a thread: what it was answered."""

    def __init__(self, ask: Callable[[], dict[str, int]]) -> None:
        self._ask = ask
        self._told = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stopped = False
        self.answers: list[dict[str, int]] = []
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped = True
        self._thread.join(DEADLINE)

    def _run(self) -> None:
        while not self._stopped and self.failure is None:
            try:
                self.answers.append(self._ask())
            except BaseException as error:  # noqa: BLE001 (whatever it is, the client has failed)
                self.failure = error
            with self._told:
                self._told.notify_all()

    def wait_for(self, pid: int) -> None:
        """Until this process answers."""

        def answers() -> bool:
            return bool(self.failure or (self.answers and self.answers[-1]["pid"] == pid))

        with self._told:
            assert self._told.wait_for(answers, DEADLINE), f"no answer by pid {pid}"
        assert self.failure is None, self.failure


def stays_connected(place: Deploys, args: list[str], ask: Callable[[], dict[str, int]]) -> None:
    """The client that asks in this way is answered by each instance, on one connection."""
    current = up(place, args)
    with Asking(ask) as client:
        client.wait_for(current.pid)
        for instance in takeovers(place, args, current):
            client.wait_for(instance.pid)
    assert client.failure is None
    assert len({answer["client_port"] for answer in client.answers}) == 1
    assert len({answer["pid"] for answer in client.answers}) == TAKEOVERS + 1


def test_httpx(place: Deploys, address: str) -> None:
    with httpx.Client(timeout=DEADLINE, trust_env=False) as client:

        def ask() -> dict[str, int]:
            found: dict[str, int] = client.get(f"http://{address}/").raise_for_status().json()
            return found

        stays_connected(place, server(address), ask)


def test_requests(place: Deploys, address: str) -> None:
    with requests.Session() as client:
        client.trust_env = False

        def ask() -> dict[str, int]:
            answer = client.get(f"http://{address}/", timeout=DEADLINE)
            answer.raise_for_status()
            found: dict[str, int] = answer.json()
            return found

        stays_connected(place, server(address), ask)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(place: Deploys, address: str) -> None:
    """One command with many URLs: it connects once. A line for each of them."""
    args = server(address)
    current = up(place, args)
    urls = f"http://{address}/?[1-10000000]"
    line = "%{http_code} %{num_connects} %header{x-served-by}"
    curl = subprocess.Popen(
        [
            "curl",
            "-q",
            "-sS",
            "--noproxy",
            "*",
            "-o",
            os.devnull,
            "-w",
            f"%{{stderr}}{line}\n",
            urls,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert curl.stderr is not None
    lines = []

    def ask() -> dict[str, int]:
        assert curl.stderr is not None
        lines.append(curl.stderr.readline())
        status, connects, pid = map(int, lines[-1].split())
        assert status == 200
        return {"pid": pid, "connects": connects}

    try:
        with Asking(ask) as client:
            client.wait_for(current.pid)
            for instance in takeovers(place, args, current):
                client.wait_for(instance.pid)
        assert client.failure is None, (client.failure, lines[-1])
    finally:
        curl.kill()
        curl.wait()
        curl.stderr.close()
    assert sum(answer["connects"] for answer in client.answers) == 1
    assert len({answer["pid"] for answer in client.answers}) == TAKEOVERS + 1


@pytest.mark.skipif(program() is None, reason="needs chromium-headless-shell, or chromium")
def test_a_browser(place: Deploys, address: str, tmp_path: Path) -> None:
    """A page that fetches again and again, from the server that it came from."""
    args = server(address)
    current = up(place, args)
    name = program()
    assert name is not None
    with Browser(name, tmp_path) as browser:
        browser.open(f"http://{address}/")
        browser.run(
            """
            seen = {answers: 0, pids: {}, ports: {}, failures: [], stop: false};
            asking = (async () => {
                while (!seen.stop) {
                    try {
                        const answer = await fetch('/?' + seen.answers, {cache: 'no-store'});
                        const told = await answer.json();
                        if (answer.status != 200) throw answer.status;
                        seen.answers += 1;
                        seen.pids[told.pid] = seen.ports[told.client_port] = true;
                    } catch (error) {
                        seen.failures.push(String(error));
                    }
                }
            })();
            answered_by = (pid) => new Promise((resolve) => {
                const look = () => pid in seen.pids || seen.failures.length
                    ? resolve(true) : setTimeout(look, 5);
                look();
            });
            true
            """
        )
        browser.run(f"answered_by({current.pid})")
        for instance in takeovers(place, args, current):
            browser.run(f"answered_by({instance.pid})")
        browser.run("seen.stop = true; asking")
        seen = browser.run("seen")
    assert not seen["failures"]
    assert len(seen["pids"]) == TAKEOVERS + 1
    assert len(seen["ports"]) == 1, seen


def sockets(pid: int, family: str) -> set[str]:
    """The inodes of a process's sockets of a family: no two sockets have the same."""
    table = [line.split() for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()]
    known = {row[6 if family == "unix" else 9] for row in table[1:]}
    held = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").rstrip("]"))
    return known & held


def connections_to(upstream: str, worker: int) -> set[str]:
    """Those of nginx's worker that lead to the upstream."""
    if upstream.startswith("unix:"):
        return sockets(worker, "unix")
    port = int(upstream.rpartition(":")[2])
    rows = [line.split() for line in Path(f"/proc/{worker}/net/tcp").read_text().splitlines()[1:]]
    led = {row[9] for row in rows if int(row[2].rpartition(":")[2], 16) == port}
    return led & sockets(worker, "tcp")


def connected(upstream: str, worker: int, before: set[str]) -> set[str]:
    """nginx's connections to the upstream, when each client has one."""
    deadline = time.monotonic() + DEADLINE
    while len(found := connections_to(upstream, worker) - before) < CLIENTS:
        assert time.monotonic() < deadline, found
    return found


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
@pytest.mark.parametrize("unix", [False, True])
def test_a_proxy_with_kept_alive_upstreams(place: Deploys, tmp_path: Path, *, unix: bool) -> None:
    """nginx has in the end the very connections to its upstream that it had in the beginning.

    It opens one where none is idle. Before the first takeover each client has one at the same time,
    so that none is ever missing, unless it was lost.
    """
    address = f"127.0.0.1:{free_port()}"
    upstream = f"unix:{place.directory}/app.sock" if unix else f"127.0.0.1:{free_port()}"
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(here=tmp_path, upstream=upstream, address=address))
    args = server(upstream)
    current = up(place, args)
    with started_nginx(config, address) as worker:
        before = connections_to(upstream, worker)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Connection(address)) for _ in range(CLIENTS)]
            head = request("/upload", "Content-Length: 8\r\n").replace(b"GET", b"POST")
            for one in clients:
                one.send(head + b"half")
            first = connected(upstream, worker, before)
            for one in clients:
                one.send(b"full")
            assert [one.answer().status for one in clients] == [200] * CLIENTS
        with LoadProcess(address, Mix(keep_alive=CLIENTS)) as load:
            for instance in takeovers(place, args, current):
                load.wait(pid=instance.pid, timeout=DEADLINE)
            report = load.stop()
        assert connections_to(upstream, worker) - before == first
    assert not report.failures, report
    assert (report.reconnects, report.closed_idle) == (0, 0), report
    assert len(report.by_pid) == TAKEOVERS + 1
    # Each request was tried once, and answered.
    tried = (tmp_path / "access.log").read_text().splitlines()
    assert set(tried) == {f"200 {upstream}"}
    assert len(tried) == report.answered + CLIENTS


@contextlib.contextmanager
def started_nginx(config: Path, address: str) -> Iterator[int]:
    """The pid of its worker."""
    nginx = subprocess.Popen(
        ["nginx", "-c", str(config), "-e", "stderr"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while True:  # it writes no word when it is ready
            assert nginx.poll() is None, (config.parent / "error.log").read_text()
            assert time.monotonic() < deadline
            with contextlib.suppress(ConnectionRefusedError):
                # Its master listens before there is a worker: only an answer shows that one is.
                assert ask(address, "/up").status == 200
                break
        children = Path(f"/proc/{nginx.pid}/task/{nginx.pid}/children").read_text().split()
        yield int(children[0])
    finally:
        nginx.terminate()
        nginx.wait(DEADLINE)
