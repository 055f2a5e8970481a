"""No client keeps the api's event loop from the others: large answers are rendered in slices, large bodies read elsewhere.

Work is counted, in entries rendered or bytes parsed per turn of the loop, and never timed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pickle
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import alive
from test_server import CHAT, COMPLETION, USER, ScriptedEngine, Server, ask, play

from minisgl.api import generation, reader, rendering
from minisgl.api.endpoints.anthropic import parse_messages
from minisgl.api.endpoints.anthropic_blocks import Message
from minisgl.api.endpoints.openai_answers import OpenAIAnswer
from minisgl.api.endpoints.responses import parse_responses
from minisgl.api.endpoints.responses_items import Response
from minisgl.api.endpoints.sglang import parse_generate
from minisgl.api.endpoints.sglang_answers import NativeAnswer
from minisgl.api.endpoints.table import ENDPOINTS, compact
from minisgl.api.engine import Chunk, TextPrompt, TokenLogprob
from minisgl.api.generation import Generation, StreamedAnswer
from minisgl.api.reader import SMALL, Reader
from minisgl.api.rendering import SLICE, UNITS, json_pieces
from minisgl.api.requests.generate import MAX_ENTRIES
from minisgl.api.requests.openai import parse_chat, parse_completion
from minisgl.api.usage import Timings
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import Finish, SamplingParams

TIMINGS = Timings(0.1, 0.2)


def chunk(tokens: int, top: int | None, text: str = "") -> Chunk:
    told: tuple[TokenLogprob, ...] = ()
    if top is not None:
        alternatives = tuple((i, b"a%d" % i, -1.5 - i) for i in range(top))
        told = tuple(TokenLogprob(t, b"t%d" % t, -0.5, t, alternatives) for t in range(tokens))
    return Chunk(text or "x" * tokens, tuple(range(tokens)), Finish.STOP, 3, 2, told)


class Meter:
    """Counts work by turns of the event loop."""

    def __init__(self) -> None:
        self.by_turn: Counter[int] = Counter()
        self.turn = 0

    def note(self, work: int) -> None:
        self.by_turn[self.turn] += work

    async def over(self, work: Any) -> Any:
        """Await something while turns are counted."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

        def tick() -> None:
            self.turn += 1
            if not task.done():
                loop.call_soon(tick)

        loop.call_soon(tick)
        return await task

    @property
    def most(self) -> int:
        return max(self.by_turn.values())


def metered(monkeypatch: pytest.MonkeyPatch) -> Meter:
    """A meter of the characters of JSON that are rendered."""
    meter, dumps = Meter(), json.dumps

    def counted(value: Any, **more: Any) -> str:
        text = dumps(value, **more)
        meter.note(len(text))
        return text

    monkeypatch.setattr(rendering.json, "dumps", counted)
    return meter


