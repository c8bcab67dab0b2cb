"""The load client is honest: servers that misbehave on purpose, and what it must call each."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from demo_app.load import (
    Load,
    LoadError,
    LoadProcess,
    Mix,
    Report,
    Sizes,
    Target,
)
from tests.support import certificates

DEMO_APP = Path(__file__).resolve().parents[2] / "demo_app"
DEADLINE = 30.0
NEVER = -1  # a pid that no process has

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = b"ok", *headers: str, status: str = "200 OK", pid: int = 7) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"X-Served-By: {pid}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """The head of a request, and its body if it has a length; nothing at the end of file."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            head += await reader.readexactly(int(line.partition(b":")[2]))
    return head


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def answering(*answers: bytes) -> Handler:
    """A server that gives these answers on a connection, and then closes it."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for one in answers:
            if not await read_request(reader):
                break
            writer.write(one)

    return handle


def always(one: bytes) -> Handler:
    """A server that answers every request so."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            writer.write(one)

    return handle


def closing(handler: Handler) -> Handler:
    """The connection is closed when the handler ends, however it does."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    return handle


@contextlib.asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[str]:
    """The target of a server that is made of this handler."""
    server = await asyncio.start_server(closing(handler), "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def serve(
    handler: Handler,
    mix: Mix,
    *,
    max_requests: int | None = None,
    until: asyncio.Event | None = None,
    **options: Any,
) -> Report:
    """What the clients of the mix report of a server that is made of this handler."""
    async with listening(handler) as target:
        running = Load(target, mix, **options).run(until, max_requests=max_requests)
        report = await asyncio.wait_for(running, DEADLINE)
    assert report.sent == report.answered + report.failures + report.abandoned
    return report


def report_of(handler: Handler, mix: Mix, **options: Any) -> Report:
    return asyncio.run(serve(handler, mix, **options))


# One failure, one name


async def no_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    reset(writer)


async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def never_finishes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(answer(b"0123456789")[:-5])
    await reader.read()


MISBEHAVIOURS = {
    "closes without an answer": (no_answer, "eof"),
    "resets without an answer": (resets, "reset"),
    "ends inside the head": (answering(answer()[:20]), "cut_short"),
    "ends inside the body": (answering(answer(b"0123456789")[:-5]), "cut_short"),
    "ends inside a chunk": (
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
        "cut_short",
    ),
    "ends before the last chunk": (
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"),
        "cut_short",
    ),
    "never answers": (never_answers, "timed_out"),
    "never finishes": (never_finishes, "timed_out"),
    "500": (always(answer(status="500 Internal Server Error")), "status"),
    "301": (always(answer(status="301 Moved Permanently")), "status"),
    "not HTTP": (answering(b"220 mail.example.org ESMTP\r\n"), "garbled"),
    "no status": (answering(b"HTTP/1.1 OK\r\n\r\n"), "garbled"),
    "no header": (answering(b"HTTP/1.1 200 OK\r\nwhatever\r\n\r\n"), "garbled"),
    "no length": (answering(b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n"), "garbled"),
    "no chunk size": (
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
        "garbled",
    ),
}


@pytest.mark.parametrize("client", ["one_shot", "keep_alive"])
@pytest.mark.parametrize("behaviour", MISBEHAVIOURS)
def test_each_misbehaviour_has_its_name(behaviour: str, client: str) -> None:
    handler, kind = MISBEHAVIOURS[behaviour]
    timeout = 0.3 if kind == "timed_out" else DEADLINE
    report = report_of(handler, Mix(**{client: 1}), max_requests=2, timeout=timeout)
    assert report.failed == {kind: 2}
    assert report.answered == 0
    assert report.by_pid == {}
    assert report.by_client[client].failed == 2
    assert [one.kind for one in report.first_failures] == [kind, kind]


def test_a_reset_inside_the_answer_is_cut_short() -> None:
    async def scenario() -> Report:
        seen = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(answer(pid=1))
            await read_request(reader)
            writer.write(answer(pid=2)[:-1])
            await seen.wait()
            reset(writer)

        async with listening(handle) as target:
            load = Load(target, Mix(keep_alive=1))
            running = asyncio.create_task(load.run(max_requests=2))
            await load.until(lambda report: report.answered == 1)
            [connection] = load._account.opened
            data_received = connection.data_received

            def tell(data: bytes) -> None:
                data_received(data)
                seen.set()

            connection.data_received = tell  # type: ignore[method-assign]
            return await asyncio.wait_for(running, DEADLINE)

    report = asyncio.run(scenario())
    assert report.failed == {"cut_short": 1}
    [failure] = report.first_failures
    assert (failure.pid, failure.carried, failure.received) == (1, 1, len(answer()) - 1)
    assert "ECONNRESET" in str(failure)


def test_a_port_where_nobody_listens_refuses() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        load = Load(f"127.0.0.1:{bound.getsockname()[1]}", Mix(one_shot=2))
        report = asyncio.run(load.run(max_requests=10))
    assert report.failed == {"refused": 10}
    assert "ECONNREFUSED" in str(report)


def test_a_socket_path_that_is_missing_refuses(tmp_path: Path) -> None:
    load = Load(f"unix:{tmp_path}/none.sock", Mix(one_shot=1))
    assert asyncio.run(load.run(max_requests=1)).failed == {"refused": 1}


def test_a_lack_of_descriptors_is_the_clients_own_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_socket(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def scenario() -> Report:
        load = Load("127.0.0.1:9", Mix(one_shot=1))
        monkeypatch.setattr(socket, "socket", no_socket)
        return await load.run(max_requests=1)

    assert asyncio.run(scenario()).failed == {"local": 1}


def test_more_clients_than_descriptors_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="ulimit -n"):
        Load("127.0.0.1:9", Mix(keep_alive=10_000_000))


def test_an_echo_of_somebody_elses_upload_is_garbled() -> None:
    wrong = answer(json.dumps({"bytes": 1024, "sha256": "0" * 64}).encode())
    sizes = Sizes(upload_kib=1, upload_pieces=4, upload_seconds=0)
    report = report_of(always(wrong), Mix(upload=1), max_requests=2, sizes=sizes)
    assert report.failed == {"garbled": 2}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_event_is_garbled(lost: int) -> None:
    events = [f'data: {{"pid": 7, "event": {event}}}\n\n' for event in range(3) if event != lost]
    whole = answer("".join(events).encode())
    report = report_of(always(whole), Mix(sse=1), max_requests=1, sizes=Sizes(sse_events=3))
    assert report.failed == {"garbled": 1}


def test_bytes_that_answer_no_request_are_garbled() -> None:
    twice = always(answer() + answer())
    report = report_of(twice, Mix(keep_alive=1), max_requests=2, pause=0.05)
    assert (report.answered, report.failed) == (1, {"garbled": 1})


# What is no failure


@pytest.mark.parametrize(
    "bytes_of_answer",
    [
        answer(),
        answer(b""),
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\nab\r\n0\r\nA: b\r\n\r\n",
    ],
)
def test_an_answer_may_come_byte_by_byte(bytes_of_answer: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while await read_request(reader):
            for byte in bytes_of_answer:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)

    report = report_of(handle, Mix(keep_alive=1), max_requests=3)
    assert (report.answered, report.failed, report.reconnects) == (3, {}, 0)


def test_a_body_may_end_with_its_connection() -> None:
    until_the_end = answering(b"HTTP/1.1 200 OK\r\nX-Served-By: 7\r\n\r\nwhatever")
    report = report_of(until_the_end, Mix(keep_alive=1), max_requests=3)
    assert (report.answered, report.failed, report.reconnects) == (3, {}, 2)


def test_an_announced_close_is_a_reconnect() -> None:
    closing = answering(answer(), answer(b"ok", "Connection: close"))
    report = report_of(closing, Mix(keep_alive=1), max_requests=6)
    assert (report.answered, report.failures) == (6, 0)
    assert (report.reconnects, report.closed_idle) == (2, 0)
    assert report.by_pid[7].new == 3


def test_http_1_0_announces_the_close_by_its_version() -> None:
    old = answering(answer().replace(b"HTTP/1.1", b"HTTP/1.0"))
    report = report_of(old, Mix(keep_alive=1), max_requests=3)
    assert (report.answered, report.failures, report.reconnects) == (3, 0, 2)


def test_a_one_shot_client_never_reconnects() -> None:
    report = report_of(always(answer(b"ok", "Connection: close")), Mix(one_shot=1), max_requests=5)
    assert (report.answered, report.reconnects, report.by_pid[7].new) == (5, 0, 5)


def test_a_close_seen_before_the_next_request_is_closed_idle() -> None:
    report = report_of(answering(answer()), Mix(keep_alive=1), max_requests=3, pause=0.1)
    assert (report.answered, report.failures) == (3, 0)
    assert (report.closed_idle, report.reconnects) == (2, 0)


@pytest.mark.parametrize(("ends", "kind"), [(no_answer, "eof"), (resets, "reset")])
def test_a_close_seen_after_the_next_request_is_a_failure(ends: Handler, kind: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer(pid=4711))
        await ends(reader, writer)

    report = report_of(handle, Mix(keep_alive=1), max_requests=2)
    assert (report.answered, report.failed, report.closed_idle) == (1, {kind: 1}, 0)
    [failure] = report.first_failures
    assert (failure.pid, failure.carried, failure.received) == (4711, 1, 0)
    assert "after 1 answers, the last by pid 4711" in str(failure)


def test_a_connection_is_kept_after_a_whole_answer_with_a_bad_status() -> None:
    unavailable = answer(status="503 Service Unavailable")
    report = report_of(answering(unavailable, answer()), Mix(keep_alive=1), max_requests=2)
    assert (report.answered, report.failed) == (1, {"status": 1})
    assert report.by_pid[7].new == 0


def test_a_full_backlog_of_a_unix_listener_is_waited_for(tmp_path: Path) -> None:
    async def scenario() -> Report:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{tmp_path}/app.sock")
            listener.listen(0)
            with socket.socket(socket.AF_UNIX) as first:
                first.connect(f"{tmp_path}/app.sock")
                load = Load(f"unix:{tmp_path}/app.sock", Mix(one_shot=4))
                running = asyncio.create_task(load.run(max_requests=8))
                await asyncio.sleep(0)  # it has met the full backlog
                server = await asyncio.start_unix_server(closing(always(answer())), sock=listener)
                try:
                    return await asyncio.wait_for(running, DEADLINE)
                finally:
                    server.close()

    report = asyncio.run(scenario())
    assert (report.answered, report.failed) == (8, {})


def test_a_full_backlog_that_nobody_empties_is_timed_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(f"{tmp_path}/app.sock")
        listener.listen(0)
        first.connect(f"{tmp_path}/app.sock")
        load = Load(f"unix:{tmp_path}/app.sock", Mix(one_shot=1), timeout=0.2)
        assert asyncio.run(load.run(max_requests=1)).failed == {"timed_out": 1}


# WebSockets


def frame(opcode: int, data: bytes) -> bytes:
    return bytes([0x80 | opcode, len(data)]) + data


def close_frame(code: int) -> bytes:
    return frame(8, struct.pack("!H", code))


async def accept_websocket(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await read_request(reader)
    [key] = (line[18:].strip() for line in head.split(b"\r\n") if b"WebSocket-Key" in line)
    magic = key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(magic).digest()).decode()
    writer.write(
        f"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: {accept}\r\n\r\n".encode()
    )


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first, size = await reader.readexactly(2)
    assert size & 0x80, "clients mask"
    size &= 0x7F
    key = await reader.readexactly(4)
    data = await reader.readexactly(size)
    return first & 15, bytes(byte ^ key[at % 4] for at, byte in enumerate(data))


def echoing(times: int, *then: bytes, prefix: bytes = b"7 ") -> Handler:
    """A WebSocket server that echoes so often, and then sends these frames and closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        for _ in range(times):
            opcode, data = await read_frame(reader)
            if opcode == 8:
                return
            writer.write(frame(1, prefix + data))
        for one in then:
            writer.write(one)
        if then:
            await reader.read()

    return handle


