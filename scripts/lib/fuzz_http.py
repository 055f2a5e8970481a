"""Whole requests, as bytes on a connection: a target of the fuzzer.  See fuzz_targets.py.

Every input is tried three times: in a quiet house, in a crowd at the door, and in a crowd without the door.  Each time the
answers must be well formed, or the connection closed; and the door answers as the long way behind it does.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import socket
from functools import cache
from typing import Any

from minisgl.config import Config, EngineConfig, ServerConfig
from minisgl.errors import RequestError

KEY = "a-key"
SECONDS = 10.0  # to the end of a connection whose client sends no more
FULL = RequestError("The server has 8 requests waiting; try again in 5 s.", status=429, code="server_overloaded", retry_after=5)
_HEAD = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d) [ -~]*\r\n((?:[!-9;-~]+:[^\r\n\0]*\r\n)*)\r\n")
_MADE_UP = re.compile(rb"[0-9a-f]{32}")
_SAME = (b"content-type", b"retry-after", b"x-request-id", b"www-authenticate", b"allow")


class NotServed(Exception):
    """The answer was an error, or there was none."""


class Answer:
    """One answer: `status`, `headers` by lower-case names, `body`."""

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def essence(self) -> tuple[Any, ...]:
        """What two ways must agree on, which is not the name of a request that its client has not named."""
        same = {name: value for name, value in self.headers.items() if name in _SAME and not _MADE_UP.fullmatch(value)}
        return self.status, same, self.body


def answers(said: bytes) -> list[Answer]:
    """The answers on a connection that has ended.  Raises ValueError where they are not well formed."""
    out, at = list[Answer](), 0
    while at < len(said):
        if (head := _HEAD.match(said, at)) is None:
            raise ValueError(f"this begins no answer: {said[at : at + 80]!r}")
        lines = [line.partition(b":") for line in head[2].split(b"\r\n")[:-1]]
        headers, at = {name.lower(): value.strip() for name, _, value in lines}, head.end()
        if b"content-length" in headers:
            size = int(headers[b"content-length"])
            body = said[at : at + size]
            if len(body) < size:
                raise ValueError(f"{size} bytes were announced, {len(body)} came")
        elif headers.get(b"transfer-encoding") == b"chunked":
            size = said.index(b"0\r\n\r\n", at) + 5 - at
            body = said[at : at + size]
        else:
            body = said[at:] if head[1] != b"100" else b""
            size = len(body)
        at += size
        out.append(Answer(int(head[1]), headers, body))
    return out


class House:
    """The server in one thread: application, acceptor, and an engine that computes while somebody waits."""

    def __init__(self) -> None:
        from aiohttp import web

        from minisgl.api.http.acceptor import Acceptor
        from minisgl.api.http.app import RUN_KWARGS, build_app
        from minisgl.api.http.connection import Connection
        from minisgl.api.http.connection_limits import Connections
        from minisgl.api.http.door import DOOR
        from minisgl.api.in_process import InProcessSystem
        from minisgl.model.checkpoint.resolve import fake_model

        engine = EngineConfig(page_size=4, max_running=4, step_tokens=64, kv_tokens=4096)
        self.system = InProcessSystem(Config(fake_model(), engine, ServerConfig(api_keys=(KEY,))))
        self.system.wait_ready()
        self.loop = asyncio.new_event_loop()
        app = build_app(self.system.gateway)
        self.door = app[DOOR]
        self.full = self.by_door = False
        check = self.door._engine._engine.check_open

        def check_open(client: int = 0, generates: bool = True) -> None:
            if self.full and generates:
                raise FULL
            check(client, generates)

        setattr(self.system.gateway, "check_open", check_open)  # noqa: B010
        runner = web.AppRunner(app, access_log=None, **RUN_KWARGS)
        self.all = Connections()

        async def start() -> None:
            await runner.setup()
            if runner.server is None:
                raise RuntimeError("the runner has been set up")
            make = functools.partial(Connection, runner.server, 30.0, None, self.all)
            sock = socket.create_server(("127.0.0.1", 0))
            self.acceptor = Acceptor(sock, lambda: make(self.door if self.by_door else None), self.door, self.all)

        async def end() -> None:
            self.acceptor.close()
            await runner.cleanup()
            self.system.close()

        self._end = end
        self.loop.run_until_complete(start())

    def close(self) -> None:
        self.loop.run_until_complete(self._end())
        self.loop.close()

    def ask(self, raw: bytes, full: bool, by_door: bool) -> bytes:
        """All that is said to a client that says this and no more, until the connection's end.  Raises TimeoutError."""
        self.full, self.by_door = full, by_door
        self.door._refused = float("inf" if full and by_door else "-inf")
        return self.loop.run_until_complete(self._ask(raw))

    async def _ask(self, raw: bytes) -> bytes:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        writer.write(raw)
        self.acceptor._lobby.enter(theirs, "1.2.3.4")
        for _ in range(10):  # what is said is heard before the end is
            await asyncio.sleep(0)
        writer.write_eof()
        said, end = asyncio.ensure_future(reader.read()), self.loop.time() + SECONDS
        try:
            while (not said.done() or len(self.all)) and self.loop.time() < end:
                for _ in range(100):
                    if not self.system.pump(0):
                        break
                await asyncio.sleep(0)
            if not said.done() or len(self.all) or self.system.gateway.open_requests:
                raise TimeoutError(f"the connection has no end, or left something behind: {said!r:.200}")
            return b"" if said.exception() is not None else said.result()  # reset: the server had enough
        finally:
            said.cancel()
            writer.close()


