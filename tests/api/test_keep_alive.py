"""Streams that have nothing to say yet: their headers go out, and signs of life follow; what can be refused still is.

No test waits: `sweep` is what the server's only timer calls.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import openai
import pytest
from test_server import CHAT, COMPLETION, DIED, OVERLOADED, TEXT, USER, ScriptedEngine, Server, ask, check_error, client, play

from minisgl import LLM, SamplingParams
from minisgl.api.engine import TextPrompt
from minisgl.api.http.keep_alive import HELD_SWEEPS, KEEP_ALIVE, SWEEP_SECONDS, KeepAlive
from minisgl.api.http.stream_writer import TURN, StreamWriter, Turn
from minisgl.model.checkpoint.presets import random_shape

COMMENT, PING = b": keep-alive\n\n", b'event: ping\ndata: {"type":"ping"}\n\n'
RESPONSES, MESSAGES, NATIVE = "/v1/responses", "/v1/messages", "/generate"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER},
    COMPLETION: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": USER, "max_tokens": 9},
    NATIVE: {"text": "hi"},
}
ALIVE = dict.fromkeys(BODIES, COMMENT) | {MESSAGES: PING}
each_dialect = pytest.mark.parametrize("path", BODIES)


def keep_alive(http: Server) -> KeepAlive:
    return http._runner.app[KEEP_ALIVE]


async def turns(n: int = 20) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def sweep(http: Server, times: int = 1) -> None:
    for _ in range(times):
        keep_alive(http).sweep()
        await turns()


@asynccontextmanager
async def asked(engine: ScriptedEngine, http: Server, path: str) -> AsyncIterator[asyncio.Task[aiohttp.ClientResponse]]:
    """A streamed request that is with the engine and has no answer; the task ends with its headers."""
    before = len(engine.opened)
    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(session.post(http.make_url(path), json={**BODIES[path], "stream": True}))
        await engine.wait_for(lambda: len(engine.opened) > before)
        yield task
        (await task).close()


async def read(response: aiohttp.ClientResponse, end: bytes) -> bytes:
    """What comes until `end` does."""
    return await asyncio.wait_for(response.content.readuntil(end), 5)


@each_dialect
def test_headers_and_signs_of_life_come_before_the_first_token(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall = True
        async with asked(engine, http, path) as task:
            await sweep(http)
            assert not task.done(), "the headers went out before a refusal could have come"
            await sweep(http)
            response = await asyncio.wait_for(asyncio.shield(task), 5)
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream"
            assert "Server-Timing" not in response.headers
            head = {CHAT: b'"role":"assistant"', RESPONSES: b"response.in_progress"}
            await read(response, head.get(path, ALIVE[path]))
            for _ in range(2):
                await sweep(http, 2)
                assert (await read(response, ALIVE[path])).count(b"data: ") <= 1
            engine.go_on(99)
            rest = (await response.read()).decode()
            assert json.dumps(TEXT[-6:])[1:-1] in rest
            assert rest.endswith("\n\n")

    play(scene)


@each_dialect
@pytest.mark.parametrize("sweeps", [0, 1])
def test_what_is_refused_in_time_has_its_status(path: str, sweeps: int) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall = True
        async with asked(engine, http, path) as task:
            await sweep(http, sweeps)
            engine.live.pop(0)(OVERLOADED)
            response = await asyncio.wait_for(asyncio.shield(task), 5)
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert (await response.json())["error"]["message"] == OVERLOADED.message

    play(scene)


@each_dialect
def test_what_fails_after_the_headers_is_an_event_of_the_stream(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall = True
        async with asked(engine, http, path) as task:
            await sweep(http, 4)
            engine.live.pop(0)(DIED)
            response = await asyncio.wait_for(asyncio.shield(task), 5)
            raw = await response.read()
            assert response.status == 200
            found = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
            expected = {
                CHAT: DIED.body(),
                COMPLETION: DIED.body(),
                NATIVE: DIED.body(),
                MESSAGES: {"type": "error", "error": {"type": "api_error", "message": DIED.message}},
            }
            if path == RESPONSES:
                assert [(e["type"], e.get("message")) for e in found[-2:]] == [
                    ("error", DIED.message),
                    ("response.failed", None),
                ]
            else:
                assert found[-1] == expected[path]

    play(scene)


def test_a_prompt_that_has_not_reached_the_scheduler_is_waited_for_but_not_for_ever() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.with_scheduler = True, False
        async with asked(engine, http, CHAT) as task:
            await sweep(http, HELD_SWEEPS - 1)
            assert not task.done()
            await sweep(http)
            assert (await asyncio.wait_for(asyncio.shield(task), 5)).status == 200
            engine.go_on(99)

    play(scene)
    assert 10 <= HELD_SWEEPS * SWEEP_SECONDS <= 30, "proxies give up after 60 s"
    assert 2 <= 2 * SWEEP_SECONDS <= 5


def test_a_stream_that_has_something_to_say_gets_no_sign_of_life() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        async with asked(engine, http, CHAT) as task:
            response = await asyncio.wait_for(asyncio.shield(task), 5)
            assert "ttft" in response.headers["Server-Timing"]
            await read(response, b'"content":"Hel"')
            await sweep(http)  # the first piece is news
            engine.go_on(3)
            await turns()
            await sweep(http)
            engine.go_on(99)
            assert COMMENT not in await response.read()

    play(scene)


@each_dialect
def test_a_gap_in_an_answer_is_filled(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        async with asked(engine, http, path) as task:
            response = await asyncio.wait_for(asyncio.shield(task), 5)
            await read(response, b"Hel")
            await sweep(http, 2)
            assert ALIVE[path] in await read(response, ALIVE[path])
            engine.go_on(99)
            assert ALIVE[path] not in await response.read()

    play(scene)


def test_the_sdk_does_not_notice() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall = True

        async def swept(opening: Any) -> Any:
            engine.after = 0
            n, task = len(engine.opened), asyncio.create_task(opening)
            await engine.wait_for(lambda: len(engine.opened) > n)
            await sweep(http, 2)
            stream = await task
            await sweep(http, 4)
            engine.go_on(99)
            return stream

        async with client(http) as sdk:
            chat = await swept(sdk.chat.completions.create(model="tiny", messages=USER, stream=True))
            assert "".join([c.choices[0].delta.content or "" async for c in chat]) == TEXT
            plain = await swept(sdk.completions.create(model="tiny", prompt="hi", stream=True))
            assert "".join([c.choices[0].text async for c in plain]) == TEXT
            response = await swept(sdk.responses.create(model="tiny", input="hi", stream=True))
            seen = [e async for e in response]
            assert "".join(e.delta for e in seen if e.type == "response.output_text.delta") == TEXT
            assert seen[-1].type == "response.completed"

            engine.after, n = 0, len(engine.opened)
            failing = asyncio.create_task(sdk.completions.create(model="tiny", prompt="hi", stream=True))
            await engine.wait_for(lambda: len(engine.opened) > n)
            await sweep(http, 3)
            stream = await failing
            engine.live.pop(n)(DIED)
            with pytest.raises(openai.APIError, match=DIED.message):
                _ = [c async for c in stream]

    play(scene)


def test_an_answer_in_one_piece_keeps_its_status_however_long_it_takes() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall = True
        for path, body in BODIES.items():
            n, task = len(engine.opened), asyncio.create_task(ask(http, path, body))
            await engine.wait_for(lambda n=n: len(engine.opened) > n)  # type: ignore[misc]
            await sweep(http, HELD_SWEEPS + 1)
            assert not task.done()
            engine.live.pop(n)(OVERLOADED)
            status, headers, raw = await task
            assert status == 429
            assert path == MESSAGES or check_error(status, headers, raw)["code"] == "server_overloaded"

    play(scene)


def test_all_streams_share_one_timer_and_nothing_is_left_of_them() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        loop, made = asyncio.get_running_loop(), []
        later = loop.call_later

        def call_later(delay: float, *rest: Any, **more: Any) -> Any:
            made.extend([delay] if delay == SWEEP_SECONDS else [])
            return later(delay, *rest, **more)

        loop.call_later = call_later  # type: ignore[method-assign]
        async with asked(engine, http, CHAT) as a, asked(engine, http, COMPLETION) as b, asked(engine, http, NATIVE) as c:
            for task in (a, b, c):
                await asyncio.wait_for(asyncio.shield(task), 5)
            assert len(made) == 1
            await sweep(http)
            assert len(made) == 2
            engine.go_on(99)
        await engine.wait_for(lambda: len(engine.closed) == 3)
        await sweep(http)
        assert keep_alive(http)._streams == {}
        assert keep_alive(http)._timer is None
        assert len(made) == 2

    play(scene)


def test_a_client_that_leaves_before_the_headers_ends_its_request() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall = True
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(session.post(http.make_url(CHAT), json={"messages": USER, "stream": True}))
            await engine.wait_for(lambda: len(engine.opened) == 1)
            await sweep(http)
            task.cancel()
        await engine.wait_for(lambda: engine.closed == [0])
        await sweep(http, 3)

    play(scene)


class Transport:
    """Counts what is written; `unread`: bytes that the client has not read."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unread, self.closing = 0, False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.unread