def test_a_websocket_keeps_its_connection() -> None:
    report = report_of(echoing(10), Mix(websocket=1), max_requests=10)
    assert (report.answered, report.failures, report.ws_restarts) == (10, 0, 0)
    assert (report.by_pid[7].answers, report.by_pid[7].new) == (10, 1)


@pytest.mark.parametrize("code", [1001, 1012])
@pytest.mark.parametrize("pause", [0.0, 0.05], ids=["meets a message", "between messages"])
def test_a_websocket_restart_is_no_failure(code: int, pause: float) -> None:
    restarting = echoing(2, close_frame(code))
    report = report_of(restarting, Mix(websocket=1), max_requests=5, pause=pause)
    assert (report.sent, report.answered, report.failures) == (5, 5, 0)
    assert report.ws_restarts == 2
    assert report.by_pid[7].new == 3


def test_a_restart_is_answered_with_a_close_frame() -> None:
    received: list[tuple[int, bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await accept_websocket(reader, writer)
        received.append(await read_frame(reader))
        if len(received) == 1:
            writer.write(close_frame(1012))
            received.append(await read_frame(reader))
        else:
            writer.write(frame(1, b"7 " + received[-1][1]))

    report = report_of(handle, Mix(websocket=1), max_requests=1)
    assert (report.answered, report.ws_restarts) == (1, 1)
    assert received == [(1, b"message 1"), (8, b"\x03\xf4"), (1, b"message 2")]


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (echoing(1, close_frame(1011)), "eof"),
        (echoing(1, frame(8, b"")), "eof"),
        (echoing(1), "eof"),
        (echoing(1, b"\x81\x20half"), "cut_short or timed_out"),
        (echoing(1, b"HTTP/1.1 400 Bad Request\r\n\r\n"), "garbled"),
    ],
)
def test_any_other_end_of_a_websocket_is_a_failure(handler: Handler, kind: str) -> None:
    timeout = 0.3 if "timed_out" in kind else DEADLINE
    report = report_of(handler, Mix(websocket=1), max_requests=2, timeout=timeout)
    assert report.answered == 1
    [found] = report.failed
    assert found in kind