@cache
def house() -> House:
    return House()


def try_http(raw: bytes) -> None:
    """Raises NotServed, which is no finding."""
    quiet = _heard(raw, full=False, by_door=True)
    at_door, long_way = (_heard(raw, full=True, by_door=by_door) for by_door in (True, False))
    if at_door and long_way:
        ours, theirs = at_door[0].essence, long_way[0].essence
        if ours != theirs:
            raise RuntimeError(f"the door answers {ours!r}, the long way {theirs!r}")
    if not quiet or quiet[0].status >= 400:
        raise NotServed(quiet[0].status if quiet else "nothing")


def _heard(raw: bytes, full: bool, by_door: bool) -> list[Answer]:
    said = house().ask(raw, full, by_door)
    if b"HEAD " in raw.upper():  # its answer has no body, whatever it announces
        if said and not said.startswith(b"HTTP/1."):
            raise ValueError(f"this begins no answer: {said[:80]!r}")
        return []
    heard = answers(said)
    if any(answer.status == 500 for answer in heard):
        raise RuntimeError(f"a server error: {said[:500]!r}")
    return heard


def close_house() -> None:
    if house.cache_info().currsize:
        house().close()
        house.cache_clear()


# ---------------- inputs
def requests() -> list[bytes]:
    """As clients write them."""
    prompt, chat = {"prompt": "abc", "max_tokens": 3}, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    key = f"Authorization: Bearer {KEY}"
    return [
        *(b"GET %b HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n" % path for path in (b"/health", b"/docs", b"/ready")),
        *(_post(path, prompt, key) for path in ("/v1/completions", "/tokenize")),
        _post("/v1/chat/completions", chat, key, "X-Request-Id: mine", "Accept: */*", "User-Agent: OpenAI/Python 1.99"),
        _post("/v1/chat/completions", {**chat, "stream": True}, key, "Connection: keep-alive"),
        _post("/v1/messages", chat, f"x-api-key: {KEY}", "anthropic-version: 2023-06-01"),
        _post("/v1/completions", prompt, key) + _post("/v1/completions", prompt, key),
        b"POST /tokenize HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n%b\r\n\r\n"
        % key.encode()
        + b'5\r\n{"pro\r\nd\r\nmpt": "abc"} \r\n0\r\n\r\n',
    ]