BODY = {"messages": USER, "logprobs": True, "top_logprobs": 20, "max_tokens": 1000}
DIALECTS: dict[str, Callable[[Any], tuple[Any, int]]] = {
    "chat": lambda c: (OpenAIAnswer(c, parse_chat(c, {**BODY, "n": 8})), 8),
    "completion": lambda c: (OpenAIAnswer(c, parse_completion(c, {"prompt": ["a", "b"], "logprobs": 20, "n": 4})), 8),
    "native": lambda c: (
        NativeAnswer(c, parse_generate(c, {"text": ["a"] * 8, "return_logprob": True, "top_logprobs_num": 20})),
        8,
    ),
    "responses": lambda c: (
        Response(c, parse_responses(c, {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 20})),
        1,
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_with_many_log_probabilities_is_rendered_in_slices(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, n = DIALECTS[dialect](ScriptedEngine().config)
    tokens = 400 if n > 1 else 3000
    meter = metered(monkeypatch)

    async def main() -> Any:
        return await meter.over(answer.complete([chunk(tokens, 20) for _ in range(n)], TIMINGS))

    body = asyncio.run(main())
    monkeypatch.undo()
    raw = b"".join(json_pieces(body))
    assert raw.count(b'"a19"') == n * tokens
    assert len(raw) > 500_000
    assert meter.most < 100 * (UNITS + 2 * SLICE)
    assert len(meter.by_turn) > n * tokens * 21 / (UNITS + 2 * SLICE) / 2
    small = json.loads(
        b"".join(json_pieces(asyncio.run(DIALECTS[dialect](ScriptedEngine().config)[0].complete([chunk(2, 20)] * n, TIMINGS))))
    )
    assert small.keys() == json.loads(raw).keys() if isinstance(small, dict) else len(small) == n


@pytest.mark.parametrize("dialect", DIALECTS)
def test_slices_add_up_to_the_same_answer(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> Any:
        answer, n = DIALECTS[dialect](ScriptedEngine().config)
        raw = b"".join(json_pieces(asyncio.run(answer.complete([chunk(40, 20, "hällo") for _ in range(n)], TIMINGS))))
        return json.loads(
            raw,
            object_hook=lambda d: {
                k: v for k, v in d.items() if k not in ("id", "e2e_latency") and "created" not in k and "_at" not in k
            },
        )

    whole = body()
    monkeypatch.setattr(rendering, "SLICE", 7)
    monkeypatch.setattr(rendering, "UNITS", 5)
    assert body() == whole


def test_a_long_text_is_parsed_for_calls_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from minisgl.api.parsers.reply import Reply

    config = ScriptedEngine(tool_call_parser="hermes", reasoning_parser="qwen3").config
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    text = (
        "<think>"
        + "a thought " * 2000
        + "</think>"
        + '<tool_call>{"name": "f", "arguments": {"x": "%s"}}</tool_call>' % ("y" * 30_000)
    )
    feed, meter = Reply.feed, Meter()

    def counted(self: Reply, text: str, *more: Any, **named: Any) -> Any:
        meter.note(len(text))
        return feed(self, text, *more, **named)

    monkeypatch.setattr(Reply, "feed", counted)
    answer = OpenAIAnswer(config, parse_chat(config, {"messages": USER, "tools": [tool]}))

    async def main() -> Any:
        return await meter.over(answer.complete([chunk(9000, None, text)], TIMINGS))

    message = json.loads(b"".join(json_pieces(asyncio.run(main()))))["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": "y" * 30_000}
    assert meter.most <= rendering.TEXT


def test_chunks_that_wait_are_merged_as_they_come() -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        engine.stall = True
        g = Generation(engine, ["p"], SamplingParams())
        for i in range(1000):
            g._on_chunk(0, Chunk(str(i), (i,), Finish.NONE, 3, 0))
        assert len(g._chunks._merged[0]) + len(g._chunks._chunks[0]) < 100
        assert engine.kept.bytes > 64_000
        [(_, merged)] = g.take_now()
        assert merged.token_ids == tuple(range(1000))
        assert merged.text == "".join(map(str, range(1000)))
        assert engine.kept.bytes == 0
        g.close()

    asyncio.run(main())


def test_the_one_who_fills_the_memory_fails_and_what_it_held_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_KEPT_BYTES", 1 << 20)

    async def main() -> None:
        engine = ScriptedEngine()
        engine.stall = True
        small, large = (Generation(engine, ["p"], SamplingParams()) for _ in range(2))
        small._on_chunk(0, chunk(10, 20)._replace(finish=Finish.NONE))
        for _ in range(100):
            large._on_chunk(0, chunk(100, 20)._replace(finish=Finish.NONE))
        with pytest.raises(RequestError) as e:
            await large.end()
        assert (e.value.status, e.value.code) == (503, "server_overloaded")
        assert engine.kept.bytes < 1 << 17
        small._on_chunk(0, chunk(10, 20))
        await small.end()
        assert len((await small.take_one_by_one())[0].token_ids) == 20
        for g in (small, large):
            g.close()
        assert engine.kept.bytes == 0

    asyncio.run(main())


# ---------------- limits
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": USER, "n": 16, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20}, "n"),
        (CHAT, {"messages": USER, "n": 128, "max_tokens": 50_000}, "n"),
        (CHAT, {"messages": USER, "max_tokens": 50_000, "logprobs": True, "top_logprobs": 20}, "max_tokens"),
        (COMPLETION, {"prompt": ["a"] * 100, "max_tokens": 1500, "logprobs": 20}, "n"),
        ("/generate", {"text": ["a"] * 100, "sampling_params": {"max_new_tokens": 5000}}, "n"),
        ("/detokenize", {"tokens": ["x"] * 5000}, "tokens"),
        ("/tokenize", {"prompt": ["x" * 3000] * 2}, "prompt"),
    ],
)
def test_requests_for_more_than_can_be_rendered_are_refused_by_their_fields(path: str, body: Any, param: str) -> None:
    async def main() -> None:
        engine = ScriptedEngine(max_body_bytes=1 << 20)
        endpoint = ENDPOINTS[path]
        with pytest.raises(InvalidParam) as e:
            await endpoint.answer(engine, endpoint.parse(engine.config, body))
        assert e.value.param == param
        assert not engine.opened
        if path in (CHAT, COMPLETION, "/generate"):
            assert str(MAX_ENTRIES) in e.value.message
            assert "max_tokens" in e.value.message

    asyncio.run(main())


def test_a_native_stream_does_not_repeat_ever_more_log_probabilities() -> None:
    body = {
        "text": "x",
        "stream": True,
        "return_logprob": True,
        "top_logprobs_num": 20,
        "sampling_params": {"max_new_tokens": 900},
    }
    config = ScriptedEngine().config
    with pytest.raises(InvalidParam, match="incremental: true") as e:
        parse_generate(config, body)
    assert e.value.param == "incremental"
    assert parse_generate(config, {**body, "incremental": True}).stream
    assert parse_generate(config, {**body, "stream": False})


def test_vectors_are_rendered_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vectors(ScriptedEngine):
        def _piece(self, uid: int, at: int) -> None:
            self.live.pop(uid)(Chunk("", (), Finish.STOP, 3, 0, (), np.ones(4096, np.float32)))

    async def main() -> Any:
        engine = Vectors(max_body_bytes=1 << 20)
        object.__setattr__(engine.config.model, "hidden_size", 4096)
        endpoint = ENDPOINTS["/v1/embeddings"]
        return await meter.over(endpoint.answer(engine, endpoint.parse(engine.config, {"input": ["a"] * 40})))

    meter = metered(monkeypatch)
    body = asyncio.run(main())
    monkeypatch.undo()
    assert len(json.loads(b"".join(json_pieces(body)))["data"]) == 40
    assert meter.most < 200_000


# ---------------- bodies
def large(**more: Any) -> dict[str, Any]:
    return {"messages": USER, "user": "é" * SMALL, **more}


def test_a_large_body_is_read_in_another_process_and_answered_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    loads = json.loads

    def counted(text: Any, **more: Any) -> Any:
        parsed.append(len(text))
        return loads(text, **more)

    monkeypatch.setattr("minisgl.api.requests.fields.json.loads", counted)

    async def scene(engine: ScriptedEngine, server: Server) -> None:
        status, headers, raw = await ask(server, CHAT, large(unheard=1))
        assert status == 200
        assert headers["X-Ignored-Params"] == "unheard,user"
        again = await ask(server, CHAT, {"messages": USER, "unheard": 1})
        assert loads(raw)["choices"] == loads(again[2])["choices"]
        for body, code in ((large(temperature=9), "temperature"), (large(n=0), "n")):
            status, _, raw = await ask(server, CHAT, body)
            assert (status, loads(raw)["error"]["param"]) == (400, code)
        status, _, raw = await ask(server, CHAT, b'{"messages": [' + b" " * SMALL + b"}")
        assert (status, loads(raw)["error"]["code"]) == (400, "invalid_json")

    play(scene, max_body_bytes=1 << 20)
    assert max(parsed) <= SMALL


def test_what_comes_back_from_the_reader_is_small() -> None:
    """Arrays, not objects; and a prompt that is too long stays there."""
    config = ScriptedEngine().config
    n = config.max_context
    request = compact(config, parse_completion(config, {"prompt": [[1] * n] * 3, **{f"f{i}": 0 for i in range(5000)}}))
    assert [type(p.ids) for p in request.prompts] == [np.ndarray] * 3
    assert len(request.ignored) <= 100
    with pytest.raises(InvalidParam, match="maximum context length"):
        compact(config, parse_completion(config, {"prompt": [1] * (n + 1)}))
    assert compact(config, parse_chat(config, {"messages": USER})) == parse_chat(config, {"messages": USER})


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def once(number: int, mark: str) -> str:
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), number)
    return mark


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reader_that_somebody_kills_or_stops_in_the_middle_of_a_job_does_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(reader, "WALL_SECONDS", 60.0 if number == signal.SIGKILL else 10.0)

    async def main() -> None:
        r = Reader()
        mark = str(tmp_path / "mark")
        assert await r.run(once, number, mark) == mark
        r.close()

    asyncio.run(main())


