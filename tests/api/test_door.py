"""Refusals at the door: as the long way words them, before the body, whatever connection, and at a bounded cost a turn."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from test_server import CHAT, COMPLETION, USER, ScriptedEngine, check_error

from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.http import acceptor, lobby
from minisgl.api.http.acceptor import Acceptor
from minisgl.api.http.app import RUN_KWARGS, build_app
from minisgl.api.http.connection import Connection
from minisgl.api.http.connection_limits import Connections
from minisgl.api.http.door import DOOR, Door
from minisgl.api.http.lobby import Waiting
from minisgl.api.request_log import RequestLog
from minisgl.errors import RequestError, model_loading

FULL = RequestError(
    "The server has 8 open requests, its limit; try again in 3 s.", status=429, code="server_overloaded", retry_after=3
)
BODY = json.dumps({"messages": USER}).encode()
KEY = "a-key-that-is-known"


class Full(ScriptedEngine):
    """Refuses everybody at the door."""

    full: RequestError | None = FULL

    def check_open(self, client: int = 0, generates: bool = True) -> None:
        if self.full is not None and generates:
            raise self.full


class Served:
    """The application behind an acceptor.  `door`: where None, every request takes the long way."""

    limit, seconds = 1000, 30.0  # of connections, of headers

    def __init__(self, engine: ScriptedEngine, by_door: bool) -> None:
        self.log = RequestLog()
        self.app = build_app(engine, request_log=self.log)
        self.by_door = by_door

    async def __aenter__(self) -> Served:
        self.runner = web.AppRunner(self.app, **RUN_KWARGS)
        await self.runner.setup()
        assert self.runner.server is not None
        self.door: Door = self.app[DOOR]
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self.made: list[Connection] = []
        self.all = Connections(self.limit)
        door = self.door if self.by_door else None
        make = functools.partial(Connection, self.runner.server, self.seconds, self.log, self.all, door)

        def connection() -> Connection:
            self.made.append(make())
            return self.made[-1]

        self.acceptor = Acceptor(sock, connection, self.door, self.all)
        if not self.by_door:
            self.door._refused = float("-inf")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.acceptor.close()
        await self.runner.cleanup()

    async def connect(self, first: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection whose first bytes are there when it is accepted."""
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.sendall(first)
        sock.setblocking(False)
        return await asyncio.open_connection(sock=sock)


def play(scene: Callable[[Served], Awaitable[None]], engine: Callable[[], ScriptedEngine] = Full, by_door: bool = True) -> None:
    async def main() -> None:
        async with Served(engine(), by_door) as served:
            await scene(served)

    asyncio.run(main())


def request(path: str = CHAT, body: bytes = BODY, *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: t", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["Content-Length"]))


# ---------------- the same answer
@pytest.mark.parametrize("path", [p for p in ENDPOINTS if ENDPOINTS[p].generates])
def test_the_door_the_bytes_and_the_long_way_answer_alike(path: str) -> None:
    got: dict[str, Any] = {}

    def scene(way: str) -> Callable[[Served], Awaitable[None]]:
        async def run(served: Served) -> None:
            if way == "bytes":
                served.door._refused = float("inf")  # crowded for ever
            reader, writer = await served.connect(request(path, BODY, "X-Request-Id: mine"))
            status, headers, raw = await answer(reader)
            writer.close()
            metered = served.door._engine.metrics.responses
            assert len(served.made) == (way != "bytes"), "a transport was made for it"
            got[way] = (
                *(status, raw, {k.lower(): v for k, v in headers.items() if k not in ("Date", "Server", "Connection")}),
                *(dict(metered), dict(served.log.refused)),
            )

        return run

    play(scene("long"), by_door=False)
    play(scene("door"))
    play(scene("bytes"))
    assert got["long"] == got["door"] == got["bytes"]
    status, raw, headers, counted, refused = got["door"]
    assert (status, headers["retry-after"], headers["x-request-id"]) == (429, "3", "mine")
    assert "8 open requests" in json.loads(raw)["error"]["message"]
    assert counted == {("POST", path, 429): 1}
    assert refused == {(429, "server_overloaded"): 1}


def test_while_the_model_loads_the_door_says_503() -> None:
    async def scene(served: Served) -> None:
        served.door._engine._engine.full = model_loading()  # type: ignore[attr-defined]
        reader, writer = await served.connect()
        writer.write(request())
        status, headers, raw = await answer(reader)
        assert (status, headers["Retry-After"], json.loads(raw)["error"]["code"]) == (503, "2", "model_loading")
        writer.close()

    play(scene)


def test_a_client_of_the_sdk_kind_reads_the_refusal_whichever_way_it_went() -> None:
    async def scene(served: Served) -> None:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}") as session:
            for _ in range(3):
                for size in (10, 100_000, 3_000_000):
                    async with session.post(CHAT, json={"messages": [{"role": "user", "content": "x" * size}]}) as response:
                        raw = await response.read()
                        assert check_error(response.status, response.headers, raw)["code"] == "server_overloaded"

    play(scene, lambda: Full(max_body_bytes=8 << 20))