def _post(path: str, body: dict[str, Any], *headers: str) -> bytes:
    raw = json.dumps(body)
    lines = (f"POST {path} HTTP/1.1", "Host: t", "Content-Type: application/json", *headers, f"Content-Length: {len(raw)}")
    return "\r\n".join((*lines, "", raw)).encode()


_LINES = [
    *(
        b"X-A: \xff\xfe",
        b"X-A : b",
        b" folded: x",
        b"\tfolded",
        b"No colon",
        b": none",
        b"X-A:",
        b"X-A: \x01",
        b"X-A: \xc3\xa9",
    ),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Content-Length: 3", b"Content-Length: +3"),
    *(b"Content-Length: 0x3", b"Content-Length: 3, 3", b"Content-Length: -1", b"Expect: 100-continue", b"Upgrade: websocket"),
    *(
        b"Connection: Upgrade",
        b"Connection: close",
        b"Connection: keep-alive, x",
        b"Origin: http://a.page",
        b"Host: u",
        b"Host:",
    ),
    *(b"Authorization: Bearer wrong", b"authorization:   bearer   a-key  ", b"Authorization: Basic eA==", b"x-api-key: a-key"),
    *(b"X-Request-Id: \t me ", b"x-request-id: a b", b"Sec-WebSocket-Key1: 1", b"Content-Encoding: gzip", b"HTTP2-Settings: x"),
    *(b"X-Long: " + b"a" * 9000, b"Anthropic-Version: 1", b"Content-Type: text/plain", b"Forwarded: for=9.9.9.9", b"X-A: b\rc"),
    *(
        b"X-A: \xc3\xa9",
        b"Host: u",
        b"x:y",
        b"!#$%&'*+.^_`|~: a",
        b"Accept-Encoding: gzip, br",
        b"Connection: TE, close",
        b"TE: trailers",
        b"Cookie: a=b; c",
    ),
]
_FIRST = [
    *(b"post /v1/completions HTTP/1.1", b"POST http://t/v1/completions HTTP/1.1", b"POST /v1/completions HTTP/1.0"),
    *(b"POST /v1/completions", b"POST  /v1/completions HTTP/1.1", b"POST /v1/completions HTTP/1.1 ", b"POST * HTTP/1.1"),
    *(b"POST /v1/completions/ HTTP/1.1", b"POST /v1/completions?a=b HTTP/1.1", b"POST /v1/%63ompletions HTTP/1.1"),
    *(
        b"PUT /v1/completions HTTP/1.1",
        b"OPTIONS /v1/completions HTTP/1.1",
        b"POST /v1/completions HTTP/2.0",
        b"POST / HTTP/1.1",
    ),
    *(
        b"POST //v1/completions HTTP/1.1",
        b"POST /v1/completions#x HTTP/1.1",
        b"POST /v1/completions HTTP/0.9",
        b"",
        b"GET /",
        b"POST / HTTP/1.1",
    ),
]


def change_http(raw: bytes, rng: random.Random) -> bytes:
    """Another first line, headers that are odd, twice there, folded or gone, other ends of lines, more or less behind it."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        head, end, body = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        at = rng.randrange(len(lines))
        match rng.randrange(9):
            case 0:
                lines[0] = rng.choice(_FIRST)
            case 1 | 2 | 3:
                lines.insert(rng.randint(1, len(lines)), rng.choice(_LINES))
            case 4:
                lines.insert(at, lines[at])
            case 5:
                del lines[at]
            case 6:
                name, colon, value = lines[at].partition(b":")
                space = rng.choice((b"", b"  ", b"\t", b" \t ", b"\x0b", b"\xa0", b"\r\n "))
                lines[at] = rng.choice((name.upper(), name.lower())) + colon + space + value.strip() + rng.choice((b"", space))
            case 7:
                body = rng.choice((body[:-1], body + b"x", body + raw, b"", body + b"\r\n"))
            case _:
                lines[-1] += rng.choice((b"\n", b"\r", b"\r\n\r\n", b"\0"))
        raw = b"\r\n".join(lines) + end + body
    return raw