def test_a_job_that_ends_the_reader_is_refused_and_the_next_is_served() -> None:
    async def main() -> None:
        r = Reader()
        assert await r.run(len, b"abc") == 3
        first = r.pid
        with pytest.raises(RequestError) as e:
            await r.run(die)
        assert (e.value.status, e.value.code) == (413, "body_too_complex")
        assert await r.run(len, b"abcd") == 4
        second = r.pid
        assert second is not None
        assert second != first
        with pytest.raises(RuntimeError, match="TypeError"):
            await r.run(len, 5)
        left = asyncio.ensure_future(r.run(len, b"a" * 5))
        await asyncio.sleep(0)
        left.cancel()
        assert await r.run(len, b"a" * 6) == 6, "the answer of a caller that has left"
        r.close()
        assert not alive(second)
        with pytest.raises(RequestError):
            await r.run(len, b"")

    asyncio.run(main())


def evil() -> Any:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    return Evil()


def test_an_answer_of_the_reader_is_data_and_nothing_else() -> None:
    async def main() -> None:
        r = Reader()
        with pytest.raises(pickle.UnpicklingError, match="no part of an answer"):
            await r.run(evil)
        assert await r.run(len, b"abc") == 3
        r.close()

    asyncio.run(main())


def test_few_large_bodies_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "ROOM", 100)

    async def main() -> None:
        r = Reader()
        held: list[int] = []

        async def hold(size: int) -> None:
            async with r.room(size):
                held.append(size)
                assert sum(held) <= 100 or held == [size]
                await asyncio.sleep(0.001)
                held.remove(size)

        await asyncio.gather(*(hold(s) for s in (40, 60, 30, 100, 5, 70)), hold(500))
        async with r.room(100):
            monkeypatch.setattr(reader, "WAIT_SECONDS", 0.05)
            with pytest.raises(RequestError) as e:
                await hold(1)
        monkeypatch.setattr(reader, "WAIT_SECONDS", 30.0)
        assert (e.value.status, e.value.code) == (503, "server_overloaded")
        await hold(100)

    asyncio.run(main())