# ---------------- the body
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_refusal_does_not_wait_for_the_body_and_the_connection_goes_on_behind_it(path: str) -> None:
    async def scene(served: Served) -> None:
        reader, writer = await served.connect()
        await asyncio.sleep(0.01)
        for _ in range(3):
            writer.write(request(path, b"", length=50))
            assert (await answer(reader))[0] == 429
            writer.write(b"{" + b" " * 40)
            await asyncio.sleep(0)
            writer.write(b" " * 9)
        writer.write(b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n")
        assert (await answer(reader))[0] == 200
        assert len(served.made) == 1
        writer.close()

    play(scene)


def test_a_large_body_is_refused_before_it_comes_and_dropped() -> None:
    async def scene(served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(request(CHAT, b"", length=1 << 20))
        assert (await answer(reader))[0] == 429
        for _ in range(16):
            writer.write(b" " * (1 << 16))
            await writer.drain()
        writer.write(b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n")
        assert (await answer(reader))[0] == 200
        writer.close()

    play(scene, lambda: Full(max_body_bytes=8 << 20))


def test_who_asks_for_the_connections_end_gets_it() -> None:
    async def scene(served: Served) -> None:
        for crowded in (False, True):
            served.door._refused = float("inf") if crowded else float("-inf")
            reader, writer = await served.connect(request(CHAT, BODY, "Connection: close"))
            status, headers, _ = await answer(reader)
            assert (status, headers["Connection"]) == (429, "close")
            assert await reader.read() == b""
            writer.close()

    play(scene)


# ---------------- what is not for the door
@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (request("/tokenize", b'{"prompt": "a"}'), 200),  # does not wait for a slot
        (b"GET /v1/models HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n", 200),
        (request("/v1/unknown"), 404),
        (request(CHAT, BODY, f"Authorization: Bearer {KEY}x"), 401),
        (request(CHAT, BODY), 401),
    ],
)
def test_other_requests_are_answered_as_ever_in_the_largest_crowd(raw: bytes, status: int) -> None:
    keys = (KEY,) if status == 401 else ()

    async def scene(served: Served) -> None:
        served.door._refused = float("inf")
        reader, writer = await served.connect(raw)
        assert (await answer(reader))[0] == status
        writer.close()

    play(scene, lambda: Full(api_keys=keys))


def test_with_keys_a_refusal_is_for_the_client_with_that_key() -> None:
    class FullForOne(Full):
        seen: set[int] = set()

        def check_open(self, client: int = 0, generates: bool = True) -> None:
            self.seen.add(client)
            raise FULL

    async def scene(served: Served) -> None:
        for key in (KEY, KEY, "another-known-key"):
            reader, writer = await served.connect()
            writer.write(request(CHAT, BODY, f"Authorization: Bearer {key}"))
            assert (await answer(reader))[0] == 429
            writer.close()

    play(scene, lambda: FullForOne(api_keys=(KEY, "another-known-key")))
    assert len(FullForOne.seen) == 2


@pytest.mark.parametrize(
    "raw",
    [
        request()[:-1],  # not complete
        request() + b"G",  # more behind it
        request(CHAT, BODY, "Transfer-Encoding: chunked"),
        request(CHAT, BODY, f"Content-Length: {len(BODY)}"),
        request(CHAT, BODY, "Origin: http://a.page"),
        request(CHAT, BODY, "Expect: 100-continue"),
        request(CHAT, BODY, "No colon"),
        request(CHAT, BODY, " Folded: x"),
        request(CHAT, BODY, "Space : x"),
        request(f"{CHAT}?x=1"),
        request().replace(b"HTTP/1.1", b"HTTP/1.0"),
        request().replace(b"POST", b"PUT"),
        request().replace(b"\r\n", b"\n"),
        b"\r\n\r\n" + request(),
        b"",
        b"\xff\xfe\r\n\r\n",
    ],
)
def test_bytes_that_are_not_one_plain_request_are_left_to_the_parser(raw: bytes) -> None:
    async def scene(served: Served) -> None:
        assert served.door.refusal_of_bytes(request(), "1.2.3.4") is not None
        assert served.door.refusal_of_bytes(raw, "1.2.3.4") is None

    play(scene)


def test_pipelined_requests_are_answered_in_their_order() -> None:
    async def scene(served: Served) -> None:
        reader, writer = await served.connect()
        version = b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n"
        writer.write(version + request() + version + request())
        assert [(await answer(reader))[0] for _ in range(4)] == [200, 429, 200, 429]
        writer.close()

    play(scene)


# ---------------- the cost
def knock(served: Served, n: int, first: bytes = b"") -> list[socket.socket]:
    """Clients that have connected, and said something."""
    clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(n)]
    for c in clients:
        c.sendall(first)
    return clients