def test_a_wrong_echo_is_garbled() -> None:
    report = report_of(echoing(2, prefix=b"nobody "), Mix(websocket=1), max_requests=2)
    assert report.failed == {"garbled": 2}


def test_a_refused_handshake_is_a_status() -> None:
    forbidden = always(answer(status="403 Forbidden"))
    assert report_of(forbidden, Mix(websocket=1), max_requests=2).failed == {"status": 2}


def test_a_ping_is_answered_while_the_client_naps() -> None:
    pongs: list[tuple[int, bytes]] = []

    async def scenario() -> Report:
        until = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await accept_websocket(reader, writer)
            _, data = await read_frame(reader)
            writer.write(frame(1, b"7 " + data))
            writer.write(frame(9, b"there?"))
            pongs.append(await read_frame(reader))
            until.set()

        return await serve(handle, Mix(websocket=1), until=until, pause=DEADLINE)

    asyncio.run(scenario())
    assert pongs == [(10, b"there?")]


# The account


def test_answers_are_booked_to_the_process_that_gave_them() -> None:
    mixed = answering(answer(pid=11), answer(pid=11), answer(b"", "Connection: close", pid=12))
    before = time.monotonic()
    report = report_of(mixed, Mix(keep_alive=1), max_requests=6, record=True)
    after = time.monotonic()
    old, new = report.by_pid[11], report.by_pid[12]
    assert (old.answers, old.new, new.answers, new.new) == (4, 2, 2, 0)
    assert before < old.last_begun < old.last < after
    assert old.first < new.first < old.last_begun < old.last < new.last
    assert new.last_begun == 0.0
    assert report.samples
    samples = list(report.samples)
    assert [one.pid for one in samples] == [11, 11, 12, 11, 11, 12]
    assert [one.new_connection for one in samples] == [True, False, False, True, False, False]
    assert all(one.start < one.end and one.client == "keep_alive" for one in samples)


