"""Connections: silent, idle, half-closed, unread and too many of them.  Time is a number that the tests set."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, eventually, minisgl_command
from test_keep_alive import BODIES
from test_server import CHAT, COMPLETION, PIECES, TEXT, USER, ScriptedEngine, Server, ask

from minisgl.api.batches.store import Store
from minisgl.api.engine import Chunk
from minisgl.api.http import keep_alive
from minisgl.api.http.connection import Connection
from minisgl.api.http.connection_limits import (
    ACCEPTED_AT_ONCE,
    MAX_DESCRIPTORS,
    Connections,
    connections_within,
    raise_descriptors,
)
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish

GET = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"
MIB = 1 << 20


class Clock:
    """Seconds, as the tests set them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Limited(Server):
    """A server whose connections have bounds together."""

    def __init__(self, engine: ScriptedEngine, header_seconds: float = 30.0, store: Store | None = None, **limits: Any) -> None:
        super().__init__(engine, header_seconds, store)
        self.clock = Clock()
        self.all = Connections(**{"kept": engine.kept, "now": self.clock, **limits})
        self.made: list[Connection] = []

    async def start(self) -> None:
        await self._runner.setup()
        assert self._runner.server is not None
        make = functools.partial(Connection, self._runner.server, self._seconds, self.request_log, self.all)

        def kept() -> Connection:
            self.made.append(make())
            return self.made[-1]

        self._listener = await asyncio.get_running_loop().create_server(kept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]


Scene = Callable[[Any, Limited], Awaitable[None]]


def play(scene: Scene, engine: ScriptedEngine | None = None, **more: Any) -> Any:
    """Run a scene; afterwards every request has been closed exactly once, and nothing is held for anybody."""

    async def main() -> Any:
        used = engine or ScriptedEngine()
        http = Limited(used, **more)
        await http.start()
        try:
            await asyncio.wait_for(scene(used, http), 30)
        finally:
            await http.close()
        assert sorted(used.closed) == list(range(len(used.opened))), "every request is closed exactly once"
        assert used.kept.bytes == 0
        await until(lambda: not len(http.all))
        assert not http.all._lagging
        return used

    return asyncio.run(main())


async def until(fact: Callable[[], object]) -> None:
    async def poll() -> None:
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 10)


async def connect(http: Server, said: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
    writer.write(said)
    return reader, writer


def post(path: str, body: dict[str, Any], head: str = "", version: str = "1.1") -> bytes:
    raw = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/{version}\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n{head}\r\n"
    )
    return lines.encode() + raw


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server ends the connection."""
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""


async def answer(reader: asyncio.StreamReader) -> bytes:
    """The head of the next answer; its body is read, too."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    size = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    await reader.readexactly(size[0])
    return head


# ---------------- how many there may be
def test_silent_connections_make_room_for_clients_that_ask() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        silent = [await connect(http, b"GET /he"[: i % 8]) for i in range(8)]
        await until(lambda: len(http.all) == 8)
        for n in range(3):
            assert (await ask(http, "/health", method="GET"))[0] == 200
            assert [await rest(reader) for reader, _ in silent[: n + 1]] == [b""] * (n + 1), "those silent for longest go"
            silent += [await connect(http)]
        assert http.all.closed["room"] >= 3
        for _, writer in silent:
            writer.close()

    play(scene, limit=8)


def test_whoever_is_served_or_has_been_is_not_shown_out_for_one_who_is_silent() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        engine.stall, engine.after = True, 1
        idle, served = await connect(http, GET), await connect(http, post(CHAT, {"messages": USER, "stream": True}))
        await answer(idle[0])
        await served[0].readuntil(b"Hel")
        many = [await connect(http) for _ in range(20)]
        await until(lambda: http.all.closed["room"] == 18)
        idle[1].write(GET)
        assert (await answer(idle[0])).startswith(b"HTTP/1.1 200 ")
        engine.go_on(99)
        await served[0].readuntil(b"[DONE]")
        for _, writer in (idle, served, *many):
            writer.close()

    play(scene, limit=4)


