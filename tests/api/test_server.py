"""The HTTP server in front of a scripted engine: real sockets, real OpenAI clients, exact bytes."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from conftest import fake_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from test_openai_validation import FIELDS, JSON

import minisgl
from minisgl import __version__, grammar
from minisgl.actors.messages import Journal, Journaled
from minisgl.api.batches.store import Store
from minisgl.api.cache_reasons import CacheReasons
from minisgl.api.endpoints.table import ENDPOINTS
from minisgl.api.engine import Chunk, Kept, OnChunk, Prompt, TextPrompt, TokenLogprob
from minisgl.api.generation import Generation, complete
from minisgl.api.http.app import RUN_KWARGS, build_app
from minisgl.api.http.connection import Connection
from minisgl.api.journals import Journals
from minisgl.api.rendering import json_pieces
from minisgl.api.request_log import RequestLog
from minisgl.api.requests.openai import served_names
from minisgl.config import Config, ServerConfig
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import DEFAULT_OPTIONS, MAX_SEED, Finish, RequestOptions, SamplingParams

USER = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PIECES = ("Hel", "", "lo", " wörld\u2028")  # one token each; the second is held back
TEXT = "".join(PIECES)
OVERLOADED = RequestError("full", status=429, code="server_overloaded", retry_after=1)
DIED = RequestError("The engine failed.", status=500, code="engine_error")


class ScriptedEngine:
    """Answers every prompt with PIECES, one a turn of the loop, and then follows its script.

    refuse: raised by `open`, once `admit` requests are open.   error: told after `after` pieces.
    stall:  silence after `after` pieces, until `go_on`.   finish: what the last chunk says.   with_scheduler: see `accepted`.
    """

    def __init__(self, **server: Any) -> None:
        names = ("tiny", "org/alias")
        self.config = Config(fake_spec(), server=ServerConfig(**{"served_names": names, "max_body_bytes": 4096, **server}))
        self.kept = Kept()
        self.cache_reasons = CacheReasons(self.config)
        self.state = "ready"
        self.refuse: RequestError | Exception | None = None
        self.admit = 0
        self.error: Any = None
        self.stall = False
        self.with_scheduler = True
        self.after = 0
        self.finish = Finish.STOP
        self.opened: list[tuple[Prompt, SamplingParams]] = []
        self.closed: list[int] = []
        self.live: dict[int, OnChunk] = {}
        self.stats = {"running_requests": 0}
        self.tokenizer_info: dict[str, Any] = {}
        self.flushed = False
        self.down: list[str] = []
        self.stuck: list[str] = []
        self.restarts: dict[str, int] = {}
        self.journals = Journals(SimpleNamespace(send=self._journal), self.config.server)
        self.changed = asyncio.Condition()
        self.tasks: list[asyncio.Task[None]] = []

    def flush_cache(self) -> None:
        self.flushed = True

    def _journal(self, _: str, m: Journal) -> None:
        asyncio.get_running_loop().call_soon(self.journals.said, Journaled(m.path, m.on, ""))

    def still(self, seconds: float) -> list[str]:
        return self.stuck

    @property
    def open_requests(self) -> int:
        return len(self.live)

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        if self.refuse is not None and len(self.opened) >= self.admit:
            raise self.refuse
        uid = len(self.opened)
        self.opened.append((prompt, params))
        self.live[uid] = on_chunk
        self._changed()
        asyncio.get_running_loop().call_soon(self._piece, uid, 0)
        return uid

    def _piece(self, uid: int, at: int) -> None:
        if uid not in self.live:
            return
        if at >= self.after and self.error is not None:
            self.live.pop(uid)(self.error)
        elif at >= self.after and self.stall:
            return
        else:
            last = at == len(PIECES) - 1
            told = self._told(self.opened[uid][1], at)
            self.live[uid](Chunk(PIECES[at], (at,), self.finish if last else Finish.NONE, 3, 2, told))
            if last:
                del self.live[uid]
            else:
                asyncio.get_running_loop().call_soon(self._piece, uid, at + 1)

    def _told(self, params: SamplingParams, at: int) -> tuple[TokenLogprob, ...]:
        """What is said of a token, if that was asked for: half a character, and an alternative with the token's own text."""
        if params.logprobs is None:
            return ()
        top = ((9, b"\xe2\x82", -0.25), (8, b"\xff", -0.5), (7, b"b", -3.0))[: params.logprobs]
        first = (TokenLogprob(5, b"P", None, 0, ()),) if params.echo and at == 0 else ()
        return (*first, TokenLogprob(at, (b"Hel", b"\xe2", b"lo", b"end")[at], -1.0 - at, at + 1, top))

    def check_open(self, client: int = 0, generates: bool = True) -> None: ...

    def tokenize(self, prompt: Prompt, take: Callable[[Any], None], options: RequestOptions = DEFAULT_OPTIONS) -> int:
        """Every character is a token."""
        text = prompt.text if isinstance(prompt, TextPrompt) else "a chat"
        asyncio.get_running_loop().call_soon(take, tuple(map(ord, text)))
        return -1

    def detokenize(
        self, ids: Any, skip_special: bool, take: Callable[[Any], None], options: RequestOptions = DEFAULT_OPTIONS
    ) -> int:
        asyncio.get_running_loop().call_soon(take, "".join(map(chr, ids)))
        return -1

    def check_grammar(
        self, text: str, field: str, take: Callable[[Any], None], options: RequestOptions = DEFAULT_OPTIONS
    ) -> int:
        """Without a vocabulary."""
        try:
            answer: Any = grammar.resolved(text)
            grammar.check(answer, field)
        except RequestError as e:
            answer = InvalidParam(field, e.message, e.code or "")
        asyncio.get_running_loop().call_soon(take, answer)
        return -1

    def accepted(self, uid: int) -> bool:
        return self.with_scheduler

    def go_on(self, after: int) -> None:
        """Say the pieces up to `after`."""
        at, self.after = self.after, after
        for uid in list(self.live):
            self._piece(uid, at)

    def close(self, uid: int) -> None:
        if uid < 0:
            return
        self.closed.append(uid)
        self.live.pop(uid, None)
        self._changed()

    def _changed(self) -> None:
        async def notify() -> None:
            async with self.changed:
                self.changed.notify_all()

        self.tasks.append(asyncio.get_running_loop().create_task(notify()))

    async def wait_for(self, fact: Callable[[], bool]) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(fact), 5)


