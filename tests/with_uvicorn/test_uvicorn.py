"""hotrestart-uvicorn: real servers, real load, real kills."""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from demo_app.deploys import TOOK_OVER, UP, Deploys, Instance, command, free_port
from demo_app.load import LoadProcess, Mix
from tests.support import certificates
from tests.support.instances import (
    NO_HANDOVER,
    ONE_OR_MORE,
    QUICK,
    STOPPED,
    answers_once_more,
    finishes,
    successor,
    up,
)
from tests.support.raw import Connection, ask, request

# -- no client notices -----------------------------------------------------------------------------


@pytest.mark.smoke
@ONE_OR_MORE
def test_no_request_fails_in_takeovers_in_a_row(place: Deploys, address: str, server: str) -> None:
    """Every request of every client is answered, and from the moment that an instance has stopped
    accepting, no connection begun later is answered by it."""
    args = command(server, address)
    current = up(place, args)
    mix = Mix(one_shot=16, keep_alive=8, slow=1, upload=1, sse=1)
    with LoadProcess(address, mix) as load:
        load.wait(answers=100)
        stopped: list[tuple[Instance, list[int], float]] = []
        for _ in range(4):
            old, olds = current, [pid for pid in load.report().by_pid if current.owns(pid)]
            current = place.start(args, **QUICK)
            current.wait_for(TOOK_OVER)
            stopped.append((old, olds, old.wait_for(STOPPED)))
            assert old.wait() == 0, old.log
            assert "The supervisor exited" not in old.log
            load.wait(answers=100)
        report = load.stop()
    assert not report.failures, report
    assert (report.reconnects, report.closed_idle) == (0, 0), report
    for _old, olds, moment in stopped:
        for pid in olds:
            assert report.by_pid[pid].last_begun < moment


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("parser", ["h11", "httptools"])
@ONE_OR_MORE
def test_what_is_open_is_answered_once_more(
    place: Deploys, address: str, server: str, loop: str, parser: str
) -> None:
    """Accepted and unread, half read, idle, and under way: each is answered by the old instance,
    the last answer says that the connection closes, and only then it does."""
    args = command(server, address, "--loop", loop, "--http", parser, NO_HANDOVER)
    args += ["--timeout-keep-alive", "60"]
    old = up(place, args)
    with contextlib.ExitStack() as stack:
        unread, half, idle, busy, upload = (
            stack.enter_context(Connection(address)) for _ in range(5)
        )
        half.send(request()[:20])
        assert not idle.get().closes
        busy.send(request("/slow?seconds=1.5"))
        upload.send(request("/upload", "Content-Length: 8\r\n").replace(b"GET", b"POST") + b"half")
        # The last one's answer tells that the others, which came before it, are accepted.
        assert ask(address).status == 200
        new = place.start(args, **QUICK)
        new.wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        unread.send(request())
        half.send(request()[20:])
        idle.send(request())
        upload.send(b"full")
        answers_once_more(old, (unread, half, idle, upload))
        finishes(old, busy)
        assert new.owns(ask(address).pid)
    assert old.wait() == 0


def test_a_websocket_opened_while_draining_works(place: Deploys, address: str) -> None:
    """A handshake on a connection that the old instance holds gets a plain 101, and an echo."""
    args = command("uvicorn", address, NO_HANDOVER)
    old = up(place, args)
    with Connection(address) as unread:
        assert ask(address).status == 200
        place.start(args, **QUICK).wait_for(TOOK_OVER)
        old.wait_for(STOPPED)
        unread.send(
            request(
                "/ws",
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            )
        )
        head = b""
        while b"\r\n\r\n" not in head:
            more = unread.sock.recv(4096)
            assert more, head
            head += more
        assert head.startswith(b"HTTP/1.1 101")
        assert b"connection: close" not in head.lower()
        unread.send(b"\x81\x82\0\0\0\0hi")
        assert unread.sock.recv(4096).endswith(b"hi")


