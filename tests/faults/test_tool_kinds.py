"""Tools that are no functions are left out and said to be; functions in namespaces are offered; results may hold images."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from test_reply import CALL, WEATHER, Speaker, admits, ask, chat, play
from test_server import client

from minisgl.api.requests.openai import ChatRequest
from minisgl.errors import InvalidParam

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
USER = [{"role": "user", "content": "hi"}]
FLAT = {"type": "function", **WEATHER["function"]}
BLOCK = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
IGNORED = "X-Ignored-Params"


def told(request: Any) -> Any:
    """What the chat template gets of a request."""
    return json.loads(request.prompts[0].payload if isinstance(request, ChatRequest) else request[0].payload)


def flat(name: str, field: str = "a", **more: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {field: {"type": "integer"}},
        "required": [field],
        "additionalProperties": False,
    }
    return {"type": "function", "name": name, "parameters": parameters, **more}


def call(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


SERVERS: dict[str, list[dict[str, Any]]] = {  # tools of other kinds, as clients send them
    CHAT: [{"type": "custom", "custom": {"name": "patch"}}, {"type": "web_search"}],
    RESPONSES: [
        {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: 1"}},
        {"type": "local_shell"},
        {"type": "mcp", "server_label": "x", "server_url": "https://x.org"},
        {"type": "code_interpreter", "container": {"type": "auto"}},
        {"type": "file_search", "vector_store_ids": ["v"]},
    ],
    MESSAGES: [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1},
    ],
}
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER, "tools": [WEATHER]},
    RESPONSES: {"input": "hi", "tools": [FLAT]},
    MESSAGES: {"max_tokens": 9, "messages": USER, "tools": [BLOCK]},
}


@pytest.mark.parametrize("path", ASK)
def test_tools_of_other_kinds_are_left_out_and_named(path: str) -> None:
    kinds = SERVERS[path]
    named = ",".join(f"tools.{tool['type']}" for tool in kinds)
    none: Any = {"type": "none"} if path == MESSAGES else "none"

    async def scene(http: Any) -> None:
        for stream in (False, True):
            for tools in ([*ASK[path]["tools"], *kinds], [*kinds, *ASK[path]["tools"]], kinds):
                for choice in ({}, {"tool_choice": none}):
                    body = {**ASK[path], "tools": tools, "stream": stream, **choice}
                    status, headers, _ = await ask(http, path, body)
                    assert (status, headers[IGNORED]) == (200, named)
        if path == MESSAGES:
            body = {k: v for k, v in ASK[path].items() if k != "max_tokens"} | {"tools": kinds}
            status, headers, _ = await ask(http, f"{path}/count_tokens", body)
            assert (status, headers[IGNORED]) == (200, named)

    play(engine := Speaker("x", tool_call_parser="hermes"), scene)
    kwargs = [told(opened)["kwargs"] for opened in engine.opened]
    assert [len(k.get("tools", ())) for k in kwargs] == [1, 0, 1, 0, 0, 0] * 2
    assert kwargs[0]["tools"][0]["function"]["name"] == "get_weather"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (CHAT, {"tools": SERVERS[CHAT], "tool_choice": "required"}),
        (CHAT, {"tools": [WEATHER, *SERVERS[CHAT]], "tool_choice": {"type": "custom", "custom": {"name": "patch"}}}),
        (CHAT, {"tools": [WEATHER, *SERVERS[CHAT]], "tool_choice": {"type": "function", "function": {"name": "patch"}}}),
        (RESPONSES, {"tools": SERVERS[RESPONSES], "tool_choice": "required"}),
        (RESPONSES, {"tools": [FLAT, *SERVERS[RESPONSES]], "tool_choice": {"type": "web_search"}}),
        (RESPONSES, {"tools": [FLAT, *SERVERS[RESPONSES]], "tool_choice": {"type": "function", "name": "apply_patch"}}),
        (MESSAGES, {"tools": SERVERS[MESSAGES], "tool_choice": {"type": "any"}}),
        (MESSAGES, {"tools": [BLOCK, *SERVERS[MESSAGES]], "tool_choice": {"type": "tool", "name": "web_search"}}),
    ],
)
def test_a_tool_that_is_left_out_cannot_be_demanded(path: str, change: Any) -> None:
    async def scene(http: Any) -> None:
        status, _, raw = await ask(http, path, {**ASK[path], **change})
        assert (status, "tool_choice" in json.loads(raw)["error"]["message"]) == (400, True)

    play(Speaker("x", tool_call_parser="hermes"), scene)


def test_a_strict_server_refuses_tools_that_it_would_leave_out() -> None:
    async def scene(http: Any) -> None:
        status, _, raw = await ask(http, CHAT, {**ASK[CHAT], "tools": [{"type": "web_search"}]})
        assert (status, json.loads(raw)["error"]["param"]) == (400, "tools.web_search")

    play(Speaker("x", tool_call_parser="hermes", strict=True), scene)


def test_names_of_kinds_cannot_break_the_header() -> None:
    async def scene(http: Any) -> None:
        for kind in ("a b", "x-y\r\nX-Evil: 1", "ü", "k" * 500):
            status, headers, _ = await ask(http, CHAT, {**ASK[CHAT], "tools": [{"type": kind}]})
            assert status == 200
            assert headers[IGNORED].startswith("tools.")
            assert len(headers[IGNORED]) < 70
            assert "X-Evil" not in headers

    play(Speaker("x", tool_call_parser="hermes"), scene)


# ---------------- namespaces
CRM = {
    "type": "namespace",
    "name": "crm",
    "description": "Customers.",
    "tools": [flat("find"), flat("delete", defer_loading=True)],
}
SHOP = {
    "type": "namespace",
    "name": "mcp__shop__",
    "description": "Goods.",
    "tools": [flat("find", "b"), {"type": "custom", "name": "z"}],
}


def test_functions_of_a_namespace_are_offered_and_called_with_it() -> None:
    async def scene(http: Any) -> None:
        body = {"input": "hi", "tools": [FLAT, CRM, {"type": "web_search"}]}
        for choice in ("auto", "required", {"type": "function", "name": "find"}):
            status, headers, raw = await ask(http, RESPONSES, {**body, "tool_choice": choice})
            assert (status, headers[IGNORED]) == (200, "tools.web_search")
            answer = json.loads(raw)
            assert answer["tools"] == body["tools"]
            [item] = answer["output"]
            assert (item["type"], item["namespace"], item["name"]) == ("function_call", "crm", "find")
            assert json.loads(item["arguments"]) == {"a": 1}
        async with client(http) as sdk:
            async with sdk.responses.stream(model="tiny", input="hi", tools=[CRM]) as stream:  # type: ignore[list-item]
                seen = [e async for e in stream]
            done = [e.item for e in seen if e.type == "response.output_item.done"]
            added = [e.item for e in seen if e.type == "response.output_item.added"]
            for items in (done, added):
                assert [(i.namespace, i.name) for i in items] == [("crm", "find")]  # type: ignore[union-attr]
            assert isinstance(done[0], openai.types.responses.ResponseFunctionToolCall)
            again = [{"role": "user", "content": "hi"}, done[0].model_dump(exclude_none=True, exclude={"parsed_arguments"})]
            again.append({"type": "function_call_output", "call_id": done[0].call_id, "output": "none"})
            await sdk.responses.create(model="tiny", input=again, tools=[CRM])  # type: ignore[arg-type, list-item]

    play(engine := Speaker(call("find", {"a": 1}), 3, tool_call_parser="hermes"), scene)
    offered = told(engine.opened[0])["kwargs"]["tools"]
    assert [t["function"]["name"] for t in offered] == ["get_weather", "find", "delete"]
    required, named = (engine.opened[i][1].grammar for i in (1, 2))
    assert admits(required, call("find", {"a": 1}))
    assert admits(required, CALL)
    assert not admits(required, call("find", {"b": 1}))
    assert admits(named, call("find", {"a": 1}))
    assert not admits(named, CALL)
    assert told(engine.opened[-1])["messages"][1]["tool_calls"][0]["function"]["name"] == "find"


def test_functions_of_one_name_are_told_apart_by_their_namespaces() -> None:
    async def scene(http: Any) -> None:
        history = [
            {"role": "user", "content": "hi"},
            {"type": "function_call", "call_id": "1", "namespace": "mcp__shop__", "name": "find", "arguments": '{"b": 1}'},
            {"type": "function_call", "call_id": "2", "name": "find", "arguments": '{"a": 2}'},
        ]
        choice = {"type": "function", "namespace": "crm", "name": "find"}
        for body in ({"tool_choice": "required"}, {"tool_choice": choice}):
            status, headers, raw = await ask(http, RESPONSES, {"input": history, "tools": [CRM, SHOP, flat("find")], **body})
            assert (status, headers[IGNORED]) == (200, "tools.custom")
            [item] = json.loads(raw)["output"]
            assert (item["namespace"], item["name"]) == ("crm", "find")

    play(engine := Speaker(call("crm__find", {"a": 1}), tool_call_parser="hermes"), scene)
    payload = told(engine.opened[0])
    assert [t["function"]["name"] for t in payload["kwargs"]["tools"]] == ["crm__find", "delete", "mcp__shop____find", "find"]
    assert [c["function"]["name"] for c in payload["messages"][1]["tool_calls"]] == ["mcp__shop____find", "find"]
    assert admits(engine.opened[0][1].grammar, call("mcp__shop____find", {"b": 1}))
    assert not admits(engine.opened[1][1].grammar, call("mcp__shop____find", {"b": 1}))


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "namespace", "name": "x", "tools": 5}], "tools[0].tools"),
        ([{"type": "namespace", "tools": [flat("f")]}], "tools[0].name"),
        ([{"type": "namespace", "name": "x", "tools": [flat("a b")]}], "tools[0].tools[0].name"),
        ([FLAT, {"type": "namespace", "name": "x", "tools": [flat("f", parameters=5)]}], "tools[1].tools[0].parameters"),
        ([{"type": "namespace", "name": "x", "tools": [flat("f"), flat("f")]}], "tools"),
        ([{"type": "namespace", "name": "x", "tools": [{"type": "function", "name": f"f{i}"} for i in range(129)]}], "tools"),
        ([flat("f", strict="yes")], "tools[0].strict"),
        ([{"type": 5}], "tools[0].type"),
    ],
)
def test_a_bad_namespace_is_refused_by_its_place(tools: Any, param: str) -> None:
    async def scene(http: Any) -> None:
        status, _, raw = await ask(http, RESPONSES, {"input": "hi", "tools": tools})
        error = json.loads(raw)["error"]
        assert (status, error["param"]) == (400, param)
        assert error["message"].startswith(param)

    play(Speaker("x", tool_call_parser="hermes", max_body_bytes=1 << 20), scene)


# ---------------- names and results
def test_names_of_tools_are_as_long_as_the_dialect_allows() -> None:
    async def scene(http: Any) -> None:
        for length, path, status in ((128, MESSAGES, 200), (129, MESSAGES, 400), (64, RESPONSES, 200), (65, RESPONSES, 400)):
            tool = {**(BLOCK if path == MESSAGES else FLAT), "name": "f" * length}
            choice = {"type": "tool", "name": "f" * length} if path == MESSAGES else "required"
            got, _, raw = await ask(http, path, {**ASK[path], "tools": [tool], "tool_choice": choice})
            assert got == status, raw
            assert status == 200 or f"1 to {length - 1} " in json.loads(raw)["error"]["message"]

    play(engine := Speaker("x", tool_call_parser="hermes"), scene)
    assert admits(engine.opened[0][1].grammar, CALL.replace("get_weather", "f" * 128))
    assert chat(tools=[{"type": "function", "function": {"name": "f" * 64}}]).form.names == ("f" * 64,)
    with pytest.raises(InvalidParam) as e:
        chat(tools=[{"type": "function", "function": {"name": "f" * 65}}])
    assert e.value.param == "tools[0].function.name"


SHOT = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
RESULTS: dict[str, dict[str, Any]] = {
    MESSAGES: {
        "max_tokens": 9,
        "messages": [
            *USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "get_weather", "input": {}}]},
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t",
                        "content": [{"type": "text", "text": "see"}, {"type": "image", "source": SHOT}],
                    }
                ],
            },
        ],
    },
    RESPONSES: {
        "input": [
            {"role": "user", "content": "hi"},
            {"type": "function_call", "call_id": "t", "name": "get_weather", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "t",
                "output": [
                    {"type": "input_text", "text": "see"},
                    {"type": "input_image", "image_url": "data:image/png;base64,iVBO"},
                ],
            },
        ]
    },
    CHAT: {
        "messages": [
            *USER,
            {
                "role": "assistant",
                "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {
                "role": "tool",
                "tool_call_id": "t",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}},
                ],
            },
        ]
    },
}


@pytest.mark.parametrize("path", RESULTS)
def test_an_image_in_a_tools_result_is_said_to_be_there(path: str) -> None:
    async def scene(http: Any) -> None:
        for stream in (False, True):
            status, headers, raw = await ask(http, path, {**RESULTS[path], "stream": stream})
            assert (status, headers.get(IGNORED)) == (200, "input.image" if path == RESPONSES else "messages.image"), raw
        if path == MESSAGES:
            _, headers, _ = await ask(http, f"{path}/count_tokens", {"messages": RESULTS[path]["messages"]})
            assert headers[IGNORED] == "messages.image"

    play(engine := Speaker("x", tool_call_parser="hermes"), scene)
    assert [told(opened)["messages"][-1]["content"] for opened in engine.opened[:2]] == ["see\n[image]"] * 2


def test_an_image_of_the_user_is_still_refused() -> None:
    async def scene(http: Any) -> None:
        for path, part in (
            (MESSAGES, {"type": "image", "source": SHOT}),
            (CHAT, {"type": "image_url", "image_url": {"url": "x"}}),
        ):
            status, _, raw = await ask(http, path, {**ASK[path], "messages": [{"role": "user", "content": [part]}]})
            assert (status, "text" in json.loads(raw)["error"]["message"]) == (400, True)

    play(Speaker("x", tool_call_parser="hermes"), scene)