class Server:
    """The application as the product runs it, on a port of the kernel's choice."""

    def __init__(self, engine: ScriptedEngine, header_seconds: float = 30.0, store: Store | None = None) -> None:
        self._seconds = header_seconds
        self.request_log = RequestLog(engine.config.server.log_requests)
        app = build_app(engine, batch_socket="ipc://somewhere", store=store, request_log=self.request_log)
        self._runner = web.AppRunner(app, **RUN_KWARGS)
        self.port = 0

    async def start(self) -> None:
        await self._runner.setup()
        assert self._runner.server is not None
        make = functools.partial(Connection, self._runner.server, self._seconds, self.request_log)
        self._listener = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    def connections(self) -> list[Any]:
        assert self._runner.server is not None
        return self._runner.server.connections

    def make_url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def close(self) -> None:
        self._listener.close()
        await self._runner.cleanup()


Scene = Callable[[ScriptedEngine, Server], Awaitable[None]]


def play(scene: Scene, make: type[ScriptedEngine] = ScriptedEngine, **server: Any) -> ScriptedEngine:
    """Run a scene against a live server; afterwards nothing may be open, and everything closed exactly once."""

    async def main() -> ScriptedEngine:
        engine = make(**server)
        http = Server(engine)
        await http.start()
        try:
            await scene(engine, http)
        finally:
            await http.close()
        assert sorted(engine.closed) == list(range(len(engine.opened))), "every request is closed exactly once"
        assert not engine.live
        return engine

    return asyncio.run(main())


async def ask(http: Server, path: str, body: Any = None, method: str = "POST", **kw: Any) -> tuple[int, Any, bytes]:
    """(status, headers, body); a dict is sent as JSON."""
    if isinstance(body, dict):
        kw["json"] = body
    elif body is not None:
        kw["data"] = body
        kw.setdefault("headers", {"Content-Type": "application/json"})
    async with aiohttp.ClientSession() as session, session.request(method, http.make_url(path), **kw) as response:
        return response.status, response.headers, await response.read()


def check_error(status: int, headers: Any, raw: bytes) -> dict[str, Any]:
    """A well-formed OpenAI error; returns its inside."""
    body = json.loads(raw)
    assert status >= 400
    assert headers["Content-Type"].startswith("application/json")
    assert headers["x-request-id"]
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["code"], str | None)
    return body["error"]


def events(raw: bytes) -> list[Any]:
    """The payloads of a stream, whose form is checked to the byte."""
    assert raw.endswith(b"data: [DONE]\n\n")
    blocks = raw.split(b"\n\n")
    assert blocks.pop() == b""
    assert blocks.pop() == b"data: [DONE]"
    assert all(b.startswith(b"data: {") and b.isascii() and len(b.splitlines()) == 1 for b in blocks)
    return [json.loads(b[6:]) for b in blocks]


def client(http: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=http.make_url("/v1"), api_key="none", max_retries=0)


# ---------------- the OpenAI SDK, unmodified
def test_the_sdk_reads_a_chat_answer() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            answer = await sdk.chat.completions.create(model="org/alias", messages=USER, max_completion_tokens=7)
        assert answer.choices[0].message.content == TEXT
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model == "tiny"
        assert answer.id.startswith("chatcmpl-")
        assert answer.system_fingerprint == f"minisgl-{__version__}"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)
        assert answer.usage.prompt_tokens_details.cached_tokens == 2
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
        assert engine.opened[0][1].max_tokens == 7

    play(scene)