# ---------------- streams
@pytest.mark.parametrize("plain", [False, True])
def test_a_call_with_many_rows_opens_a_few_of_them_in_a_turn(plain: bool) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        generation = Generation(engine, [TextPrompt("p")] * 300, SamplingParams())
        waiting = asyncio.ensure_future(generation.end() if plain else generation.take())
        opened = [len(engine.opened)]
        while opened[-1] < 300:
            assert not generation.accepted
            await asyncio.sleep(0)
            opened.append(len(engine.opened))
        assert max(b - a for a, b in itertools.pairwise([0, *opened])) <= 32
        await waiting
        generation.close()
        left = Generation(engine, [TextPrompt("p")] * 300, SamplingParams())
        waiting = asyncio.ensure_future(left.take())
        left.close()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(engine.opened) == 332, "nothing is opened for somebody who has left"
        waiting.cancel()

    asyncio.run(main())


def streamed(dialect: str, pieces: list[Chunk], monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], Meter]:
    """(what each turn of the loop has given, a meter of the characters of JSON) for a stream of these chunks."""
    config = ScriptedEngine(reasoning_parser="qwen3").config
    body = {"include": ["message.output_text.logprobs"], "top_logprobs": 20} if dialect == "responses" else {"max_tokens": 9}
    parse, make = {"responses": (parse_responses, Response), "messages": (parse_messages, Message)}[dialect]
    said = {"input": "hi"} if dialect == "responses" else {"messages": USER}
    answer = make(config, parse(config, {**said, **body, "stream": True}))
    meter = metered(monkeypatch)

    async def main() -> list[bytes]:
        engine = ScriptedEngine()
        engine.stall = True
        stream = StreamedAnswer(Generation(engine, ["p"], SamplingParams()), answer)
        out: list[bytes] = []
        for i, piece in enumerate(pieces):
            stream._generation._on_chunk(0, piece)
            if i == 0:
                out.append((await stream.first())[0])
            while stream._pieces is not None or (i and stream._generation._chunks):
                meter.turn += 1
                woken = []
                stream.listen(lambda woken=woken: woken.append(1))
                assert woken, "there is more"
                out.append(stream.more())
        assert stream.done
        stream.close()
        return out

    turns = asyncio.run(main())
    monkeypatch.undo()
    return turns, meter