def test_a_drain_ends_at_its_timeout(place: Deploys, address: str) -> None:
    """A client that never sends anything does not keep the old instance for ever."""
    args = command("uvicorn", address, NO_HANDOVER)
    old = up(place, args, HOTRESTART_DRAIN_TIMEOUT="0.5")
    with Connection(address) as silent:
        assert ask(address).status == 200
        successor(place, old, args)
        assert silent.at_end()
    assert "The drain timeout ended: aborted 1 idle connection" in old.log


# -- where it listens ------------------------------------------------------------------------------


@ONE_OR_MORE
def test_a_unix_socket_is_never_gone_and_keeps_its_mode(
    place: Deploys, tmp_path: Path, server: str
) -> None:
    """The path outlives each instance but the last."""
    path = tmp_path / "app.sock"
    args = command(server, f"unix:{path}")
    parent = up(place, args)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    path.chmod(0o660)
    inode = path.stat().st_ino
    failed = place.start(args, DEMO_FAIL="import", **QUICK)
    assert failed.wait() == 3
    child = successor(place, parent, args)
    assert path.stat().st_ino == inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert child.owns(ask(f"unix:{path}").pid)
    child.stop()
    assert not path.exists()


@pytest.mark.ipv6
def test_several_addresses_at_once(place: Deploys, tmp_path: Path) -> None:
    """--bind as often as one likes; what is new is bound fresh, what is gone is let go."""
    v4, v6 = f"127.0.0.1:{free_port()}", f"[::1]:{free_port()}"
    first, second = f"unix:{tmp_path}/first.sock", f"unix:{tmp_path}/second.sock"

    def args(*binds: str) -> list[str]:
        plain = command("uvicorn", "127.0.0.1:1")[:-4]
        return [*plain, *(part for bind in binds for part in ("--bind", bind))]

    old = up(place, args(v4, v6, first))
    new = successor(place, old, args(v4, v6, second))
    assert {ask(one).pid for one in (v4, v6, second)} == {new.pid}
    assert not (tmp_path / "first.sock").exists()


def test_an_abstract_socket_is_named_as_one(place: Deploys) -> None:
    """It has no file, and is no host either."""
    name = f"@hotrestart-{os.getpid()}-{free_port()}"
    instance = up(place, [*command("uvicorn", "127.0.0.1:1")[:-4], "--bind", f"unix:{name}"])
    assert f"Uvicorn running on unix socket {name} " in instance.log


def test_port_0_is_the_same_port_after_a_takeover(place: Deploys) -> None:
    """Where a meeting directory is named; elsewhere it cannot be found, and a line says so."""
    args = command("uvicorn", "127.0.0.1:0")
    old = up(place, args)
    port = old.log.split("http://127.0.0.1:")[1].split()[0]
    new = successor(place, old, args)
    assert ask(f"127.0.0.1:{port}").pid == new.pid
    alone = up(place, args, HOTRESTART_DIR="")
    assert (
        "With port 0 there is no default directory, so this instance cannot be replaced"
        in alone.log
    )