@pytest.mark.parametrize("chunked", [True, False])
def test_a_client_that_does_not_read_or_has_left_gets_no_more_to_read(chunked: bool) -> None:
    async def main() -> None:
        transport = Transport()
        request: Any = SimpleNamespace(transport=transport, app={TURN: Turn()})
        answer: Any = SimpleNamespace(done=False, alive=COMMENT, listen=lambda wake: None)
        writer = StreamWriter(request, SimpleNamespace(chunked=chunked), answer)  # type: ignore[arg-type]
        writer.sweep()
        writer.sweep()
        assert transport.written == [], "nothing is written before the stream has begun"
        task = asyncio.create_task(writer.run())
        await turns(2)
        transport.unread = 10
        writer.sweep()
        transport.unread, transport.closing = 0, True
        writer.sweep()
        assert transport.written == []
        transport.closing = False
        writer.sweep()
        assert transport.written == [b"e\r\n%b\r\n" % COMMENT if chunked else COMMENT]
        task.cancel()

    asyncio.run(main())


def test_a_request_is_accepted_when_the_scheduler_has_it() -> None:
    spec = replace(random_shape("qwen3-0.6b"), name="fake", format="fake", vocab_size=256)  # every byte is a token
    with LLM(spec, processes=False, kv_tokens=512, max_context=128) as llm:
        gateway, said = llm.system.gateway, []
        uid = gateway.open(TextPrompt("Once upon a time"), SamplingParams(max_tokens=4), said.append)
        assert not gateway.accepted(uid)
        while gateway.open_requests and not gateway.accepted(uid):
            llm.system.pump(0)
        assert gateway.open_requests == 1
        assert said == []
        while gateway.open_requests:
            llm.system.pump(0)
        assert gateway.accepted(uid)