def test_the_sdk_reads_a_chat_stream() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            stream = await sdk.chat.completions.create(
                model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
            )
            chunks = [c async for c in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert chunks[0].choices[0].delta.role == "assistant"
        assert len({(c.id, c.created, c.model) for c in chunks}) == 1
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens == 7

    play(scene)


def test_the_sdk_reads_completions_streamed_and_whole() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.finish = Finish.LENGTH
        async with client(http) as sdk:
            answer = await sdk.completions.create(model="tiny", prompt=["a", "b"], stop=["x"])
            stream = await sdk.completions.create(model="tiny", prompt=["a", "b"], stream=True)
            chunks = [c async for c in stream]
        assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, TEXT, "length"), (1, TEXT, "length")]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 8)
        assert engine.opened[0] == (TextPrompt("a"), SamplingParams(max_tokens=16, stop=("x",)))
        for index in (0, 1):
            mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
            assert "".join(c.text for c in mine) == TEXT
            assert mine[-1].finish_reason == "length"
            assert all(c.finish_reason is None for c in mine[:-1])

    play(scene)


BYTES = [list(t) for t in (b"Hel", b"\xe2", b"lo", b"end")]


def test_the_sdk_reads_the_log_probabilities_of_a_chat_streamed_and_whole() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            ask = {"model": "tiny", "messages": USER, "logprobs": True, "top_logprobs": 2}
            answer = await sdk.chat.completions.create(**ask)
            plain = await sdk.chat.completions.create(**{**ask, "top_logprobs": 0})
            chunks = [c async for c in await sdk.chat.completions.create(**ask, stream=True)]
        (choice,) = answer.choices
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert [(t.token, t.logprob, t.bytes) for t in content] == [
            ("Hel", -1.0, BYTES[0]),
            ("\ufffd", -2.0, BYTES[1]),
            ("lo", -3.0, BYTES[2]),
            ("end", -4.0, BYTES[3]),
        ]
        assert [(t.token, t.logprob, t.bytes) for t in content[0].top_logprobs] == [
            ("\ufffd", -0.25, [226, 130]),
            ("\ufffd", -0.5, [255]),
        ]
        assert choice.logprobs.refusal is None
        assert [t.top_logprobs for t in (plain.choices[0].logprobs.content or [])] == [[]] * 4
        streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
        assert streamed == content
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == TEXT
        assert chunks[-1].choices[0].logprobs is None
        assert [p.logprobs for _, p in engine.opened] == [2, 0, 2]

    play(scene)


def test_the_sdk_reads_the_log_probabilities_of_a_completion_with_its_prompt() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            ask = {"model": "tiny", "prompt": "P", "logprobs": 2, "echo": True}
            answer = await sdk.completions.create(**ask)
            chosen = await sdk.completions.create(**{**ask, "logprobs": 0, "echo": False})
            chunks = [c async for c in await sdk.completions.create(**ask, stream=True)]
        told = answer.choices[0].logprobs
        assert told is not None
        assert told.tokens == ["P", "Hel", "\ufffd", "lo", "end"]
        assert told.token_logprobs == [None, -1.0, -2.0, -3.0, -4.0]
        assert told.text_offset == [0, 1, 2, 3, 4]
        # Of alternatives with one text the likelier stays, and the token itself is among them.
        assert told.top_logprobs == [
            None,
            {"\ufffd": -0.25, "Hel": -1.0},
            {"\ufffd": -0.25},
            {"\ufffd": -0.25, "lo": -3.0},
            {"\ufffd": -0.25, "end": -4.0},
        ]
        alone = chosen.choices[0].logprobs
        assert alone is not None
        assert (alone.token_logprobs, alone.top_logprobs) == ([-1.0, -2.0, -3.0, -4.0], None)
        parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for p in parts for x in getattr(p, name)] == getattr(told, name)

    play(scene)


def test_several_answers_to_a_prompt_have_seeds_of_their_own_and_count_the_prompt_once() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            create = sdk.chat.completions.create
            answer = await create(model="tiny", messages=USER, n=3, seed=MAX_SEED - 1)
            options = {"include_usage": True}
            chunks = [c async for c in await create(model="tiny", messages=USER, n=2, stream=True, stream_options=options)]
            batch = await sdk.completions.create(model="tiny", prompt=["a", "b"], n=2, best_of=2, seed=5)
        assert [(c.index, c.message.content) for c in answer.choices] == [(i, TEXT) for i in range(3)]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
        assert answer.usage.prompt_tokens_details.cached_tokens == 2
        assert [p.seed for _, p in engine.opened[:5]] == [MAX_SEED - 1, MAX_SEED, -MAX_SEED, None, None]
        for index in (0, 1):
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
            assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
            assert "".join(c.delta.content or "" for c in mine) == TEXT
            assert mine[-1].finish_reason == "stop"
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 8)
        assert [c.index for c in batch.choices] == [0, 1, 2, 3]
        assert (batch.usage.prompt_tokens, batch.usage.completion_tokens) == (6, 16)
        assert [(p.text, q.seed) for p, q in engine.opened[5:]] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]  # type: ignore[union-attr]

    play(scene)