def test_the_last_events_of_a_response_go_turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    thought, text = "a thought é " * 50_000, 'an "answer" ' * 80_000
    told = chunk(20, 20).logprobs
    said = ["<think>", *(thought[at : at + 6000] for at in range(0, len(thought), 6000)), "</think>"]
    pieces = [Chunk(part, (1,), Finish.NONE, 3, 2) for part in said]
    pieces += [Chunk(text[at : at + 6000], (1,) * 20, Finish.NONE, 3, 2, told) for at in range(0, len(text), 6000)]
    turns, meter = streamed("responses", [*pieces, Chunk("", (1,), Finish.STOP, 3, 2)], monkeypatch)
    events = [json.loads(e.partition(b"data: ")[2]) for e in b"".join(turns).split(b"\n\n") if e]
    last = events[-1]["response"]["output"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == text
    assert last[1]["content"][0]["text"] == text
    assert last[0]["content"][0]["text"].strip() == thought.strip()
    assert len(last[1]["content"][0]["logprobs"]) == 160 * 20
    assert len(b"".join(turns)) > 10_000_000
    assert meter.most < 100 * UNITS
    assert max(map(len, turns)) < 3 * 100 * UNITS


def test_events_that_wait_for_their_turn_do_not_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "an answer " * 20_000
    pieces = [Chunk(text[at : at + 2000], (1,), Finish.NONE, 3, 2) for at in range(0, len(text), 2000)]
    for dialect in ("responses", "messages"):
        turns, _ = streamed(dialect, [*pieces, Chunk("", (1,), Finish.LENGTH, 3, 2)], monkeypatch)
        events = [json.loads(e.partition(b"data: ")[2]) for e in b"".join(turns).split(b"\n\n") if e]
        assert events[-1]["type"] in ("response.incomplete", "message_stop")
        deltas = [e["delta"] for e in events if e["type"] in ("response.output_text.delta", "content_block_delta")]
        assert "".join(d if isinstance(d, str) else d["text"] for d in deltas) == text


@pytest.mark.parametrize("dialect", ["chat", "responses"])
def test_what_a_slow_reader_has_let_wait_comes_turn_by_turn(dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScriptedEngine().config
    answer, _ = DIALECTS[dialect](config)
    told = chunk(1, 20, "word ")._replace(finish=Finish.NONE)
    meter = metered(monkeypatch)

    async def main() -> list[bytes]:
        engine = ScriptedEngine()
        engine.stall = True
        stream = StreamedAnswer(Generation(engine, ["p"], SamplingParams()), answer)
        for _ in range(3000):
            stream._generation._on_chunk(0, told)
        stream._generation._on_chunk(0, told._replace(finish=Finish.STOP))
        out = [(await stream.first())[0]]
        while not stream.done:
            meter.turn += 1
            out.append(stream.more())
        stream.close()
        return out

    turns = asyncio.run(main())
    monkeypatch.undo()
    raw = b"".join(turns)
    text = "".join(re.findall(r'"(?:delta|content)": ?"((?:word )+)"', raw.decode()))
    assert text == "word " * 3001
    assert meter.most < 200 * UNITS
    assert len(turns) > 30