@pytest.mark.parametrize("way", ["--fd", "--bind", "systemd"])
def test_a_given_descriptor(place: Deploys, way: str) -> None:
    """From a service manager, by number or by LISTEN_FDS; TCP stays TCP, with TCP_NODELAY."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        plain = command("uvicorn", address)[:-4]
        more = {"--fd": "--fd 3", "--bind": "--bind fd://3", "systemd": ""}[way]
        script = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" {more}'
        args = ["bash", "-c", script, "bash", *plain]
        old = place.start_passing((listener.fileno(),), args, **QUICK)
        old.wait_for(*UP)
        new = place.start_passing((listener.fileno(),), args, **QUICK)
        new.wait_for(TOOK_OVER)
        assert old.wait() == 0
        assert ask(address).pid == new.pid
        if way != "systemd":  # the same, bound by its own: not the one that was given
            assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@ONE_OR_MORE
def test_tls(place: Deploys, address: str, tmp_path: Path, server: str) -> None:
    """TLS works as in uvicorn, across a takeover; what is wrong with its files is said, and harms
    nobody."""
    key, chain, ca = certificates.issue(tmp_path)
    args = command(server, address, "--ssl-keyfile", str(key), "--ssl-certfile", str(chain))
    old = up(place, args)
    assert f"https://{address}" in old.log
    with LoadProcess(address, Mix(one_shot=4, keep_alive=4), ca_file=ca) as load:
        load.wait(answers=20)
        missing = place.start([*args[:-1], str(tmp_path / "none.pem")], **QUICK)
        assert missing.wait() == 78
        assert f"--ssl-certfile: {tmp_path}/none.pem cannot be read: No such file" in missing.log
        alone = place.start(args[:-2], **QUICK)
        assert alone.wait() == 78
        assert "--ssl-keyfile needs a --ssl-certfile" in alone.log
        wrong = place.start([*args, "--ssl-keyfile", str(chain)], **QUICK)
        assert wrong.wait() == 78
        assert f"--ssl-certfile {chain} cannot be used with --ssl-keyfile {chain}: " in wrong.log
        assert "Traceback" not in missing.log + alone.log + wrong.log
        new = successor(place, old, args)
        load.wait(answers=20)
        report = load.stop()
    assert not report.failures, report
    context = ssl.create_default_context(cafile=ca)
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port))) as sock,
        context.wrap_socket(sock, server_hostname=host),
    ):
        pass
    assert new.running


# -- as uvicorn ------------------------------------------------------------------------------------


def test_options_of_uvicorn_work(place: Deploys, address: str, tmp_path: Path) -> None:
    """--factory, --app-dir, --env-file, --header, --root-path and the rest are uvicorn's own."""
    (tmp_path / "made.py").write_text(
        "import os\n"
        "async def app(scope, receive, send):\n"
        "    assert scope['type'] == 'http'\n"
        "    body = (scope['root_path'] + os.environ['FROM_FILE']).encode()\n"
        "    await send({'type': 'http.response.start', 'status': 200,"
        " 'headers': [(b'x-served-by', str(os.getpid()).encode())]})\n"
        "    await send({'type': 'http.response.body', 'body': body})\n"
        "def make():\n"
        "    return app\n"
    )
    (tmp_path / "env").write_text("FROM_FILE=told\nHOTRESTART_ROLLBACK_WINDOW=0\n")
    more = ["--factory", "--app-dir", str(tmp_path), "--env-file", str(tmp_path / "env")]
    more += ["--root-path", "/under", "--lifespan", "off", "--header", "X-More: 1"]
    args = ["made:make" if part == "app:app" else part for part in command("uvicorn", address)]
    old = place.start([*args, *more])
    old.wait_for(*UP)
    new = place.start([*args, *more])
    new.wait_for(TOOK_OVER)
    assert old.wait() == 0
    answer = ask(address)
    assert (answer.pid, answer.body) == (new.pid, b"/undertold")
    (tmp_path / "env").write_text("HOTRESTART_ROLLBACK_WINDOW=soon\n")
    assert place.start([*args, *more]).wait() == 78
    (tmp_path / "dotenv.py").write_text("raise ImportError")
    without = place.start([*args, *more], PYTHONPATH=str(tmp_path))
    assert without.wait() == 78
    assert "--env-file needs the package python-dotenv" in without.log
    assert "Traceback" not in without.log