def test_more_answers_than_the_server_admits_are_refused_for_good() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path, body in ((CHAT, {"messages": USER, "n": 5}), (COMPLETION, {"prompt": ["a", "b"], "n": 3})):
            status, headers, raw = await ask(http, path, body)
            assert (status, check_error(status, headers, raw)["param"]) == (400, "n")

    assert not play(scene, max_open_requests=4).opened


def test_the_sdk_lists_and_retrieves_models() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            models = (await sdk.models.list()).data
            assert [m.id for m in models] == ["tiny", "org/alias"]
            assert (await sdk.models.retrieve("org/alias")).id == "org/alias"
            with pytest.raises(openai.NotFoundError) as caught:
                await sdk.models.retrieve("gpt-5")
            assert caught.value.code == "model_not_found"

    play(scene)


def test_the_sdk_raises_the_right_classes() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            create = sdk.chat.completions.create
            with pytest.raises(openai.NotFoundError, match="tiny, org/alias"):
                await create(model="gpt-5", messages=USER)
            with pytest.raises(openai.BadRequestError) as bad:
                await create(model="tiny", messages=USER, temperature=3)
            assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
            engine.refuse = OVERLOADED
            with pytest.raises(openai.RateLimitError) as limited:
                await create(model="tiny", messages=USER, stream=True)
            assert limited.value.response.headers["retry-after"] == "1"
            assert limited.value.request_id
            engine.refuse, engine.error, engine.after = None, DIED, 1
            with pytest.raises(openai.InternalServerError):
                await create(model="tiny", messages=USER)
            with pytest.raises(openai.APIError, match=r"The engine failed\."):
                async for _ in await create(model="tiny", messages=USER, stream=True):
                    pass

    play(scene)


# ---------------- exact bytes
def test_a_chat_stream_byte_by_byte() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        request = {"json": {"messages": USER, "stream": True}}
        async with aiohttp.ClientSession() as session, session.post(http.make_url(CHAT), **request) as response:
            raw, headers = b"", response.headers
            for seen, after in ((b'"Hel"', 3), (b'"lo"', 4)):
                while seen not in raw:  # each text arrives while the next is still unsaid
                    raw += await response.content.readany()
                engine.go_on(after)
            raw += await response.read()
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["Cache-Control"] == "no-cache"
        assert headers["X-Accel-Buffering"] == "no"
        assert headers["x-request-id"]
        assert "Content-Encoding" not in headers
        first = json.loads(raw.split(b"\n\n")[0][6:])
        common = (
            f'data: {{"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},"model":"tiny",'
            f'"system_fingerprint":"minisgl-{__version__}","choices":[{{"index":0,"delta":'
        )
        end = ',"logprobs":null,"finish_reason":%s}]}\n\n'
        want = [
            common + '{"role":"assistant","content":""}' + end % "null",
            common + '{"content":"Hel"}' + end % "null",
            common + '{"content":"lo"}' + end % "null",
            common + '{"content":" w\\u00f6rld\\u2028"}' + end % "null",
            common + "{}" + end % '"stop"',
            "data: [DONE]\n\n",
        ]
        assert raw.decode() == "".join(want)

    play(scene)


def test_every_event_of_a_stream_has_the_prescribed_fields() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for options, with_usage in ((None, False), ({"include_usage": False}, False), ({"include_usage": True}, True)):
            chat = {"messages": USER, "stream": True, "stream_options": options}
            got = events((await ask(http, CHAT, chat))[2])
            assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            body = got[1 : -2 if with_usage else -1]
            assert all(e["choices"][0]["delta"].keys() == {"content"} and e["choices"][0]["delta"]["content"] for e in body)
            assert got[-2 if with_usage else -1]["choices"][0]["delta"] == {}
            assert [("usage" in e) for e in got] == [with_usage] * len(got)
            assert all(e.get("usage") is None for e in got[: -1 if with_usage else None])
            assert all(bool(e["choices"]) for e in got[: -1 if with_usage else None])
            got = events((await ask(http, COMPLETION, {"prompt": "x", "stream": True, "stream_options": options}))[2])
            assert [bool(e["choices"]) for e in got] == [True] * (len(got) - with_usage) + [False] * with_usage
            assert {e["object"] for e in got} == {"text_completion"}
            assert (got[-1].get("usage") or {}).get("total_tokens") == (7 if with_usage else None)

    play(scene)