def test_idle_connections_make_room_where_none_is_silent() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        idle = [await connect(http, GET) for _ in range(4)]
        for reader, _ in idle:
            await answer(reader)
        idle[0][1].write(GET)  # the second has been idle for longest
        await answer(idle[0][0])
        assert (await ask(http, "/health", method="GET"))[0] == 200
        assert await rest(idle[1][0]) == b""
        for i in (0, 2, 3):
            idle[i][1].write(GET)
            assert (await answer(idle[i][0])).startswith(b"HTTP/1.1 200 ")
        for _, writer in idle:
            writer.close()

    play(scene, limit=4)


def test_where_all_are_served_the_next_gets_a_503_and_then_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        engine.stall = True
        served = [await connect(http, post(CHAT, {"messages": USER})) for _ in range(3)]
        await until(lambda: len(engine.opened) == 3)
        status, headers, raw = await ask(http, CHAT, {"messages": USER, "user": "x" * 3000})
        assert (status, headers["Connection"], headers["Retry-After"]) == (503, "close", "1")
        assert json.loads(raw)["error"]["code"] == "server_overloaded"
        silent = [await connect(http) for _ in range(200)]
        await until(lambda: http.all.closed["refused"] == 201)
        await until(lambda: len(http.all) < 50)
        engine.go_on(99)
        assert [(await answer(reader))[:13] for reader, _ in served] == [b"HTTP/1.1 200 "] * 3
        assert (await ask(http, "/health", method="GET"))[0] == 200
        for _, writer in (*served, *silent):
            writer.close()

    play(scene, limit=3)
    assert "Traceback" not in caplog.text


def test_a_want_of_descriptors_makes_room_and_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        silent = [await connect(http) for _ in range(5)]
        await until(lambda: len(http.all) == 5)
        for _ in range(1000):
            http.all.no_descriptor(OSError(24, "x"))
        assert [await rest(reader) for reader, _ in silent] == [b""] * 5
        assert len(caplog.records) == 1
        http.clock.now = 61.0
        http.all.no_descriptor(OSError(24, "x"))
        assert len(caplog.records) == 2
        for _, writer in silent:
            writer.close()

    http_room = caplog.at_level(logging.WARNING)
    with http_room:
        play(scene)


