"""Endpoints beside chat and completions, in front of a scripted engine: native, Responses, Anthropic's, metrics, keys, docs."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from test_server import (
    CHAT,
    COMPLETION,
    DIED,
    OVERLOADED,
    TEXT,
    USER,
    ScriptedEngine,
    Server,
    ask,
    check_error,
    client,
    events,
    play,
)

from minisgl.api.engine import ChatPrompt, Chunk, OnChunk, Prompt, TextPrompt, TokenPrompt
from minisgl.api.generation import Generation
from minisgl.api.http import openapi
from minisgl.api.http.app import build_app
from minisgl.api.requests.fields import Support
from minisgl.api.usage import Result, Timings
from minisgl.commands.flags import read_keys
from minisgl.errors import RequestError, UserError, context_overflow, model_loading
from minisgl.sampling_params import DEFAULT_OPTIONS, Finish, RequestOptions, SamplingParams

KEY = "k" * 32


async def get(http: Server, path: str, **kw: Any) -> tuple[int, Any, bytes]:
    return await ask(http, path, method="GET", **kw)


def typed(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(event, data) of a stream whose events have names."""
    blocks = raw.split(b"\n\n")
    assert blocks.pop() == b""
    out = []
    for block in blocks:
        name, data = block.split(b"\n")
        out.append((name.removeprefix(b"event: ").decode(), json.loads(data.removeprefix(b"data: "))))
        assert out[-1][1]["type"] == out[-1][0]
    return out