def test_a_failure_before_the_first_event_is_an_ordinary_error() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.error = DIED
        error = check_error(*await ask(http, CHAT, {"messages": USER, "stream": True}))
        assert error["code"] == "engine_error"

    play(scene)


def test_a_failure_after_the_first_event_is_told_in_the_stream() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.error, engine.after = DIED, 1
        status, _, raw = await ask(http, CHAT, {"messages": USER, "stream": True})
        got = events(raw)
        assert status == 200
        assert got[-1] == DIED.body()
        assert got[1]["choices"][0]["delta"]["content"] == "Hel"

    play(scene)


def test_an_abort_never_reaches_a_client_as_a_finish_reason() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.finish = Finish.ABORT
        error = check_error(*await ask(http, CHAT, {"messages": USER}))
        assert error["code"] == "aborted"
        got = events((await ask(http, COMPLETION, {"prompt": "x", "stream": True}))[2])
        assert got[-1]["error"]["code"] == "aborted"

    play(scene)


# ---------------- clients that leave
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 2])
def test_a_client_that_leaves_closes_its_requests_exactly_once(path: str, stream: bool, after: int) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, after
        raw = json.dumps({"messages": USER, "prompt": ["a", "b"], "stream": stream}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        if stream and after:
            await reader.readuntil(b"data: ")
        else:
            await engine.wait_for(lambda: bool(engine.live))
        writer.close()
        await engine.wait_for(lambda: len(engine.closed) == len(engine.opened))

    engine = play(scene)
    assert len(engine.opened) == (1 if path == CHAT else 2)


def test_a_refusal_halfway_closes_the_prompts_before_it() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.refuse, engine.admit = OVERLOADED, 2
        status, headers, raw = await ask(http, COMPLETION, {"prompt": ["a", "b", "c"]})
        assert check_error(status, headers, raw)["code"] == "server_overloaded"
        assert (status, headers["Retry-After"]) == (429, "1")

    assert len(play(scene).opened) == 2


def test_more_prompts_than_the_server_admits_are_refused_for_good() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for stream in (False, True):
            status, headers, raw = await ask(http, COMPLETION, {"prompt": ["a", "b", "c"], "stream": stream})
            assert (status, check_error(status, headers, raw)["param"]) == (400, "prompt")

    assert not play(scene, max_open_requests=2).opened


# ---------------- the error table
CONTEXT = RequestError("This model's maximum context length is 64 tokens.", param="messages", code="context_length_exceeded")
LOADING = RequestError("loading", status=503, code="model_loading", retry_after=2)
GOOD = {"messages": USER}
JSON_TYPE = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("request_", "refuse", "status", "param", "code"),
    [
        ((CHAT, {**GOOD, "model": "gpt-5"}), None, 404, "model", "model_not_found"),
        ((CHAT, b'{"messages": oops}'), None, 400, None, "invalid_json"),
        ((CHAT, b""), None, 400, None, "invalid_json"),
        ((CHAT, b'{"a":' * 800), None, 400, None, "invalid_json"),
        ((CHAT, {}), None, 400, "messages", "missing_required_parameter"),
        ((COMPLETION, {}), None, 400, "prompt", "missing_required_parameter"),
        ((CHAT, {**GOOD, "temperature": "hot"}), None, 400, "temperature", "invalid_type"),
        ((CHAT, {**GOOD, "temperature": -1}), None, 400, "temperature", "invalid_value"),
        ((CHAT, GOOD), CONTEXT, 400, "messages", "context_length_exceeded"),
        ((CHAT, {**GOOD, "logprobs": 1}), None, 400, "logprobs", "invalid_type"),
        ((CHAT, {**GOOD, "n": 0}), None, 400, "n", "invalid_value"),
        ((CHAT, {**GOOD, "user": "x" * 5000}), None, 413, None, "body_too_large"),
        ((CHAT, GOOD), OVERLOADED, 429, None, "server_overloaded"),
        ((CHAT, GOOD), LOADING, 503, None, "model_loading"),
        ((CHAT, GOOD), DIED, 500, None, "engine_error"),
        ((CHAT, GOOD), ValueError("/secret/path"), 500, None, "internal_error"),
        (("/v1/chat/completion", GOOD), None, 404, None, "unknown_path"),
        (("/chat/completions", GOOD), None, 404, None, "unknown_path"),
        (("/v1/models", GOOD), None, 405, None, "method_not_allowed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_error_table(  # noqa: PLR0917
    request_: tuple[str, Any], refuse: Exception | None, status: int, param: str | None, code: str, stream: bool
) -> None:
    path, body = request_
    if isinstance(body, dict):
        body = {**body, "stream": stream}

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.refuse = refuse
        got, headers, raw = await ask(http, path, body)
        error = check_error(got, headers, raw)
        assert (got, error["param"], error["code"]) == (status, param, code)
        assert error["type"] == (
            "rate_limit_error" if got == 429 else "server_error" if got >= 500 else "invalid_request_error"
        )
        assert ("Retry-After" in headers) == (got in (429, 503))
        assert b"secret" not in raw
        assert b"Traceback" not in raw
        if got == 404 and path != CHAT:
            assert CHAT in error["message"]
        if got == 405:
            assert "GET" in headers["Allow"]
        assert (await ask(http, "/health", method="GET"))[0] == 200, "the server goes on"

    play(scene)


def test_a_bug_after_the_first_event_is_told_without_its_text() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.error, engine.after = Chunk("secret", None, Finish.NONE, 1, 0), 1  # type: ignore[arg-type]
        raw = (await ask(http, CHAT, {**GOOD, "stream": True}))[2]
        got = events(raw)
        assert got[1]["choices"][0]["delta"]["content"] == "Hel"
        assert got[-1]["error"]["code"] == "internal_error"
        assert b"secret" not in raw
        assert b"NoneType" not in raw

    play(scene)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_bodies_that_are_not_plain_json_are_refused_by_their_headers(headers: dict[str, str]) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, got, raw = await ask(http, CHAT, json.dumps(GOOD).encode(), headers=headers)
        assert (status, check_error(status, got, raw)["param"]) == (400, None)
        assert ("curl: -H 'Content-Type: application/json'" in raw.decode()) is ("Content-Encoding" not in headers)

    assert not play(scene).opened


def test_a_body_without_a_length_is_measured_as_it_comes() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async def parts() -> Any:
            for _ in range(5):
                yield b" " * 1000

        status, headers, raw = await ask(http, CHAT, parts(), headers=JSON_TYPE)
        assert (status, check_error(status, headers, raw)["code"]) == (413, "body_too_large")

    play(scene)


def test_a_request_id_is_echoed_only_if_it_is_harmless() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for sent, echoed in (
            ("abc.DEF_1-2", True),
            ("x" * 64, True),
            ("x" * 65, False),
            ("a b", False),
            ("ä", False),
            ("a,b", False),
            ("", False),
        ):
            for path, body in ((CHAT, GOOD), (CHAT, {**GOOD, "stream": True}), (CHAT, {}), ("/nowhere", GOOD)):
                _, headers, _ = await ask(http, path, body, headers={"x-request-id": sent})
                assert (headers["x-request-id"] == sent) == echoed
                assert len(headers["x-request-id"]) == (len(sent) if echoed else 32)

    play(scene)


def test_a_raw_request_id_with_control_characters_is_not_reflected() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for evil in (b"a\x00b", b"a\tb", b"a\x7fb", b"\xff\xfe"):
            reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
            writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-request-id: " + evil + b"\r\n\r\n")
            raw = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert raw.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.0 400"))
            assert evil not in raw.split(b"\r\n\r\n")[0]

    play(scene)


def test_ignored_fields_are_named_in_a_header_that_they_cannot_break() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        body = {**GOOD, "frobnicate": 1, "evil\r\nX-Evil: 1": 2, "x" * 70: 3, "ü": 4, "user": "u"}
        for stream in (False, True):
            status, headers, _ = await ask(http, CHAT, {**body, "stream": stream})
            assert (status, headers["X-Ignored-Params"]) == (200, "frobnicate,user")
            assert "X-Evil" not in headers
        _, headers, _ = await ask(http, CHAT, {**GOOD, "user": "", "logprobs": None})
        assert "X-Ignored-Params" not in headers

    play(scene)


def test_an_empty_bearer_token_is_nothing_to_worry_about() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        assert (await ask(http, CHAT, GOOD, headers={"Authorization": "Bearer "}))[0] == 200

    play(scene)


def test_health_ready_and_info_follow_the_engine() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        states = {"starting": 503, "ready": 200, "recovering": 503, "draining": 503, "dead": 503}
        for engine.down, engine.stuck in (([], []), (["worker0"], []), ([], ["scheduler"])):
            for engine.state, ready in states.items():
                status, _, raw = await ask(http, "/ready", method="GET")
                assert (status, json.loads(raw)) == (ready, {"status": engine.state})
                body = {"status": engine.state, "down": engine.down, "still": engine.stuck}
                alive = 503 if engine.state == "dead" else 200
                for path, want in (("/health", alive), ("/health?deep=1", 503 if engine.stuck else alive)):
                    status, _, raw = await ask(http, path, method="GET")
                    assert (status, json.loads(raw)) == (want, body)
        engine.state = "ready"
        info = json.loads((await ask(http, "/server_info", method="GET"))[2])
        assert info["batch_socket"] == "ipc://somewhere"
        assert (info["model"], info["max_context"], info["tp"], info["page_size"]) == ("tiny", 64, 1, 16)
        assert info["version"] == __version__

    play(scene)


def test_without_served_names_the_model_is_called_what_it_is() -> None:
    assert served_names(Config(fake_spec())) == ("tiny",)


# ---------------- any body at all
def test_any_json_in_any_field_is_answered_or_refused_and_never_a_500() -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> tuple[ScriptedEngine, Server, aiohttp.ClientSession]:
        engine = ScriptedEngine()
        http = Server(engine)
        await http.start()
        return engine, http, aiohttp.ClientSession()

    engine, http, session = loop.run_until_complete(begin())

    async def post(path: str, body: bytes) -> None:
        async with session.post(http.make_url(path), data=body, headers=JSON_TYPE) as r:
            raw = await r.read()
            if r.status == 200:
                assert events(raw) if r.content_type == "text/event-stream" else json.loads(raw)["choices"]
                return
            error = check_error(r.status, r.headers, raw)
            assert r.status in (400, 404, 413)
            assert r.status != 404 or error["code"] == "model_not_found"

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(FIELDS), JSON)
    def any_value(name: str, value: Any) -> None:
        for path in (CHAT, COMPLETION):
            for stream in (False, True):
                body = {"messages": USER, "prompt": "x", "stream": stream, name: value}
                loop.run_until_complete(post(path, json.dumps(body).encode()))

    async def end() -> None:
        await session.close()
        await http.close()

    try:
        any_value()
        for raw in (b'{"seed": ' + b"9" * 3000 + b"}", b'{"user": "\\ud800"}', b'{"a": NaN}', b"[" * 3000, b'{"a":' * 800):
            loop.run_until_complete(post(CHAT, raw))
    finally:
        loop.run_until_complete(end())
        loop.close()
    assert sorted(engine.closed) == list(range(len(engine.opened)))


# ---------------- stream.py and serving.py, without HTTP
def test_chunks_that_wait_for_a_slow_consumer_arrive_as_one() -> None:
    async def main(params: SamplingParams) -> list[Chunk]:
        engine = ScriptedEngine()
        got = []
        generation = Generation(engine, [TextPrompt("x")], params)
        while generation.unfinished:
            got += [chunk for _, chunk in await generation.take()]
            for _ in range(10):  # meanwhile the rest is delivered
                await asyncio.sleep(0)
        generation.close()
        assert engine.closed == [0]
        return got

    assert asyncio.run(main(SamplingParams(logprobs=0)))[1].logprobs == tuple(
        t for at in (1, 2, 3) for t in ScriptedEngine()._told(SamplingParams(logprobs=0), at)
    )
    assert asyncio.run(main(SamplingParams())) == [
        Chunk("Hel", (0,), Finish.NONE, 3, 2),
        Chunk("lo wörld\u2028", (1, 2, 3), Finish.STOP, 3, 2),
    ]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_every_event_tells_the_usage_of_its_choice_so_far_where_that_was_asked_for(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"messages": USER} if path == CHAT else {"prompt": "x"}
        got = events((await ask(http, path, {**body, "n": 2, "stream": True, "stream_options": options}))[2])
        last = got.pop()
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2 * len(PIECES))
        counts: dict[int, list[int]] = {0: [], 1: []}
        for event in got[2 if path == CHAT else 0 :]:  # what announces the role knows of no tokens yet
            usage = event["usage"]
            assert (usage["prompt_tokens"], usage["total_tokens"]) == (3, 3 + usage["completion_tokens"])
            counts[event["choices"][0]["index"]].append(usage["completion_tokens"])
        for told in counts.values():
            assert told == sorted(told)
            assert told[-1] == len(PIECES)

    play(scene)