@pytest.mark.parametrize(
    ("soft", "hard", "then"), [(256, 900, 900), (900, 900, 900), (1024, MAX_DESCRIPTORS * 2, MAX_DESCRIPTORS)]
)
def test_the_limit_of_descriptors_is_raised(soft: int, hard: int, then: int) -> None:
    if hard > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        hard = then = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = f"""
import resource
from minisgl.api.http.connection_limits import connections_within, raise_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
n = raise_descriptors()
print(n, connections_within(n), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    n, connections, *limits = map(int, out.split())
    assert (n, limits) == (then, [then, hard])
    assert then // 2 < connections < then - min(2 * ACCEPTED_AT_ONCE, then // 4)
    assert connections_within(raise_descriptors()) >= 16


# ---------------- headers that do not come
HALF = b"GET /health HTTP/1.1\r\nHost: t\r\n"


LINES, MORE_HEADERS = b"\r\n\r\n", b"X-A: b\r\n"


@pytest.mark.parametrize(
    ("asked", "first", "again"),
    [
        (False, b"", b""),
        (False, LINES, b""),
        (False, b"", LINES),
        (False, b"\n", b"\n"),
        (False, HALF, b""),
        (False, LINES + HALF, b""),
        (False, HALF, MORE_HEADERS),
        (False, HALF + b"X-A: ", b"x"),
        (True, HALF, b""),
        (True, LINES + b"G", b""),
        (True, HALF, MORE_HEADERS),
    ],
)
def test_headers_have_one_limit_whatever_comes_before_and_in_them(asked: bool, first: bytes, again: bytes) -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        reader, writer = await connect(http, GET if asked else b"")
        if asked:
            await answer(reader)
        writer.write(first)
        end = asyncio.ensure_future(rest(reader))
        while not end.done():
            writer.write(again)
            await asyncio.sleep(0.01)
        writer.close()
        assert (await end).startswith(b"HTTP/1.1 408 ")
        assert http.all.closed == {"headers": 1}

    play(scene, header_seconds=0.05)


def test_empty_lines_neither_begin_a_request_nor_keep_a_connection() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        reader, writer = await connect(http, GET)
        await answer(reader)
        due = http.made[0]._next_keepalive_close_time
        for _ in range(3):
            writer.write(b"\r\n")
            await asyncio.sleep(0.005)
        assert http.made[0]._timer is None
        assert http.made[0]._next_keepalive_close_time == due
        writer.write(GET[:9])
        await until(lambda: http.made[0]._timer is not None)
        assert http.made[0]._next_keepalive_close_time > http.made[0]._timer.when(), "an idle one's end does not come first"
        writer.write(GET[9:])
        assert (await answer(reader)).startswith(b"HTTP/1.1 200 ")
        assert http.made[0]._timer is None
        writer.close()

    play(scene)


# ---------------- clients that send no more
WAYS = {
    "HTTP/1.1": {},
    "close": {"head": "Connection: close\r\n"},
    "HTTP/1.0": {"version": "1.0"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_closes_its_sending_side_after_its_request_is_answered(path: str, stream: bool, way: str) -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        reader, writer = await connect(http, post(path, {**BODIES[path], "stream": stream}, **WAYS[way]))
        writer.write_eof()
        head, _, body_ = (await rest(reader)).partition(b"\r\n\r\n")
        assert b" 200 OK\r\n" in head
        assert b"connection: close" in head.lower()
        assert json.dumps(PIECES[3])[1:-1].encode() in body_
        writer.close()

    assert len(play(scene).opened) == 1


def test_requests_sent_together_before_the_end_are_all_answered() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        reader, writer = await connect(http, GET + post(CHAT, {"messages": USER}) + GET + post(CHAT, {"messages": USER}))
        writer.write_eof()
        assert (await rest(reader)).count(b"HTTP/1.1 200 ") == 4
        writer.close()

    play(scene)


@pytest.mark.parametrize("after", [0, 1])
def test_a_stream_goes_on_for_a_client_that_closes_its_sending_side_later(after: int) -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        engine.stall, engine.after = True, after
        reader, writer = await connect(http, post(CHAT, {"messages": USER, "stream": True}))
        await until(lambda: engine.live)
        if after:
            await reader.readuntil(b"Hel")
        writer.write_eof()
        await until(lambda: http.made[0].half_closed)
        engine.go_on(99)
        said = await rest(reader)
        assert json.dumps(TEXT[-6:])[1:-1].encode() in said
        assert b"[DONE]" in said
        writer.close()

    play(scene)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("first_half", [False, True])
def test_a_stream_whose_client_has_left_ends_although_nothing_is_to_be_said(
    after: int, first_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `first_half` the client closes its sending side before it leaves: then the next sign of life finds out."""
    monkeypatch.setattr(keep_alive, "SWEEP_SECONDS", 1e6)

    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        engine.stall, engine.after = True, after
        reader, writer = await connect(http, post(CHAT, {"messages": USER, "stream": True}))
        await until(lambda: engine.live)
        if after:
            await reader.readuntil(b"Hel")
        if first_half:
            writer.write_eof()
            await until(lambda: http.made[0].half_closed)
            await reader.readuntil(b"keep-alive\n\n" if after else b"\r\n\r\n")
        writer.close()
        if first_half:
            for _ in range(3):
                await asyncio.sleep(0.002)
                http._runner.app[keep_alive.KEEP_ALIVE].sweep()
        await until(lambda: engine.closed == [0])

    play(scene)


def test_a_plain_request_ends_with_its_client() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        engine.stall = True
        _, writer = await connect(http, post(CHAT, {"messages": USER}))
        await until(lambda: engine.live)
        writer.close()
        await until(lambda: engine.closed == [0])

    play(scene)


