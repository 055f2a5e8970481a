"""Forms, tools and thoughts in the Responses API and in Anthropic's: what requests become, and what answers hold."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from typing import Any

import openai
import pytest
from conftest import fake_spec
from pydantic import BaseModel
from test_endpoints import MESSAGES, RESPONSES, typed
from test_reply import CALL, SCHEMA, STYLES, TALK, WEATHER, Speaker, admits, play
from test_server import CHAT, USER, ask, check_error, client

from minisgl import grammar
from minisgl.api.endpoints.anthropic_blocks import Message
from minisgl.api.endpoints.responses import ResponsesRequest
from minisgl.api.endpoints.responses_items import Response
from minisgl.api.engine import Chunk
from minisgl.api.requests.openai import parse_chat
from minisgl.api.usage import Timings
from minisgl.config import Config, ServerConfig
from minisgl.sampling_params import Finish

FLAT = {"type": "function", **WEATHER["function"]}  # a tool as the Responses API writes it
BLOCK = {"name": "get_weather", "description": "now", "input_schema": WEATHER["function"]["parameters"]}
ASK = {"max_tokens": 99, "messages": USER}
ULM, JENA = {"city": "Ulm"}, {"city": "Jena"}


class GetWeather(BaseModel):
    city: str


def kwargs(engine: Speaker, request: int = -1) -> Any:
    return json.loads(engine.opened[request][0].payload)["kwargs"]  # type: ignore[union-attr]


# ---------------- Responses
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_items_of_a_streamed_response_are_those_of_a_whole_one(size: int) -> None:
    async def scene(http: Any) -> None:
        body = {"input": "hi", "tools": [FLAT]}
        _, _, raw = await ask(http, RESPONSES, body)
        whole = json.loads(raw)
        thought, message, *calls = whole["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "Which city?"}]
        assert message["content"][0]["text"] == "Let me see."
        assert [(c["type"], c["name"], json.loads(c["arguments"])) for c in calls] == [
            ("function_call", "get_weather", ULM),
            ("function_call", "get_weather", JENA),
        ]
        assert whole["tools"] == [FLAT]
        _, _, raw = await ask(http, RESPONSES, {**body, "stream": True})
        told = typed(raw)
        assert [data["sequence_number"] for _, data in told] == list(range(len(told)))
        texts = ["", "", "", ""]
        done: list[Any] = []
        for kind, data in told:
            if kind.endswith(".delta"):
                assert data["output_index"] == len(done)  # one after the other
                texts[data["output_index"]] += data["delta"]
            elif kind == "response.output_item.done":
                done.append(data["item"])
            elif kind.endswith((".text.done", "_text.done")):
                assert data["text"] == texts[data["output_index"]]
            elif kind == "response.function_call_arguments.done":
                assert data["arguments"] == texts[data["output_index"]]
        assert told[-1][0] == "response.completed"
        assert told[-1][1]["response"]["output"] == done
        for usage in (whole["usage"], told[-1][1]["response"]["usage"]):
            assert usage["output_tokens_details"] == {"reasoning_tokens": 1}
            assert usage["output_tokens"] == len(engine.said)
        for a, b in zip(whole["output"], done, strict=True):
            assert {k: v for k, v in a.items() if "id" not in k} == {k: v for k, v in b.items() if "id" not in k}

    engine = Speaker(TALK, size, thoughts=1, **STYLES)
    play(engine, scene)


def test_the_sdk_parses_a_form_and_streams_calls_of_functions_through_responses() -> None:
    async def structured(http: Any) -> None:
        async with client(http) as sdk:
            answer = await sdk.responses.parse(model="tiny", input="hi", text_format=GetWeather)
            assert answer.output_parsed == GetWeather(city="Ulm")
            async with sdk.responses.stream(model="tiny", input="hi", text_format=GetWeather) as stream:
                parsed = [e.parsed async for e in stream if e.type == "response.output_text.done"]
            assert parsed == [GetWeather(city="Ulm")]

    play(engine := Speaker('{"city": "Ulm"}', 4), structured)
    for _, params in engine.opened:
        grammar.check(params.grammar, "text.format")
        assert admits(params.grammar, '{"city": "Ulm"}')
        assert not admits(params.grammar, "Ulm")

    async def calls(http: Any) -> None:
        tools: Any = [openai.pydantic_function_tool(GetWeather, name="get_weather")]
        async with client(http) as sdk:
            async with sdk.responses.stream(model="tiny", input="hi", tools=tools, tool_choice="required") as stream:
                seen = [e async for e in stream]
                final = await stream.get_final_response()
            deltas = [e for e in seen if e.type == "response.function_call_arguments.delta"]
            assert len(deltas) > 2
            call = final.output[0]
            assert call.type == "function_call"
            assert call.parsed_arguments == GetWeather(city="Ulm")
            assert deltas[-1].snapshot == call.arguments
            again = [{"role": "user", "content": "hi"}, call.model_dump(exclude={"parsed_arguments"}, exclude_none=True)]
            again.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
            await sdk.responses.create(model="tiny", input=again, tools=[FLAT])  # type: ignore[arg-type]

    play(engine := Speaker(CALL, 3, tool_call_parser="hermes"), calls)
    assert admits(engine.opened[0][1].grammar, CALL)
    assert not admits(engine.opened[0][1].grammar, "Ulm")
    assert kwargs(engine)["tools"][0]["function"]["name"] == "get_weather"
    told = json.loads(engine.opened[-1][0].payload)["messages"]  # type: ignore[union-attr]
    assert told[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": json.dumps(ULM)}
    assert told[2]["content"] == "rain"


def test_calls_of_one_turn_stay_together() -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see."},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": "2"},
    ]

    async def scene(http: Any) -> None:
        assert (await ask(http, RESPONSES, {"input": items}))[0] == 200

    play(engine := Speaker("x"), scene)
    told = json.loads(engine.opened[0][0].payload)["messages"]  # type: ignore[union-attr]
    assert [m["role"] for m in told] == ["user", "assistant", "tool", "tool"]
    assert told[1]["content"] == "Let me see."
    assert [c["id"] for c in told[1]["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**FLAT, "parameters": 5}]}, "tools[0].parameters"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": 5}, "tools"),
        ({"tools": [FLAT], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strnig"}}}}, "text.format"),
    ],
)
def test_what_cannot_be_used_of_a_response_is_named_as_its_client_named_it(body: Any, param: str) -> None:
    async def scene(http: Any) -> None:
        for stream in (False, True):
            error = check_error(*await ask(http, RESPONSES, {"input": "hi", "stream": stream, **body}))
            assert error["param"] == param
            assert "response_format" not in error["message"]
            assert ".function." not in error["message"]

    play(Speaker("x", tool_call_parser="hermes"), scene)


def test_the_effort_of_thinking_reaches_the_template_of_a_model_that_thinks_and_no_other() -> None:
    async def scene(http: Any) -> None:
        for effort in ("none", "low"):
            assert (await ask(http, CHAT, {"messages": USER, "reasoning_effort": effort}))[0] == 200
        status, headers, raw = await ask(http, RESPONSES, {"input": "hi", "reasoning": {"effort": "high", "summary": "auto"}})
        assert (status, headers["X-Ignored-Params"]) == (200, "reasoning.summary")
        assert json.loads(raw)["reasoning"] == {"effort": "high", "summary": None}
        given = {"messages": USER, "reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}
        assert (await ask(http, CHAT, given))[0] == 200  # what is said more plainly counts
        error = check_error(*await ask(http, CHAT, {"messages": USER, "reasoning_effort": "deep"}))
        assert (error["param"], error["code"]) == ("reasoning_effort", "invalid_value")

    play(engine := Speaker("x", **STYLES), scene)
    assert [(k["enable_thinking"], k["reasoning_effort"]) for k in (kwargs(engine, i) for i in range(4))] == [
        (False, "none"),
        (True, "low"),
        (True, "high"),
        (False, "high"),
    ]

    async def without(http: Any) -> None:
        for path, body, param in (
            (CHAT, {"messages": USER, "reasoning_effort": "low"}, "reasoning_effort"),
            (RESPONSES, {"input": "hi", "reasoning": {"effort": "low"}}, "reasoning.effort"),
        ):
            status, headers, _ = await ask(http, path, body)
            assert (status, headers["X-Ignored-Params"]) == (200, param)
        assert (await ask(http, CHAT, {"messages": USER, "reasoning_effort": "none"}))[0] == 200
        status, headers, _ = await ask(http, MESSAGES, {**ASK, "thinking": {"type": "enabled", "budget_tokens": 1024}})
        assert (status, headers["X-Ignored-Params"]) == (200, "thinking")

    play(engine := Speaker("x"), without)
    assert kwargs(engine) == {}


def test_what_is_not_used_of_text_is_reported() -> None:
    async def scene(http: Any) -> None:
        _, headers, raw = await ask(http, RESPONSES, {"input": "hi", "text": {"verbosity": "low"}})
        assert headers["X-Ignored-Params"] == "text.verbosity"
        assert json.loads(raw)["text"] == {"format": {"type": "text"}}

    play(Speaker("x"), scene)


def test_a_call_that_was_cut_off_is_incomplete_in_both_shapes() -> None:
    async def scene(http: Any) -> None:
        _, _, raw = await ask(http, RESPONSES, {"input": "hi", "tools": [FLAT]})
        answer = json.loads(raw)
        assert (answer["status"], [i["status"] for i in answer["output"]]) == ("incomplete", ["incomplete"])
        _, _, raw = await ask(http, MESSAGES, {**ASK, "tools": [BLOCK]})
        message = json.loads(raw)
        assert message["stop_reason"] == "max_tokens"
        assert message["content"][0]["input"] == {}

    engine = Speaker(CALL[:60], 4, tool_call_parser="hermes")
    engine.finish = Finish.LENGTH
    play(engine, scene)


# ---------------- both, without a server
PARTS = ("<think>", "</think>", "\n", "text", "é€ ", CALL, CALL.replace("Ulm", "Jena"), '<tool_call>{"name": "x"', "<", " ")


def stable(value: Any) -> Any:
    if isinstance(value, list):
        return [stable(v) for v in value]
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in ("id", "call_id", "item_id", "created_at", "completed_at")}
    return value


@pytest.mark.parametrize("seed", range(40))
def test_the_events_of_any_split_of_any_text_add_up_to_the_body(seed: int) -> None:
    rng = random.Random(seed)
    server = ServerConfig(tool_call_parser="hermes", reasoning_parser=rng.choice(("", "qwen3", "deepseek_r1")))
    config = Config(replace(fake_spec(), eos_ids=(0,)), server=server)
    request = parse_chat(config, {"messages": USER, "tools": [WEATHER]})
    timings, finish = Timings(0.1, 0.2), rng.choice((Finish.STOP, Finish.LENGTH))
    text = "".join(rng.choice(PARTS)[: rng.choice((3, 99, 99))] for _ in range(rng.randrange(9)))
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(9)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    chunks = [Chunk(piece, (5,), finish if i == len(cuts) else Finish.NONE, 9, 2) for i, piece in enumerate(pieces)]
    one = Chunk(text, (5,) * len(pieces), finish, 9, 2)

    def play_in(answer: Any) -> list[tuple[str, Any]]:
        return typed(answer.start() + b"".join(answer.add(0, chunk) for chunk in chunks) + answer.end(timings))

    def make_response() -> Response:
        return Response(config, ResponsesRequest(request, {}, ()))

    *_, (_, last) = events = play_in(make_response())
    body = asyncio.run(make_response().complete([one], timings))
    done = [data["item"] for kind, data in events if kind == "response.output_item.done"]
    assert stable(last["response"]) == stable(body)
    assert stable(done) == stable(body["output"])

    def make_message() -> Message:
        return Message(config, request)

    content = asyncio.run(make_message().complete([one], timings))["content"]
    grown = [""] * len(content)
    for kind, data in play_in(make_message()):
        if kind == "content_block_delta":
            grown[data["index"]] += "".join(v for k, v in data["delta"].items() if k != "type")
    for block, written in zip(content, grown, strict=True):
        if block["type"] == "tool_use":
            assert block["input"] == (json.loads(written) if written.endswith("}") else {})
        else:
            assert block[block["type"]] == written


# ---------------- the native endpoint
def test_a_native_answer_has_the_form_that_its_sampling_parameters_ask_for() -> None:
    forms = {"json_schema": json.dumps(SCHEMA), "regex": "[0-9]+", "ebnf": 'root ::= "x"'}
    good = {"json_schema": '{"n": 5}', "regex": "42", "ebnf": "x"}

    async def scene(http: Any) -> None:
        for name, value in forms.items():
            status, headers, _ = await ask(http, "/generate", {"text": "a", "sampling_params": {name: value}})
            assert (status, headers.get("X-Ignored-Params")) == (200, None)
        for bad in ({"regex": "("}, {"regex": "a", "ebnf": "root ::= x"}, {"json_schema": '{"type": "strnig"}'}):
            for stream in (False, True):
                body = {"text": "a", "sampling_params": bad, "stream": stream}
                error = check_error(*await ask(http, "/generate", body))
                assert error["param"] in bad

    play(engine := Speaker("x"), scene)
    for (_, params), (name, said) in zip(engine.opened, good.items(), strict=True):
        assert admits(params.grammar, said), name
        assert not admits(params.grammar, "no")


# ---------------- Anthropic's
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_blocks_of_a_streamed_message_are_those_of_a_whole_one(size: int) -> None:
    async def scene(http: Any) -> None:
        body = {**ASK, "tools": [BLOCK], "thinking": {"type": "enabled", "budget_tokens": 1024}}
        _, headers, raw = await ask(http, MESSAGES, body)
        whole = json.loads(raw)
        assert headers["X-Ignored-Params"] == "thinking.budget_tokens"
        assert whole["stop_reason"] == "tool_use"
        thought, text, *uses = whole["content"]
        assert thought == {"type": "thinking", "thinking": "Which city?", "signature": ""}
        assert text == {"type": "text", "text": "Let me see."}
        assert [(u["type"], u["name"], u["input"]) for u in uses] == [
            ("tool_use", "get_weather", ULM),
            ("tool_use", "get_weather", JENA),
        ]
        _, _, raw = await ask(http, MESSAGES, {**body, "stream": True})
        blocks: list[Any] = []
        texts: list[str] = []
        open_block = False
        for kind, data in typed(raw):
            if kind == "content_block_start":
                assert (data["index"], open_block) == (len(blocks), False)
                blocks.append(data["content_block"])
                texts.append("")
                open_block = True
            elif kind == "content_block_delta":
                assert (data["index"], open_block) == (len(blocks) - 1, True)
                delta = {k: v for k, v in data["delta"].items() if k != "type"}
                texts[-1] += "".join(delta.values())
            elif kind == "content_block_stop":
                open_block = False
            elif kind == "message_delta":
                assert data["delta"]["stop_reason"] == "tool_use"
                assert data["usage"] == whole["usage"]
        assert not open_block
        for block, told, expected in zip(blocks, texts, whole["content"], strict=True):
            if block["type"] == "tool_use":
                assert (block["name"], json.loads(told)) == (expected["name"], expected["input"])
                assert block["input"] == {}
            else:
                assert {**block, block["type"]: told} == expected

    play(engine := Speaker(TALK, size, **STYLES), scene)
    assert kwargs(engine)["enable_thinking"] is True
    assert kwargs(engine)["tools"][0]["function"]["parameters"] == BLOCK["input_schema"]


@pytest.mark.parametrize(
    ("choice", "must", "parallel"),
    [
        ({"type": "auto"}, False, True),
        ({"type": "any"}, True, True),
        ({"type": "any", "disable_parallel_tool_use": True}, True, False),
        ({"type": "tool", "name": "get_weather"}, True, False),
    ],
)
def test_the_choice_of_a_tool_binds_the_message(choice: Any, must: bool, parallel: bool) -> None:
    async def scene(http: Any) -> None:
        assert (await ask(http, MESSAGES, {**ASK, "tools": [BLOCK], "tool_choice": choice}))[0] == 200

    play(engine := Speaker(CALL, 9, tool_call_parser="hermes"), scene)
    text = engine.opened[0][1].grammar
    assert bool(text) is must
    if must:
        assert admits(text, CALL)
        assert not admits(text, "no")
        assert admits(text, f"{CALL}\n{CALL}") is parallel


def test_a_message_has_the_form_that_output_config_asks_for_under_both_names() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}

    async def scene(http: Any) -> None:
        _, headers, _ = await ask(http, MESSAGES, {**ASK, "output_config": {"format": form, "effort": "low"}})
        assert headers["X-Ignored-Params"] == "output_config.effort"
        assert (await ask(http, MESSAGES, {**ASK, "output_format": form}))[0] == 200

    play(engine := Speaker('{"n": 5}'), scene)
    for _, params in engine.opened:
        assert admits(params.grammar, '{"n": 5}')
        assert not admits(params.grammar, "5")


def test_tools_count_as_part_of_a_prompt_and_switches_of_thinking_reach_the_template() -> None:
    async def scene(http: Any) -> None:
        status, _, raw = await ask(http, f"{MESSAGES}/count_tokens", {"messages": USER, "tools": [BLOCK]})
        assert (status, json.loads(raw)) == (200, {"input_tokens": len("a chat")})
        await ask(http, MESSAGES, {**ASK, "thinking": {"type": "disabled"}})

    play(engine := Speaker("x", **STYLES), scene)
    assert kwargs(engine) == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"name": "a", "input_schema": 5}]}, "tools[0].input_schema"),
        ({"tools": [BLOCK], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tools": [BLOCK], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"output_format": {"type": "text"}}, "output_format.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "output_config.format.schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "strnig"}}}}, "strnig"),
    ],
)
def test_what_cannot_be_used_of_a_message_is_named_as_its_client_named_it(change: Any, word: str) -> None:
    async def scene(http: Any) -> None:
        for stream in (False, True):
            status, _, raw = await ask(http, MESSAGES, {**ASK, "stream": stream, **change})
            error = json.loads(raw)["error"]
            assert (status, error["type"]) == (400, "invalid_request_error")
            assert word in error["message"]
            assert "response_format" not in error["message"]

    play(Speaker("x", tool_call_parser="hermes"), scene)