def test_an_answer_without_a_name_is_booked_to_pid_0() -> None:
    report = report_of(always(b"HTTP/1.1 204 No Content\r\n\r\n"), Mix(one_shot=1), max_requests=1)
    assert list(report.by_pid) == [0]


def test_a_report_survives_the_way_through_json() -> None:
    report = report_of(
        answering(answer(), b"nonsense"), Mix(keep_alive=2), max_requests=9, record=True
    )
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert report.samples
    assert again.samples
    assert list(again.samples) == list(report.samples)
    assert again.to_json() == report.to_json()
    assert str(again) == str(report)


def test_two_reports_merge_into_one() -> None:
    one = report_of(always(answer(pid=1)), Mix(keep_alive=1), max_requests=3, record=True)
    two = report_of(no_answer, Mix(one_shot=1), max_requests=2)
    both = one.merge(two)
    assert (both.sent, both.answered, both.failed) == (5, 3, {"eof": 2})
    assert (both.started, both.ended) == (one.started, two.ended)
    assert list(both.by_client) == ["one_shot", "keep_alive"]
    assert both.by_pid == one.by_pid
    assert both.samples is not None
    assert len(both.samples) == 3


def test_a_stop_lets_the_request_under_way_finish() -> None:
    async def scenario() -> Report:
        until = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            until.set()
            await asyncio.sleep(0)  # the load stops here
            writer.write(answer())
            await reader.read()

        return await serve(handle, Mix(keep_alive=1), until=until)

    report = asyncio.run(scenario())
    assert (report.sent, report.answered, report.abandoned) == (1, 1, 0)


