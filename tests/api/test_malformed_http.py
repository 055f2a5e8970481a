"""Bytes that are not HTTP, or not all of it: every one gets an error body, or the connection ends; none is quoted anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import COMPLETION, ScriptedEngine, Server, play

from minisgl.api.batches.store import Store

SECRET = b"sk-very-secret"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


async def say(http: Server, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of what the server answers to bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        for _ in range(5):
            await asyncio.sleep(0)
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        first, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), 5)
    finally:
        writer.close()
    return int(first.split(" ")[1]), headers, body


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        ([b"GARBAGE " + SECRET + b"\r\n\r\n"], 400, "invalid_http"),
        ([b"GET /health HTTP/9.9\r\nAuthorization: " + SECRET + b"\r\n\r\n"], 400, "invalid_http"),
        ([b"GET /health HTTP/1.1\r\nHost: t\r\n" + SECRET + b"\r\n\r\n"], 400, "invalid_http"),
        ([b"GET /health HTTP/1.1\r\nAuthorization: " + SECRET + b"\x00\r\n\r\n"], 400, "invalid_http"),
        ([b"GET /health HTTP/1.1\r\nAuthorization: " + SECRET * 2000 + b"\r\n\r\n"], 431, "header_too_large"),
        ([b"GET /" + SECRET * 2000 + b" HTTP/1.1\r\n\r\n"], 431, "header_too_large"),
        ([b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 40_000 + b"\r\n"], 400, "invalid_http"),
        ([b"GET /health HTTP/1.1\r\n\r\n"], 400, "invalid_http"),  # without Host
        ([b"GET http://[::1/" + SECRET + b" HTTP/1.1\r\nHost: t\r\n\r\n"], 400, "invalid_http"),
        ([POST + b"Content-Length: " + SECRET + b"\r\n\r\n"], 400, "invalid_http"),
        ([POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"], 400, "invalid_http"),
        ([POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"], 400, "invalid_http"),
        ([CHUNKED + SECRET + b"\r\n\r\n"], 400, "invalid_http"),
        ([CHUNKED, SECRET + b"\r\n\r\n"], 400, "invalid_http"),  # its handler has begun to read
        ([CHUNKED + b"2\r\n{}\r\n", SECRET + b"\r\n\r\n"], 400, "invalid_http"),
        ([CHUNKED + b"2\r\n{}\r\n", b"2\r\n{}" + SECRET], 400, "invalid_http"),  # behind a chunk
        ([CHUNKED + b"2\r\n{}\r\n", b"0\r\n" + SECRET + b"\r\n\r\n"], 400, "invalid_http"),  # in a trailer
        ([CHUNKED + b"2\r\n{}\r\n"], 408, "request_timeout"),  # and no more
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + SECRET], 400, "invalid_http"),  # TLS
        ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], 400, "invalid_http"),
        ([b"GET /health HTTP/2.0\r\nHost: t\r\n\r\n"], 400, "invalid_http"),
        ([b"GET /health HTTP/0.9\r\n\r\n"], 400, "invalid_http"),
        ([b"GET /health\r\n\r\n"], 400, "invalid_http"),
    ],
)
def test_what_is_not_http_gets_an_error_body_that_quotes_nothing(
    pieces: list[bytes], status: int, code: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.api.http.body._BODY_SECONDS", 0.3)

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        got, headers, body = await say(http, *pieces)
        assert got == status
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
        assert headers["content-type"].startswith("application/json")
        assert headers["x-request-id"]
        assert SECRET not in body
        assert (await say(http, b"GET /health HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"))[0] == 200

    with caplog.at_level(logging.DEBUG):
        engine = play(scene)
    assert not engine.opened
    assert SECRET.decode() not in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", [COMPLETION, "/v1/messages", "/v1/files"])
def test_a_body_that_breaks_off_in_bad_bytes_gets_one_answer_and_its_connection_ends(path: str, tmp_path: Path) -> None:
    kind = b"multipart/form-data; boundary=x" if path == "/v1/files" else b"application/json"
    head = b"POST " + path.encode() + b" HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nContent-Type: %s\r\n\r\n" % kind

    async def main() -> None:
        http = Server(ScriptedEngine(), store=Store(str(tmp_path)))
        await http.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        for piece in (head, b"5\r\n--x\r\n\r\n", SECRET + b"\r\nGET /health HTTP/1.1\r\nHost: t\r\n\r\n"):
            writer.write(piece)
            await writer.drain()
            for _ in range(5):
                await asyncio.sleep(0)
        said = await asyncio.wait_for(reader.read(), 5)  # to the end of the connection, long before a body may be late
        writer.close()
        await http.close()
        head_, body = said.split(b"\r\n\r\n")
        assert head_.startswith(b"HTTP/1.1 400 ")
        assert b"connection: close" in head_.lower()
        told = json.loads(body)
        assert told["error"]["message"].startswith("The request is not HTTP/1.1: ")
        assert ("code" in told["error"]) is (path != "/v1/messages")  # whose errors have another shape
        assert SECRET not in said

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(
    st.binary(min_size=1, max_size=200)
    | st.tuples(st.integers(0, len(CHUNKED) - 1), st.integers(0, 255)).map(
        lambda c: CHUNKED[: c[0]] + bytes([c[1]]) + CHUNKED[c[0] + 1 :] + b'e\r\n{"prompt":"x"}\r\n0\r\n\r\n'
    )
)
def test_whatever_bytes_come_the_connection_ends_and_the_server_goes_on(raw: bytes) -> None:
    async def main() -> None:
        http = Server(ScriptedEngine(), header_seconds=0.05)
        await http.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        writer.write(raw)
        writer.write_eof()
        said = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert not said or said.startswith(b"HTTP/1.")
        assert b" 500 " not in said[:20]
        assert b"Traceback" not in said
        await http.close()

    asyncio.run(main())


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for head in (POST + b"Content-Length: 100\r\n\r\n{", CHUNKED + b"5\r\n{"):
            _, writer = await asyncio.open_connection("127.0.0.1", http.port)
            writer.write(head)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        assert (await say(http, b"GET /health HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"))[0] == 200

    with caplog.at_level(logging.INFO):
        assert not play(scene).opened
    assert "Traceback" not in caplog.text


def test_requests_that_come_together_are_answered_in_their_order() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        get = b"GET /%s HTTP/1.1\r\nHost: t\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        writer.write(get % b"health" + b"\r\n" + get % b"nothing" + b"\r\n" + get % b"ready" + b"Connection: close\r\n\r\n")
        said = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert said.count(b"HTTP/1.1 ") == 3
        assert said.index(b" 200 OK") < said.index(b" 404 ") < said.rindex(b" 200 OK")

    play(scene)


def test_a_method_or_path_that_is_not_there_is_told_which_are() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        close = b" HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"
        status, headers, body = await say(http, b"DELETE " + COMPLETION.encode() + close)
        assert (status, headers["allow"], json.loads(body)["error"]["code"]) == (405, "POST", "method_not_allowed")
        status, _, body = await say(http, b"POST /v1/chat/completion" + close)
        assert status == 404
        assert "/v1/chat/completions" in json.loads(body)["error"]["message"]

    play(scene)