# ---------------- tokens
def test_text_becomes_tokens_and_tokens_text_as_evaluation_harnesses_ask() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, _, raw = await ask(http, "/tokenize", {"prompt": "hi", "add_special_tokens": False})
        assert (status, json.loads(raw)) == (200, {"tokens": [104, 105], "count": 2, "max_model_len": 64})
        _, _, raw = await ask(http, "/tokenize", {"prompt": ["a", "bc"], "model": "tiny", "colour": 1})
        assert json.loads(raw)["tokens"] == [[97], [98, 99]]
        _, headers, raw = await ask(http, "/tokenize", {"messages": USER, "colour": 1})
        assert json.loads(raw)["count"] == len("a chat")
        assert headers["X-Ignored-Params"] == "colour"
        _, _, raw = await ask(http, "/detokenize", {"tokens": [104, 105]})
        assert json.loads(raw) == {"prompt": "hi"}
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
            ("/tokenize", {"prompt": 5}, "prompt"),
            ("/tokenize", {"prompt": ["a"] * 1025}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": "a"}, "tokens"),
            ("/detokenize", {"tokens": [1.5]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
            ("/detokenize", {"tokens": [1], "model": "x"}, "model"),
        ):
            status, headers, raw = await ask(http, path, body)
            assert check_error(status, headers, raw)["param"] == param, body
        status, headers, raw = await get(http, "/tokenizer_info")
        assert check_error(status, headers, raw)["code"] == "model_loading"
        engine.tokenizer_info = {"eos_token": "</s>"}
        assert json.loads((await get(http, "/tokenizer_info"))[2]) == {"eos_token": "</s>"}

    play(scene, max_body_bytes=1 << 20)


# ---------------- /generate
def test_generate_answers_in_the_native_shape_whole_and_streamed() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        sampling = {"max_new_tokens": 9, "temperature": 0, "sampling_seed": 3, "min_new_tokens": 1, "foo": 1}
        status, headers, raw = await ask(http, "/generate", {"text": "a", "sampling_params": sampling, "rid": "r1"})
        assert (status, headers["X-Ignored-Params"]) == (200, "sampling_params.foo")
        body = json.loads(raw)
        latency = body["meta_info"].pop("e2e_latency")
        assert latency >= 0
        reason = {"type": "stop"}
        counts = {"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 2}
        assert body == {
            "text": TEXT,
            "output_ids": [0, 1, 2, 3],
            "meta_info": {"id": "r1", "finish_reason": reason, **counts},
        }
        _, _, raw = await ask(http, "/generate", {"input_ids": [[1, 2], [3]]})
        assert [b["text"] for b in json.loads(raw)] == [TEXT, TEXT]
        engine.finish = Finish.LENGTH
        _, _, raw = await ask(http, "/generate", {"input_ids": [1, 2], "stream": True})
        told = events(raw)
        assert told[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
        assert (told[-1]["text"], told[-1]["output_ids"]) == (TEXT, [0, 1, 2, 3])
        assert all(a["text"] == b["text"][: len(a["text"])] for a, b in itertools.pairwise(told))  # cumulative
        _, _, raw = await ask(http, "/generate", {"text": "a", "stream": True, "incremental": True})
        told = events(raw)
        assert "".join(t["text"] for t in told) == TEXT
        assert [i for t in told for i in t["output_ids"]] == [0, 1, 2, 3]
        _, _, raw = await ask(http, "/generate", {"text": ["a"], "stream": True})
        assert {t["index"] for t in events(raw)} == {0}

    engine = play(scene)
    assert engine.opened[0] == (TextPrompt("a"), SamplingParams(max_tokens=9, temperature=0, seed=3, min_tokens=1))
    assert [p for p, _ in engine.opened[1:3]] == [TokenPrompt((1, 2)), TokenPrompt((3,))]
    assert engine.opened[1][1].max_tokens == 128


def test_generate_tells_the_log_probabilities_of_prompt_and_answer() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        asked = {"input_ids": [1], "return_logprob": True, "top_logprobs_num": 1}
        _, _, raw = await ask(http, "/generate", asked)
        meta = json.loads(raw)["meta_info"]
        assert meta["output_token_logprobs"] == [[-1, 0, "Hel"], [-2, 1, "\ufffd"], [-3, 2, "lo"], [-4, 3, "end"]]
        assert meta["output_top_logprobs"][0] == [[-0.25, 9, "\ufffd"]]
        assert "input_token_logprobs" not in meta

    engine = play(scene)
    assert engine.opened[0][1].logprobs == 1
    assert not engine.opened[0][1].echo


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": [1, 2]}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": "a"}, "input_ids"),
        ({"input_ids": ["a"]}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"text": "a", "sampling_params": [1]}, "sampling_params"),
        ({"text": "a", "sampling_params": {"n": 2}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 0, "stream": True}, "logprob_start_len"),
        ({"text": "a", "top_logprobs_num": 99, "return_logprob": True}, "top_logprobs_num"),
        ({"text": "a", "model": "x"}, "model"),
        ({"text": ["a"] * 5}, "prompt"),
    ],
)
def test_what_is_wrong_with_a_native_request_is_said(body: dict[str, Any], param: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, headers, raw = await ask(http, "/generate", body)
        assert check_error(status, headers, raw)["param"] == param

    assert not play(scene, max_open_requests=4).opened


# ---------------- Responses
RESPONSES = "/v1/responses"


def test_the_sdk_reads_a_response() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            answer = await sdk.responses.create(
                model="tiny", input="hi", instructions="be kind", max_output_tokens=9, temperature=0.5, metadata={"a": "b"}
            )
            engine.finish = Finish.LENGTH
            cut = await sdk.responses.create(model="tiny", input="hi", include=["message.output_text.logprobs"], top_logprobs=1)
        assert answer.output_text == TEXT
        assert (answer.status, answer.model, answer.temperature, answer.metadata) == ("completed", "tiny", 0.5, {"a": "b"})
        usage = answer.usage
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (3, 4, 7)
        assert usage.input_tokens_details.cached_tokens == 2
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
        told = cut.output[0].content[0].logprobs  # type: ignore[union-attr]
        assert [t.logprob for t in told] == [-1, -2, -3, -4]

    engine = play(scene)
    prompt, params = engine.opened[0]
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.payload)["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]
    assert params == SamplingParams(max_tokens=9, temperature=0.5)


def test_items_become_the_messages_of_a_chat() -> None:
    items = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
    ]

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, headers, _ = await ask(http, RESPONSES, {"input": items, "store": True, "colour": 1, "reasoning": {}})
        assert (status, headers["X-Ignored-Params"]) == (200, "colour,store")

    prompt, _ = play(scene).opened[0]
    assert isinstance(prompt, ChatPrompt)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}, "id": "c1"}
    assert json.loads(prompt.payload)["messages"] == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "b"},
    ]