def test_half_of_a_body_and_the_end_is_a_client_that_has_left() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        for said in (post(CHAT, {"messages": USER})[:-3], GET[:-2], b"", b"\r\n"):
            reader, writer = await connect(http, said)
            writer.write_eof()
            assert await rest(reader) == b""
            writer.close()

    assert not play(scene).opened


# ---------------- clients that do not read
class Long(ScriptedEngine):
    """Every answer is one piece of 8 MiB."""

    size = 8 * MIB

    def _piece(self, uid: int, at: int) -> None:
        if uid in self.live and not (at >= self.after and self.stall):
            self.live.pop(uid)(Chunk("x" * self.size, (1,), self.finish, 3, 2))


async def unread(http: Server, said: bytes) -> socket.socket:
    """A client that sends this and reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", http.port))
    await asyncio.get_running_loop().sock_sendall(sock, said)
    return sock


BIG = {"messages": USER, "max_tokens": 5}


@pytest.mark.parametrize("kind", ["plain", "stream", "close", "file", "gone half", "log probabilities"])
def test_a_client_that_does_not_read_is_shown_out(kind: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    said = post(CHAT, {**BIG, "stream": kind in {"stream", "gone half"}}, "Connection: close\r\n" if kind == "close" else "")

    async def scene(engine: Long, http: Limited) -> None:
        nonlocal said
        if kind == "file":
            part = store.new_part()
            part.write_bytes(b"x" * Long.size)
            said = b"GET /v1/files/%b/content HTTP/1.1\r\nHost: t\r\n\r\n" % store.adopt(part, "f", "batch")["id"].encode()
        sock = await unread(http, said)
        if kind == "gone half":
            sock.shutdown(socket.SHUT_WR)
        await until(lambda: http.all._lagging)
        assert (await ask(http, "/health", method="GET"))[0] == 200
        http.clock.now = 59.0
        await settle(http)
        assert not http.all.closed
        got = len(await asyncio.get_running_loop().sock_recv(sock, 4 * MIB))
        while got < MIB:
            got += len(await asyncio.get_running_loop().sock_recv(sock, 4 * MIB))
        await settle(http)
        http.clock.now = 118.0
        await settle(http)
        assert not http.all.closed, "it has read something meanwhile"
        http.clock.now = 120.0
        http.all.sweep()
        assert http.all.closed == {"slow_reader": 1}
        await until(lambda: not len(http.all))
        sock.close()

    play(scene, Long(), store=store)


async def settle(http: Limited) -> None:
    """Sweep until nothing changes: the kernel may take more for a while."""
    before: Any = None
    while (now := [(lag.size, lag.since) for lag in http.all._lagging.values()]) != before or not now:
        before = now
        await asyncio.sleep(0.01)
        http.all.sweep()


def test_of_too_much_that_waits_those_go_who_have_lagged_for_longest() -> None:
    async def scene(engine: Long, http: Limited) -> None:
        socks = []
        for i in range(3):
            http.clock.now = 0.2 * i
            socks.append(await unread(http, post(CHAT, {**BIG, "stream": i == 1})))
            await until(lambda i=i: len(http.all._lagging) == i + 1)  # type: ignore[misc]
        await settle(http)
        assert not http.all.closed, "nobody is shown out at once"
        first = http.made[0]
        http.clock.now = 1.1
        http.all.sweep()
        assert http.all.closed == {"memory": 1}
        assert first not in http.all._lagging
        assert (await ask(http, "/health", method="GET"))[0] == 200
        http.all.sweep()
        assert http.all.closed == {"memory": 1}, "the others fit"
        for sock in socks:
            sock.close()

    play(scene, Long(), unread_bytes=13 * MIB)


def test_far_too_much_does_not_wait_for_a_sweep() -> None:
    async def scene(engine: Long, http: Limited) -> None:
        socks = [await unread(http, post(CHAT, BIG)) for _ in range(6)]
        await until(lambda: http.all.closed["memory"] >= 3)
        assert http.clock.now == 0.0
        for sock in socks:
            sock.close()

    play(scene, Long(), unread_bytes=2 * MIB)


def test_what_a_finished_stream_has_not_written_stays_counted() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        body = {"messages": USER, "stream": True, "logprobs": True, "top_logprobs": 2}
        sock = await unread(http, post(CHAT, body))
        await until(lambda: engine.opened)
        await until(lambda: http.all._lagging)
        before = engine.kept.bytes
        assert before > 100_000
        assert http.made[0].held() > before, "and what is in the transport"
        await settle(http)
        http.clock.now = 60.0
        http.all.sweep()
        await until(lambda: not engine.kept.bytes)
        sock.close()

    class Told(ScriptedEngine):
        """Thousands of tokens with their alternatives, all at once."""

        def _piece(self, uid: int, at: int) -> None:
            if uid in self.live:
                told = self._told(self.opened[uid][1], 0) * 50
                for _ in range(1000):
                    self.live[uid](Chunk("x", tuple(range(50)), Finish.NONE, 3, 2, told))
                self.live.pop(uid)(Chunk("", (), self.finish, 3, 2))

    play(scene, Told())


# ---------------- the end of the server
def test_answers_of_a_server_that_is_draining_end_their_connections() -> None:
    async def scene(engine: ScriptedEngine, http: Limited) -> None:
        engine.stall, engine.after = True, 1
        idle, served = await connect(http, GET), await connect(http, post(CHAT, {"messages": USER, "stream": True}))
        silent = await connect(http)
        await answer(idle[0])
        await served[0].readuntil(b"Hel")
        engine.state = "draining"
        engine.refuse = RequestError("The server is shutting down.", status=503, code="server_draining", retry_after=5)
        http.all.drain()
        assert await rest(idle[0]) == b""
        silent[1].write(post(CHAT, {"messages": USER}))
        said = await rest(silent[0])
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"connection: close" in said.lower()
        assert b"server_draining" in said
        for path, status in (("/health", 200), ("/ready", 503), ("/nothing", 404), ("/v1/models", 200)):
            got, headers, raw = await ask(http, path, method="GET")
            assert (got, headers["Connection"]) == (status, "close")
            if path == "/health":
                assert json.loads(raw)["status"] == "draining"
        engine.go_on(99)
        assert (await rest(served[0])).endswith(b"0\r\n\r\n"), "a stream goes on to its end, and then its connection ends"
        for _, writer in (idle, served, silent):
            writer.close()

    play(scene)


def test_a_server_with_few_descriptors_serves_among_more_silent_clients_than_it_can_have(tmp_path: Path) -> None:
    """A real one, with 1024 descriptors at most; its log stays short, and it can reach its actors."""
    raise_descriptors()
    command = minisgl_command("--model", "fake", "--port", "0", "--device", "cpu")
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(tmp_path)}
    few = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    silent: list[socket.socket] = []
    with subprocess.Popen([sys.executable, "-c", few, *command], stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            port = next(int(m[1]) for line in process.stderr if (m := re.search(r"ready in .*:(\d+)/v1", line)))
            fds = Path(f"/proc/{process.pid}/fd")
            before = len(list(fds.iterdir()))
            body = post(COMPLETION, {"prompt": [1, 2, 3], "max_tokens": 5}, "Connection: close\r\n")
            assert b" 200 OK" in exchange(port, body)
            eventually(lambda: len(list(fds.iterdir())) <= before)
            for _ in range(1100):
                silent.append(socket.create_connection(("127.0.0.1", port)))
            assert b" 200 OK" in exchange(port, body, half_close=True)
            assert len(list(fds.iterdir())) < 1024
            assert b'minisgl_http_connections_closed_total{reason="room"}' in exchange(port, GET.replace(b"health", b"metrics"))
            process.send_signal(signal.SIGTERM)
            assert len(process.stderr.read()) < 2000
            assert process.wait(60) == 0
        finally:
            process.kill()
            for sock in silent:
                sock.close()
    assert list(tmp_path.iterdir()) == []


def exchange(port: int, said: bytes, half_close: bool = False) -> bytes:
    """What a server answers until it ends the connection, or for HTTP/1.1 to the end of the first answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(said.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1) if b"Connection" not in said else said)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))