async def _raw(http: Server, head: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that has sent a streaming request of its own making and reads nothing ahead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.port, limit=1 << 16)
    body = b'{"prompt": "x", "stream": true}'
    writer.write(b"POST /v1/completions " + head + b"\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    return reader, writer


def test_a_client_that_reads_late_gets_every_character_in_fewer_pieces() -> None:
    letters, size, turns = "abcdefghij", 20_000, 1200  # 24 MB: more than the kernel's buffers take

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        reader, writer = await _raw(http, b"HTTP/1.1\r\nHost: t")
        await engine.wait_for(lambda: bool(engine.opened))
        await reader.readuntil(b"data: ")
        for turn in range(turns):
            engine.live[0](Chunk(letters[turn % 10] * size, (1,), Finish.NONE, 3, 2))
            for _ in range(3):
                await asyncio.sleep(0)
        engine.live.pop(0)(Chunk("", (), Finish.LENGTH, 3, 2))
        told = b""
        while not told.endswith(b"\r\n0\r\n\r\n"):
            told += await reader.read(1 << 20)
        writer.close()
        for letter in letters:
            assert told.count(letter.encode() * 100) == turns // 10 * size // 100
        assert 10 < told.count(b"data: ") < turns / 2

    play(scene)


def test_an_http_1_0_client_reads_its_stream_until_the_connection_ends() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        reader, writer = await _raw(http, b"HTTP/1.0")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert b"chunked" not in head.lower()
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")

    play(scene)


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nHost: t\r\n"])
def test_whoever_does_not_finish_the_headers_of_a_request_is_shown_out(said: bytes) -> None:
    async def main() -> None:
        http = Server(ScriptedEngine(), header_seconds=0.05)
        await http.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        writer.write(said)
        head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["code"] == "request_timeout"
        await http.close()

    asyncio.run(main())


def test_headers_that_come_in_pieces_are_put_together_and_the_connection_stays() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        for _ in range(2):
            for byte in b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n":
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert await reader.readuntil(b"}") == b'{"status": "ready", "down": [], "still": []}'
        writer.close()

    play(scene)


@pytest.mark.parametrize("cut", [5, 29, 30, 31, 32])
def test_the_limit_for_headers_ends_with_the_headers_wherever_they_are_cut(cut: int) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        request = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", http.port)
        writer.write(request[:cut])
        while not (connections := http.connections()):  # noqa: ASYNC110  a turn of the loop or two
            await asyncio.sleep(0)
        timer = connections[0]._timer
        assert timer is not None
        assert not timer.cancelled()
        await asyncio.sleep(0.01)  # the pieces arrive apart
        writer.write(request[cut:])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert timer.cancelled()
        writer.close()

    play(scene)


def test_text_that_came_before_an_error_is_delivered_before_it() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        engine.error, engine.after = DIED, 3
        texts: list[str] = []

        generation = Generation(engine, [TextPrompt("x")], SamplingParams())

        async def consume() -> None:
            while True:
                texts.extend(chunk.text for _, chunk in await generation.take())
                for _ in range(10):
                    await asyncio.sleep(0)

        with pytest.raises(RequestError, match=r"The engine failed\."):
            await consume()
        generation.close()
        assert "".join(texts) == "Hello"
        assert engine.closed == [0]

    asyncio.run(main())


def test_answers_in_one_piece_come_in_the_order_of_their_prompts_and_none_outlives_a_failure() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        engine.stall = True  # nothing is said before go_on
        prompts = [TextPrompt(name) for name in "abc"]
        asking = asyncio.ensure_future(complete(engine, prompts, SamplingParams(logprobs=0)))
        await asyncio.sleep(0)
        engine.live[2](Chunk("one ", (1,), Finish.NONE, 3, 2))
        for uid, text in ((2, "two"), (0, "zero"), (1, "")):
            await asyncio.sleep(0)
            assert not asking.done()
            engine.live.pop(uid)(Chunk(text, (uid,), Finish.STOP, 3, uid))
        assert [(c.text, c.token_ids, c.cached_tokens) for c in (await asking)[0]] == [
            ("zero", (0,), 0),
            ("", (1,), 1),
            ("one two", (1, 2), 2),
        ]
        asking = asyncio.ensure_future(complete(engine, prompts, SamplingParams()))
        await asyncio.sleep(0)
        engine.live.pop(3)(Chunk("a", (1,), Finish.STOP, 3, 0))
        engine.live.pop(4)(DIED)
        with pytest.raises(RequestError, match="engine failed"):
            await asking
        asking = asyncio.ensure_future(complete(engine, prompts, SamplingParams()))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert sorted(engine.closed) == list(range(9))
        assert not engine.live

    asyncio.run(main())


def test_the_batch_socket_gets_the_same_answers_and_no_streams() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        answer = await ENDPOINTS[CHAT].ask(engine, GOOD)
        assert answer["choices"][0]["message"]["content"] == TEXT
        answer = await ENDPOINTS[COMPLETION].ask(engine, {"prompt": [[1], [2]]})
        assert [json.loads(b"".join(json_pieces(c)))["index"] for c in answer["choices"]] == [0, 1]
        with pytest.raises(RequestError) as caught:
            await ENDPOINTS[CHAT].ask(engine, {**GOOD, "stream": True})
        assert caught.value.param == "stream"
        assert engine.closed == [0, 1, 2]

    asyncio.run(main())


def test_flush_cache_reaches_the_engine_and_server_info_has_its_statistics() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, _, _ = await ask(http, "/flush_cache")
        assert status == 200
        assert engine.flushed
        _, _, body = await ask(http, "/server_info", method="GET")
        assert json.loads(body)["stats"] == {"running_requests": 0}

    play(scene)


def test_only_the_http_room_its_command_and_ray_import_aiohttp() -> None:
    package = Path(minisgl.__file__).parent
    users = {
        path for path in package.rglob("*.py") if re.search(r"^\s*(from|import) aiohttp\b", path.read_text(), re.MULTILINE)
    }
    assert {str(path.relative_to(package).parent) for path in users} == {"api/http", "commands", "deploy"}