async def per_turn(served: Served, count: Callable[[], int], n: int) -> list[int]:
    """By how much a count grows in each turn of the loop, until it is `n`."""
    counts = [count()]

    def turn() -> None:
        counts.append(count())
        asyncio.get_running_loop().call_soon(turn)

    turn()
    while counts[-1] < n:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return [b - a for a, b in itertools.pairwise(counts)]


def test_a_turn_accepts_some_hears_some_and_lets_few_in_and_nobody_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "_ACCEPTED", 7)
    monkeypatch.setattr(lobby, "_HEARD", 5)
    monkeypatch.setattr(lobby, "_LET_IN", 3)

    async def scene(served: Served) -> None:
        waits, heard = served.acceptor._lobby, [0]
        hear = waits._hear

        def count(one: Waiting) -> bool | None:
            heard[0] += 1
            return hear(one)

        waits._hear = count
        silent = knock(served, 40)
        assert max(await per_turn(served, waits.__len__, 40)) == 7
        assert not served.made, "a transport was made for a client that has said nothing"
        speaking = knock(served, 40, b"G")
        assert max(await per_turn(served, lambda: len(served.made), 40)) == 3
        served.door._refused = float("inf")
        heard[0] = 0
        asking = knock(served, 40, request())
        assert max(await per_turn(served, lambda: heard[0], 40)) == 5
        assert len(served.made) == 40, "a transport was made for a client that is refused"
        assert len(waits) == 40
        for client in (*silent, *speaking, *asking):
            client.close()

    play(scene)


def test_connections_that_nobody_has_served_are_closed_at_the_end() -> None:
    async def scene(served: Served) -> None:
        clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
        served.acceptor._accept()
        served.acceptor.close()
        for task in list(served.acceptor._tasks):
            await task
        for made in served.made:
            made.force_close()
        await asyncio.sleep(0)
        for c in clients:
            c.settimeout(5)
            assert c.recv(1) == b""
            c.close()

    play(scene)


def test_without_descriptors_connections_wait_and_are_served_later(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[OSError] = []
    monkeypatch.setattr(acceptor, "_PAUSE", 0.001)

    class NoFiles:
        def __init__(self, sock: socket.socket) -> None:
            self.sock, self.failures = sock, 3

        def accept(self) -> Any:
            self.failures -= 1
            if self.failures >= 0:
                raise OSError(24, "Too many open files")
            return self.sock.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    async def scene(served: Served) -> None:
        served.all.no_descriptor = errors.append  # type: ignore[method-assign]
        served.acceptor._sock = NoFiles(served.acceptor._sock)  # type: ignore[assignment]
        reader, writer = await served.connect()
        writer.write(request())
        assert (await answer(reader))[0] == 429
        writer.close()

    play(scene)
    assert len(errors) == 3