def test_the_sdk_follows_the_events_of_a_response() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            async with sdk.responses.stream(model="tiny", input="hi") as stream:
                seen = [e async for e in stream]
                final = await stream.get_final_response()
            assert final.output_text == TEXT
            assert "".join(e.delta for e in seen if e.type == "response.output_text.delta") == TEXT
        _, headers, raw = await ask(http, RESPONSES, {"input": "hi", "stream": True})
        assert headers["Content-Type"] == "text/event-stream"
        told = typed(raw)
        names = [name.removeprefix("response.") for name, _ in told]
        start = ["created", "in_progress", "output_item.added", "content_part.added"]
        end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
        assert names[:4] == start
        assert names[-4:] == end
        assert set(names[4:-4]) == {"output_text.delta"}
        assert [data["sequence_number"] for _, data in told] == list(range(len(told)))
        assert told[-1][1]["response"]["id"] == told[0][1]["response"]["id"]
        engine.finish = Finish.LENGTH
        _, _, raw = await ask(http, RESPONSES, {"input": "hi", "stream": True})
        assert typed(raw)[-1][0] == "response.incomplete"

    play(scene)


def test_a_failing_stream_says_so_in_its_own_shape() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.error, engine.after = DIED, 1
        _, _, raw = await ask(http, RESPONSES, {"input": "hi", "stream": True})
        (kind, error), (last, failed) = typed(raw)[-2:]
        assert (kind, error["message"], error["code"]) == ("error", DIED.message, "engine_error")
        assert (last, failed["response"]["status"]) == ("response.failed", "failed")
        _, _, raw = await ask(http, "/v1/messages", {"messages": USER, "max_tokens": 9, "stream": True})
        told = typed(raw)
        assert told[-1] == ("error", {"type": "error", "error": {"type": "api_error", "message": DIED.message}})
        _, _, raw = await ask(http, "/generate", {"text": "hi", "stream": True})
        assert events(raw)[-1] == DIED.body()
        engine.after = 0
        for path, body in ((RESPONSES, {"input": "hi"}), ("/generate", {"text": "hi"})):
            status, headers, raw = await ask(http, path, {**body, "stream": True})
            assert (status, check_error(status, headers, raw)["code"]) == (500, "engine_error")

    play(scene)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [5]}, "input[0]", "invalid_type"),
        ({"input": [{"content": "a"}]}, "input[0].role", "missing_required_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "unsupported_value"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"input": "a", "conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"input": "a", "background": True}, "background", "unsupported_parameter"),
        ({"input": "a", "truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"input": "a", "include": ["file_search_call.results"]}, "include", "unsupported_value"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"input": "a", "text": "json"}, "text", "invalid_type"),
        ({"input": "a", "temperature": 3}, "temperature", "invalid_value"),
        ({"input": "a", "top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"input": "a", "model": "gpt-5"}, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_with_a_response_request_is_said(body: dict[str, Any], param: str, code: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, headers, raw = await ask(http, RESPONSES, body)
        error = check_error(status, headers, raw)
        assert (error["param"], error["code"]) == (param, code)

    assert not play(scene).opened


def test_a_response_of_earlier_is_not_there_and_the_answer_says_why() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        async with client(http) as sdk:
            with pytest.raises(openai.NotFoundError, match="keeps no responses") as caught:
                await sdk.responses.retrieve("resp_1")
            assert caught.value.code == "response_not_found"

    play(scene)


# ---------------- Anthropic's
MESSAGES = "/v1/messages"


def test_a_message_is_answered_in_anthropics_shape() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        body = {"model": "tiny", "max_tokens": 9, "messages": USER, "system": [{"type": "text", "text": "be kind"}]}
        status, headers, raw = await ask(http, MESSAGES, {**body, "top_k": 5, "colour": 1, "metadata": {}})
        answer = json.loads(raw)
        assert (status, headers["X-Ignored-Params"]) == (200, "colour")
        assert answer.pop("id").startswith("msg_")
        assert answer.pop("timings")["cached_n"] == 2
        usage = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "input_tokens": 1, "output_tokens": 4}
        assert answer == {
            "type": "message",
            "role": "assistant",
            "model": "tiny",
            "content": [{"type": "text", "text": TEXT}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": usage,
        }
        _, _, raw = await ask(http, MESSAGES, {**body, "stop_sequences": ["x"]})  # the last token is no end token
        assert (json.loads(raw)["stop_reason"], json.loads(raw)["stop_sequence"]) == ("stop_sequence", "x")
        engine.finish = Finish.LENGTH
        _, _, raw = await ask(http, MESSAGES, {**body, "stream": True})
        told = typed(raw)
        assert [name for name, _ in told if name != "content_block_delta"] == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert "".join(d["delta"]["text"] for n, d in told if n == "content_block_delta") == TEXT
        assert told[0][1]["message"]["usage"]["input_tokens"] == 1
        assert told[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        assert told[-2][1]["usage"]["output_tokens"] == 4
        _, _, raw = await ask(http, f"{MESSAGES}/count_tokens", {"model": "tiny", "messages": USER})
        assert json.loads(raw) == {"input_tokens": len("a chat")}

    engine = play(scene)
    prompt, params = engine.opened[0]
    assert isinstance(prompt, ChatPrompt)
    assert json.loads(prompt.payload)["messages"][0] == {"role": "system", "content": "be kind"}
    assert params == SamplingParams(max_tokens=9, top_k=5)
    assert engine.opened[1][1].stop == ("x",)


def test_blocks_become_the_messages_of_a_chat() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]},
                {"type": "text", "text": "c"},
            ],
        },
    ]

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, _, raw = await ask(http, MESSAGES, {"max_tokens": 9, "messages": messages})
        assert status == 200, raw

    prompt, _ = play(scene).opened[0]
    assert isinstance(prompt, ChatPrompt)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}, "id": "t1"}
    assert json.loads(prompt.payload)["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "7", "tool_call_id": "t1"},
        {"role": "user", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("change", "status", "kind", "word"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": None}, 400, "invalid_request_error", "messages"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [*USER, {"role": "assistant", "content": ""}]}, 400, "invalid_request_error", "last message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_request_error", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "text parts"),
        ({"system": 5}, 400, "invalid_request_error", "system"),
        ({"stop_sequences": "x"}, 400, "invalid_request_error", "stop_sequences"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"model": "claude"}, 404, "not_found_error", "claude"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_in_anthropics_shape(
    change: dict[str, Any], status: int, kind: str, word: str
) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        got, headers, raw = await ask(http, MESSAGES, {"max_tokens": 9, "messages": USER, **change})
        body = json.loads(raw)
        assert (got, body["type"], body["error"]["type"]) == (status, "error", kind)
        assert word in body["error"]["message"]
        assert headers["x-request-id"]

    assert not play(scene).opened


def test_an_overloaded_server_tells_anthropics_clients_when_to_come_back() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.refuse = OVERLOADED
        status, headers, raw = await ask(http, MESSAGES, {"max_tokens": 9, "messages": USER})
        assert (status, headers["Retry-After"]) == (429, "1")
        assert json.loads(raw)["error"]["type"] == "rate_limit_error"

    play(scene)


# ---------------- unknown fields and names
BODIES = {
    CHAT: {"messages": USER},
    COMPLETION: {"prompt": "a"},
    RESPONSES: {"input": "a"},
    "/generate": {"text": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    MESSAGES: {"messages": USER, "max_tokens": 9},
    f"{MESSAGES}/count_tokens": {"messages": USER},
    f"{RESPONSES}/input_tokens": {"input": "hi"},
}


def test_an_unknown_field_is_named_in_a_header_and_refused_with_strict() -> None:
    async def lenient(engine: ScriptedEngine, http: Server) -> None:
        for path, body in BODIES.items():
            status, headers, _ = await ask(http, path, {**body, "tempreture": 1})
            assert (status, headers["X-Ignored-Params"]) == (200, "tempreture"), path

    async def strict(engine: ScriptedEngine, http: Server) -> None:
        for path, body in BODIES.items():
            status, _, raw = await ask(http, path, {**body, "tempreture": 1})
            assert status == 400, path
            assert "Unrecognized request argument: tempreture." in json.loads(raw)["error"]["message"]
        before = len(engine.opened)
        for path, body in BODIES.items():
            assert (await ask(http, path, body))[0] == 200, path
        status, headers, raw = await ask(http, CHAT, {**BODIES[CHAT], "x": 1})
        assert check_error(status, headers, raw)["code"] == "unknown_parameter"
        assert before == 0

    play(lenient)
    play(strict, strict=True)


def test_any_model_name_will_do_where_the_operator_says_so() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path, body in BODIES.items():
            assert (await ask(http, path, {**body, "model": "gpt-4o"}))[0] == 200, path
        assert (await get(http, "/v1/models/gpt-4o"))[0] == 200

    play(scene, any_model_name=True)


class VectorEngine(ScriptedEngine):
    """Answers with (2, 3, 6) times the number of the request."""

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        uid = len(self.opened)
        self.opened.append((prompt, params))
        self.live[uid] = on_chunk
        self.options = options
        vector = np.array([2, 3, 6], np.float32) * (uid + 1)

        def tell() -> None:
            self.live.pop(uid)(Chunk("", (), Finish.STOP, 4, 0, (), vector))

        asyncio.get_running_loop().call_soon(tell)
        return uid

    def __init__(self, **server: Any) -> None:
        super().__init__(**server)
        model = dataclasses.replace(self.config.model, hidden_size=3)
        self.config = dataclasses.replace(self.config, model=model)


# ---------------- timings
@pytest.mark.parametrize("path", [CHAT, COMPLETION, RESPONSES, MESSAGES])
def test_every_answer_says_how_long_it_took_in_its_body_and_a_header(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, headers, raw = await ask(http, path, BODIES[path])
        timings = json.loads(raw)["timings"]
        assert status == 200
        assert timings.keys() == {"queue_ms", "ttft_ms", "decode_ms", "total_ms", "tok_s", "cached_n"}
        assert timings["total_ms"] == pytest.approx(timings["ttft_ms"] + timings["decode_ms"], abs=0.002)
        assert timings["tok_s"] == pytest.approx(
            3000 / timings["decode_ms"], rel=0.1
        )  # of four tokens the first is not counted
        assert re.fullmatch(r"queue;dur=[\d.]+, ttft;dur=[\d.]+, decode;dur=[\d.]+, total;dur=[\d.]+", headers["Server-Timing"])
        options = {"stream_options": {"include_usage": True}} if path in (CHAT, COMPLETION) else {}
        _, headers, raw = await ask(http, path, {**BODIES[path], "stream": True, **options})
        assert re.fullmatch(r"queue;dur=[\d.]+, ttft;dur=[\d.]+", headers["Server-Timing"])
        assert raw.count(b'"ttft_ms"') == 1

    play(scene)


def test_timings_are_of_the_generation_and_not_of_what_came_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("minisgl.api.generation.time.monotonic", lambda: now)

    async def main() -> None:
        nonlocal now
        engine = ScriptedEngine()
        engine.stall = True
        generation = Generation(engine, [TextPrompt("a"), TextPrompt("b")], SamplingParams())
        now = 100.25
        assert generation.timings == Timings(0.25, 0)
        engine.live[1](Chunk("x", (1,), Finish.NONE, 3, 2, queued=0.125))
        now = 100.5
        assert generation.timings == Timings(0.25, 0.25, 0.125)
        engine.live.pop(1)(Chunk("y", (1, 2), Finish.STOP, 3, 2))
        now = 101.25
        engine.live.pop(0)(Chunk("z", (1, 2, 3), Finish.STOP, 3, 2, queued=0.5))
        now = 900.0
        assert generation.timings == Timings(0.25, 1.0, 0.125)  # of the prompt that was first
        generation.close()

    asyncio.run(main())
    told = Timings(0.25, 1.0, 0.125).render([Result(cached_tokens=2, completion_tokens=6)])
    assert told == {"queue_ms": 125, "ttft_ms": 250, "decode_ms": 1000, "total_ms": 1250, "tok_s": 5, "cached_n": 2}
    assert Timings(0.25, 0.0).render([Result(completion_tokens=1)])["tok_s"] is None


# ---------------- errors that every endpoint has
ALL = {**BODIES, "/v1/embeddings": {"input": "a"}}


def told(path: str, status: int, headers: Any, raw: bytes) -> str:
    """The message of an error, whose shape is that of the path."""
    if not path.startswith(MESSAGES):
        return str(check_error(status, headers, raw)["message"])
    body = json.loads(raw)
    assert body.keys() == {"type", "error"}
    assert body["error"].keys() == {"type", "message"}
    assert headers["x-request-id"]
    return str(body["error"]["message"])


@pytest.mark.parametrize("path", ALL)
def test_what_any_endpoint_refuses_is_refused_in_its_shape(path: str) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        cases: list[tuple[int, str, Any, dict[str, Any]]] = [
            (400, "line 1, column", b"{oops", {}),
            (400, "must be an object", b"[]", {}),
            (400, "application/json", b"{}", {"headers": {"Content-Type": "text/plain"}}),
            (400, "Compressed", b"{}", {"headers": {"Content-Type": "application/json", "Content-Encoding": "gzip"}}),
            (413, "larger than 4096", b" " * 5000, {}),
            (404, "tiny, org/alias", {**ALL[path], "model": "nobody"}, {}),
        ]
        for status, words, body, kw in cases:
            got, headers, raw = await ask(http, path, body, **kw)
            assert got == status, raw
            assert words in told(path, got, headers, raw)
            assert b"oops" not in raw
        got, headers, raw = await get(http, path)
        assert (got, headers["Allow"]) == (405, "POST")
        got, headers, raw = await ask(http, path + "x", {})
        assert got == 404
        assert path.rpartition("/")[2] in told(path, got, headers, raw)
        assert (await ask(http, path, ALL[path], headers={"x-request-id": "mine-1"}))[1]["x-request-id"] == "mine-1"

    play(scene, VectorEngine if path == "/v1/embeddings" else ScriptedEngine)


GENERATING = [p for p in ALL if "token" not in p]


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_its_status_before_the_first_event(path: str, stream: bool) -> None:
    loading = model_loading()
    late = RequestError("Too late.", status=504, param="timeout", code="timeout")
    long = context_overflow("prompt", 64, 99, "98 in the prompt, 1 in the completion")

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        body = {**ALL[path], **({"stream": True} if stream and path != "/v1/embeddings" else {})}
        for error in (OVERLOADED, loading, long):
            engine.refuse = error
            status, headers, raw = await ask(http, path, body)
            assert (status, told(path, status, headers, raw)) == (error.status, error.message)
            assert headers.get("Retry-After") == (str(error.retry_after) if error.retry_after else None)
        engine.refuse = None
        for error in (late, DIED):
            engine.error = error
            status, headers, raw = await ask(http, path, body)
            assert (status, told(path, status, headers, raw)) == (error.status, error.message)

    play(scene)


@pytest.mark.parametrize("path", [p for p in GENERATING if p != "/v1/embeddings"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_and_is_counted(path: str, stream: bool) -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stall, engine.after = True, 1
        async with aiohttp.ClientSession() as session:
            asking = asyncio.ensure_future(session.post(http.make_url(path), json={**ALL[path], "stream": stream}))
            await engine.wait_for(lambda: len(engine.live) == 1)
            if stream:
                response = await asking
                await response.content.readany()
                response.close()
            asking.cancel()
        await engine.wait_for(lambda: not engine.live)
        m = parse_metrics((await get(http, "/metrics"))[2])
        assert m['minisgl_request_success_total{finished_reason="abort"}'] == 1
        assert m[f'minisgl_http_requests_total{{method="POST",route="{path}",status="499"}}'] == 1

    play(scene)


# ---------------- keys
def test_every_route_but_the_open_ones_needs_a_key() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        wrong = ({}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer {KEY}x"})
        odd = ({"Authorization": "Bearer k\xe9"}, {"x-api-key": KEY[:-1]}, {"Authorization": f"Bearer {KEY.upper()}"})
        app = build_app(engine)
        routes = {r.resource.canonical for r in app.router.routes() if r.resource is not None}
        pages = {"/", "/v1", "/docs", "/page/{file}"}
        guarded = sorted(routes - {"/health", "/ready", "/ping", "/metrics"} - pages)
        assert len(guarded) > 20
        for headers in (*wrong, *odd):
            for path in ("/v1/models", "/nothing", "/health/", "//health", "/v1/models?x=/health", "/health%2f..%2fv1/models"):
                status, got, raw = await get(http, path, headers=headers)
                assert (status, got["WWW-Authenticate"]) == (401, "Bearer"), (path, headers)
                assert check_error(status, got, raw)["code"] == "invalid_api_key"
        for path in guarded:
            assert (await get(http, re.sub(r"{.*?}", "x", path)))[0] == 401, path
            assert (await ask(http, re.sub(r"{.*?}", "x", path), {}))[0] == 401, path
        for path in ("/health", "/ready", "/ping", "/metrics", *pages):
            assert (await get(http, path.format(file="main.js")))[0] == 200
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": "z" * 20}):
            assert (await get(http, "/v1/models", headers=headers))[0] == 200
        _, _, raw = await ask(http, MESSAGES, {})
        assert json.loads(raw)["error"]["type"] == "authentication_error"

    assert not play(scene, api_keys=(KEY, "z" * 20)).opened


def test_keys_come_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{KEY}\n\n  {'z' * 20}\n")
    assert read_keys(str(path)) == (KEY, "z" * 20)
    assert read_keys(None) == ()
    for text in ("", "short\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="--api-key-file"):
            read_keys(str(path))
    with pytest.raises(UserError, match="cannot read"):
        read_keys(str(tmp_path / "none"))


# ---------------- metrics
def parse_metrics(raw: bytes) -> dict[str, float]:
    """Name with labels -> value; every sample has a HELP and a TYPE before it."""
    values, known = {}, {}
    for line in raw.decode().splitlines():
        if line.startswith("#"):
            _, what, name, rest = line.split(" ", 3)
            known.setdefault(name, {})[what] = rest
            continue
        name, value = line.rsplit(" ", 1)
        assert re.fullmatch(r'[a-z_0-9:]+(\{([a-z_]+="[^"\\\n]*",?)+\})?', name), name
        family = re.sub(r"\{.*", "", name)
        if family not in known:
            family = re.sub(r"_(bucket|sum|count)$", "", family)
            assert known[family]["TYPE"] == "histogram"
        assert known[family].keys() == {"HELP", "TYPE"}
        assert name not in values
        values[name] = float(value)
    return values


def test_metrics_count_what_happened() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        engine.stats = {"running_requests": 2, "waiting_requests": 5}
        engine.stats |= {"total_pages": 100, "free_pages": 40, "evictable_pages": 30}
        await ask(http, CHAT, {"messages": USER})
        await ask(http, COMPLETION, {"prompt": ["a", "b"], "stream": True})
        await ask(http, CHAT, {"messages": USER, "temperature": 9})
        await ask(http, CHAT, {"messages": USER, "model": 'evil"} 1\n'})
        await get(http, "/v1/models/some-name-of-mine")
        await get(http, "/somewhere")
        engine.error = DIED
        await ask(http, CHAT, {"messages": USER})
        _, headers, raw = await get(http, "/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        m = parse_metrics(raw)
        assert (m["minisgl_num_requests_running"], m["minisgl_num_requests_waiting"]) == (2, 5)
        assert m["minisgl_kv_cache_usage_perc"] == pytest.approx(0.3)
        assert m["minisgl_kv_cache_filled_perc"] == pytest.approx(0.6)
        assert m['minisgl_request_success_total{finished_reason="stop"}'] == 3
        assert m['minisgl_request_success_total{finished_reason="error"}'] == 1
        assert (m["minisgl_prompt_tokens_total"], m["minisgl_prompt_tokens_cached_total"]) == (9, 6)
        assert m["minisgl_generation_tokens_total"] == 12
        for name, count in (("time_to_first_token", 3), ("inter_token_latency", 9), ("e2e_request_latency", 3)):
            assert m[f"minisgl_{name}_seconds_count"] == count
            assert m[f'minisgl_{name}_seconds_bucket{{le="+Inf"}}'] == count
            buckets = [v for k, v in m.items() if k.startswith(f"minisgl_{name}_seconds_bucket")]
            assert buckets == sorted(buckets)
        posted = 'minisgl_http_requests_total{method="POST",route="/v1/chat/completions",status="%d"}'
        assert [m[posted % s] for s in (200, 400, 404, 500)] == [1, 1, 1, 1]
        assert m['minisgl_http_requests_total{method="GET",route="/v1/models/{name}",status="404"}'] == 1
        assert m['minisgl_http_requests_total{method="unknown",route="unknown",status="404"}'] == 1
        assert b"some-name" not in raw
        assert b"evil" not in raw

    play(scene)


# ---------------- the description
def test_the_description_has_every_route_and_every_field() -> None:
    config = ScriptedEngine().config
    document = openapi.document(config)
    described = {(method, path) for path, item in document["paths"].items() for method in item}
    routes = build_app(ScriptedEngine()).router.routes()
    served = {
        (r.method.lower(), r.resource.canonical) for r in routes if r.resource is not None and r.method not in ("HEAD", "*")
    }
    assert described == served
    for route in openapi.ROUTES:
        for field in route.fields or ():
            assert field.doc or field.support is Support.HARMLESS, f"{route.path}: {field.name}"
    assert json.loads(json.dumps(document)) == document


def test_the_description_lets_every_field_be_null_that_may_be_left_out() -> None:
    paths = openapi.document(ScriptedEngine().config)["paths"]
    for route in openapi.ROUTES:
        if route.fields is None:
            continue
        schema = paths[route.path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema.get("required", []) == list(route.fields.required)
        for name, field in schema["properties"].items():
            needed = name in (*route.fields.required, *route.fields.either)
            if "type" in field:
                assert ("null" in field["type"]) is not needed, (route.path, name)
            if "enum" in field and name != "model":
                assert (None in field["enum"]) is not needed, (route.path, name)
            if "oneOf" in field:
                assert ({"type": "null"} in field["oneOf"]) is not needed, (route.path, name)


WRONG = {"integer": "x", "number": "x", "boolean": 5, "string": 5, "array": 5, "object": 5}


@pytest.mark.parametrize("path", [r.path for r in openapi.ROUTES if r.fields and r.path != "/v1/batches"])
def test_what_the_description_says_of_a_field_is_what_is_checked(path: str) -> None:
    """A value of another type, or just beyond a bound, is refused under the field's name."""
    schema = openapi.document(ScriptedEngine().config)["paths"][path]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]

    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for name, field in schema["properties"].items():
            kinds = {field["type"]} if isinstance(field.get("type"), str) else set(field.get("type", ())) - {"null"}
            wrong: list[Any] = [WRONG[kind] for kind in kinds]
            wrong += [field[b] + d for b, d in (("minimum", -1), ("maximum", 1)) if b in field]
            for value in wrong:
                others = OTHERWISE.get((path, name)) or {**BODIES, **MORE_BODIES}[path]
                body = {**others, **EXTRA.get(name, {}), name: value}
                status, _, raw = await ask(http, path, body)
                error = json.loads(raw)["error"]
                assert status in (400, 404), (name, value, raw)
                assert error.get("param", name) == name or name == "metadata", (name, value, error)

    play(scene)


MORE_BODIES: dict[str, Any] = {
    "/v1/embeddings": {"input": "a"},
    "/debug/journal/start": {"name": "morning"},
    "/debug/live": {"watcher": "nobody"},
    f"{CHAT}/render": {"messages": USER},
    f"{COMPLETION}/render": {"prompt": "a"},
}
OTHERWISE: dict[tuple[str, str], Any] = {  # fields that exclude each other
    ("/generate", "input_ids"): {"stream": False},
    ("/tokenize", "messages"): {"model": "tiny"},
    ("/tokenize", "chat_template_kwargs"): {"messages": USER},
    ("/v1/embeddings", "messages"): {"model": "tiny"},
}
EXTRA: dict[str, Any] = {"top_logprobs": {"logprobs": True}, "top_logprobs_num": {"return_logprob": True}}


def test_the_page_for_people_needs_nothing_from_elsewhere() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        status, headers, raw = await get(http, "/docs")
        page = raw.decode()
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert not re.search(r"https?://|src=|@import|url\(", page)
        for route in openapi.ROUTES:
            assert f"<code>{route.path}</code>" in page
        assert "X-Ignored-Params" in page
        assert json.loads((await get(http, "/openapi.json"))[2])["openapi"] == "3.1.0"

    play(scene)


def test_a_server_without_a_data_directory_says_how_to_have_files() -> None:
    async def scene(engine: ScriptedEngine, http: Server) -> None:
        for path in ("/v1/files", "/v1/batches", "/v1/files/file-1", "/v1/batches/batch_1"):
            status, headers, raw = await get(http, path)
            assert (status, check_error(status, headers, raw)["code"]) == (404, "no_data_dir")
            assert b"--data-dir" in raw

    play(scene)