def test_a_stop_with_a_deadline_abandons_what_is_not_finished() -> None:
    async def scenario() -> Report:
        loads: list[Load] = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            loads[0].stop(within=0.05)
            await reader.read()

        async with listening(handle) as target:
            loads.append(Load(target, Mix(keep_alive=1)))
            return await asyncio.wait_for(loads[0].run(), DEADLINE)

    report = asyncio.run(scenario())
    assert (report.sent, report.answered, report.failures, report.abandoned) == (1, 0, 0, 1)


def test_no_descriptor_is_left_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for handler, _ in MISBEHAVIOURS.values():
        report_of(handler, Mix(one_shot=2, keep_alive=2, websocket=1), max_requests=9, timeout=0.2)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("text", ["", "8000", ":8000", "host:", "host:http"])
def test_what_is_no_target_is_said_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Target.parse(text)


def test_targets() -> None:
    assert Target.parse("127.0.0.1:80").address == ("127.0.0.1", 80)
    assert Target.parse("[::1]:80").family == socket.AF_INET6
    assert Target.parse("[::1]:80").host_header == "[::1]:80"
    assert Target.parse("unix:/run/app.sock").address == "/run/app.sock"


# In a process of its own


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("X-Served-By", str(os.getpid()))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """The target of a server that answers with this process's pid."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join(DEADLINE)


def test_a_load_process_reports_while_it_runs_and_at_its_end(server: str) -> None:
    with LoadProcess(server, Mix(one_shot=1, keep_alive=2), record=True) as load:
        pid = load.pid
        first = load.wait(answers=10, timeout=DEADLINE)
        second = load.wait(answers=10, pid=os.getpid(), pid_not_in=[NEVER], timeout=DEADLINE)
        assert second.answered >= first.answered + 10
        live = load.report()
        assert live.answered >= second.answered
        assert (live.samples, live.ended) == (None, 0.0)
        assert live.seconds > 0
        report = load.stop()
    assert (report.failures, report.abandoned) == (0, 0)
    assert report.sent == report.answered >= live.answered
    assert report.samples is not None
    assert len(report.samples) == report.answered
    assert list(report.by_pid) == [os.getpid()]
    assert not Path(f"/proc/{pid}").exists()


def test_a_wait_in_vain_says_what_there_was_instead(server: str) -> None:
    with LoadProcess(server, Mix(keep_alive=1)) as load:
        load.wait(answers=1, timeout=DEADLINE)
        with pytest.raises(TimeoutError, match=r"pid_not_in(?s:.*)answered"):
            load.wait(pid_not_in=[os.getpid()], timeout=0.1)
        load.wait(answers=1, timeout=DEADLINE)
        assert load.stop().failures == 0


def test_a_wait_ends_with_the_load(server: str) -> None:
    with LoadProcess(server, Mix(keep_alive=1), max_requests=5) as load:
        with pytest.raises(LoadError, match="ended before"):
            load.wait(failures=1, timeout=DEADLINE)
        with pytest.raises(LoadError, match="ended before"):  # one that begins after the end
            load.wait(failures=1, timeout=DEADLINE)
        assert load.stop().answered == 5


def test_a_load_process_ends_with_its_block(server: str) -> None:
    load = LoadProcess(server, Mix(keep_alive=1))
    with contextlib.suppress(ZeroDivisionError), load:
        pid = load.pid
        raise ZeroDivisionError
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(LoadError, match="not running"):
        load.report()


def test_a_load_process_ends_with_the_process_that_commands_it(server: str) -> None:
    with LoadProcess(server, Mix(keep_alive=1)) as load:
        process = load._process
        assert process
        assert process.stdin
        process.stdin.close()  # as the kernel does when this process dies
        assert process.wait(DEADLINE) == 0
        process.stdin = None


def test_a_load_process_that_cannot_begin_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoadError, match="exit status 2"):
        LoadProcess("nowhere", Mix(one_shot=1)).__enter__()
    assert "'nowhere' is no target" in capfd.readouterr().err


def test_a_load_process_that_was_killed_is_noticed(server: str) -> None:
    with LoadProcess(server, Mix(keep_alive=1)) as load:
        os.kill(load.pid, signal.SIGKILL)
        with pytest.raises(LoadError, match="exit status -9"):
            load.stop()


# The command line


def run_load(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO_APP / "load.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_the_command_line_prints_a_table(server: str, tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    options = ["--keep-alive", "2", "--requests", "50", "--record", "--save", str(saved)]
    result = run_load(server, *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"the first answer by pid {os.getpid()}" in result.stdout
    assert "50 sent" in result.stdout
    report = Report.from_json(json.loads(saved.read_text()))
    assert report.samples is not None
    assert len(report.samples) == 50


def test_the_command_line_fails_when_requests_do(tmp_path: Path) -> None:
    result = run_load(f"unix:{tmp_path}/none.sock", "--one-shot", "1", "--requests", "3")
    assert result.returncode == 1
    assert "3 refused" in result.stdout


def test_the_command_line_wants_a_client(server: str) -> None:
    result = run_load(server)
    assert result.returncode == 2
    assert "pass at least one" in result.stderr


# TLS


def test_tls(tmp_path: Path) -> None:
    files = certificates.issue(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.chain, files.key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as http:
        http.socket = context.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        mix, target = Mix(one_shot=1, keep_alive=2), f"127.0.0.1:{http.server_port}"
        with LoadProcess(target, mix, ca_file=files.ca, max_requests=40) as load:
            report = load.stop()
        http.shutdown()
        thread.join(DEADLINE)
    assert (report.answered, report.failures) == (report.sent, 0)


def test_a_server_that_ends_the_tls_handshake_is_an_eof() -> None:
    tls = ssl.create_default_context()

    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)

    report = report_of(hangs_up, Mix(keep_alive=1), max_requests=1, tls=tls)
    assert report.failed == {"eof": 1}
    report = report_of(never_answers, Mix(keep_alive=1), max_requests=1, tls=tls, timeout=0.2)
    assert report.failed == {"timed_out": 1}
    report = report_of(always(answer()), Mix(keep_alive=1), max_requests=1, tls=tls, timeout=0.5)
    assert set(report.failed) <= {"garbled", "timed_out"}