def test_every_option_of_uvicorns_command_is_there() -> None:
    """Taken from uvicorn's own definition, whatever its version; ours beside them."""
    text = subprocess.run(
        [*command("uvicorn", "127.0.0.1:1")[:2], "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    module = importlib.import_module("uvicorn.main")
    for parameter in module.main.params:
        for option in parameter.opts:
            assert parameter.param_type_name == "argument" or option in text
    for flag in ("--bind", "--hot-restart-dir", "--takeover-timeout", "--no-hot-restart"):
        assert flag in text


@pytest.mark.parametrize(
    ("server", "number", "status"),
    [
        ("uvicorn", signal.SIGTERM, -signal.SIGTERM),
        ("uvicorn", signal.SIGINT, 130),
        ("uvicorn4", signal.SIGTERM, 0),
        ("uvicorn4", signal.SIGINT, 0),
    ],
)
def test_a_stop_without_a_successor_is_uvicorns(
    place: Deploys, address: str, server: str, number: signal.Signals, status: int
) -> None:
    """The same status as plain uvicorn gives, and nothing is left in the meeting directory."""
    plain = place.start(command(server, address, plain=True))
    plain.wait_for("Application startup complete", count=4 if server == "uvicorn4" else 1)
    plain.wait_for("Uvicorn running on")
    plain.signal(number)
    expected = plain.wait()
    ours = up(place, command(server, address))
    ours.signal(number)
    assert ours.wait() == expected, ours.log
    assert "The supervisor exited" not in ours.log
    assert expected in (status, 0)
    assert sorted(os.listdir(place.directory / "meet")) == ["lock", "tickets"]


def test_without_hot_restart_it_is_uvicorn(place: Deploys, address: str) -> None:
    """--no-hot-restart: a second instance finds the address taken."""
    args = command("uvicorn", address, "--no-hot-restart")
    first = up(place, args)
    second = place.start(args)
    assert second.wait() == 78
    assert f"is taken by pid {first.pid}" in second.log
    assert not (place.directory / "meet").exists()


def test_workers_of_a_killed_supervisor_leave(place: Deploys, address: str) -> None:
    """They would go on serving old code beside whatever is started next."""
    args = command("uvicorn4", address)
    first = up(place, args)
    workers = {ask(address).pid for _ in range(20)}
    watches = [os.pidfd_open(pid) for pid in workers]
    first.signal(signal.SIGKILL)
    first.wait()
    for pidfd in watches:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(30_000)
        os.close(pidfd)
    assert "The supervisor exited" in first.log
    second = up(place, args)
    assert second.owns(ask(address).pid)


EMBEDDED = """
import asyncio, sys, uvicorn
from hotrestart_plugins.uvicorn import Server
sys.path.insert(0, ".")
async def main():
    server = Server(uvicorn.Config("app:app", port=int(sys.argv[1])))
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)
    ticking = asyncio.create_task(tick())
    await server.serve()
    ticking.cancel()
    print("the program goes on", ticks > 3, flush=True)
asyncio.run(main())
"""
CALLED = """
import sys
from hotrestart_plugins.uvicorn import run
sys.path.insert(0, ".")
run("app:app", port=int(sys.argv[1]), workers=int(sys.argv[2]))
print("returned", flush=True)
"""


def test_embedded_in_a_program(place: Deploys, address: str) -> None:
    """A `Server` beside the program's own tasks is replaced, and the program goes on."""
    port = address.split(":")[1]
    args = [sys.executable, "-c", EMBEDDED, port]
    old = up(place, args)
    new = successor(place, old, args)
    assert "the program goes on True" in old.log
    assert ask(address).pid == new.pid


@pytest.mark.parametrize("workers", ["1", "2"])
def test_called_as_a_function(place: Deploys, address: str, tmp_path: Path, workers: str) -> None:
    """`run` has `uvicorn.run`'s signature, and returns once it was replaced."""
    script = tmp_path / "serve.py"
    guarded = CALLED.replace("run(", "if __name__ == '__main__': run(", 1)
    script.write_text(guarded.replace("print(", "if __name__ == '__main__': print("))
    args = [sys.executable, str(script), address.split(":")[1], workers]
    old = up(place, args)
    new = successor(place, old, args)
    assert "returned" in old.log
    assert new.owns(ask(address).pid)
