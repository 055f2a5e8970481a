"""POST /v1/responses, its stateless core: OpenAI's newer shape of a chat.  Runs in the api process.

A request becomes the body of a chat and is checked as one, so every sampling field means what it means there.  Nothing is kept:
`previous_response_id` and whatever else needs a memory is refused, `store: true` is reported as ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minisgl.api.endpoints.as_chat import functions, renamed, text_of
from minisgl.api.engine import Engine
from minisgl.api.requests import generate
from minisgl.api.requests.fields import Fields, wrong_type
from minisgl.api.requests.openai import CHAT_USED, HARMLESS, ChatRequest, refuse_unsupported, unknown_fields
from minisgl.errors import InvalidParam, RequestError

_PASSED = CHAT_USED - {
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "best_of",
    "stream_options",
    "logprobs",
    "response_format",
    "reasoning_effort",
}
RESPONSE_FIELDS = _PASSED | {"input", "instructions", "max_output_tokens", "text", "include", "reasoning"}
RESPONSE_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (),  # nothing is kept here
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "truncation": ("disabled",),
    "context_management": ([],),
}
_HARMLESS = HARMLESS | {"max_tool_calls", "stream_options", "client_metadata", "prompt_cache_options"}
_LOGPROBS = "message.output_text.logprobs"
_NAMES = {  # fields of a chat, as they are called here
    r"response_format(\.json_schema)?": "text.format",
    r"(tools\[\d+\])\.function": r"\1",
    r"max_tokens": "max_output_tokens",
    r"reasoning_effort": "reasoning.effort",
}
_NOT_SHOWN = "reasoning.encrypted_content"  # there is none to include


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """The chat that a request became, and what its answer repeats of it."""

    chat: ChatRequest
    echoed: dict[str, Any]
    ignored: tuple[str, ...]

    @property
    def stream(self) -> bool:
        return self.chat.stream


def parse_responses(engine: Engine, body: Mapping[str, Any]) -> ResponsesRequest:
    """Check the body of POST /v1/responses, for the model that is served.  Raises RequestError: 400, or 404 for the model."""
    fields = Fields(body)
    refuse_unsupported(body, RESPONSE_UNSUPPORTED)
    chat: dict[str, Any] = {name: body[name] for name in _PASSED if name in body}
    instructions = fields.get("instructions", str, "a string")
    chat["messages"] = [{"role": "system", "content": instructions}] if instructions else []
    chat["messages"] += _messages(body.get("input"))
    limit = fields.integer("max_output_tokens", 1, (1 << 31) - 1)
    chat["max_tokens"] = limit
    text = fields.get("text", dict, "an object") or {}
    if text.get("format") is not None:
        chat["response_format"] = _format(text["format"])
    chat["logprobs"] = _wants_logprobs(fields)
    reasoning = fields.get("reasoning", dict, "an object") or {}
    chat["reasoning_effort"] = reasoning.get("effort")
    tools = fields.get("tools", list, "an array of tools")
    chat["tools"], chat["tool_choice"] = functions(tools, ("function",), "parameters"), _tool_choice(body.get("tool_choice"))
    with renamed(_NAMES):
        parsed = generate.chat_request(engine, chat)
    if parsed.bound_by == "response_format":
        parsed = replace(parsed, bound_by="text.format")
    unknown = unknown_fields(body, RESPONSE_FIELDS | RESPONSE_UNSUPPORTED.keys() | _HARMLESS)
    unknown += tuple(f"text.{name}" for name, value in text.items() if name != "format" and value is not None)
    unknown += tuple(f"reasoning.{name}" for name, value in reasoning.items() if name != "effort" and value is not None)
    unknown += ("reasoning.effort",) if "reasoning_effort" in parsed.ignored else ()
    stored = ("store",) if fields.boolean("store") else ()
    p = parsed.params
    echoed = {
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": body.get("metadata") or {},
        "temperature": p.temperature,
        "top_p": p.top_p,
        "text": {"format": text.get("format") or {"type": "text"}},
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "tools": tools or [],
        "tool_choice": body.get("tool_choice") or "auto",
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
    }
    return ResponsesRequest(parsed, echoed, unknown + stored)


def _wants_logprobs(fields: Fields) -> bool:
    include = fields.get("include", list, "an array of strings") or []
    for name in include:
        if name not in (_LOGPROBS, _NOT_SHOWN):
            raise InvalidParam("include", f"include may only hold {_LOGPROBS}.", "unsupported_value")
    return _LOGPROBS in include


def _format(given: Any) -> Any:
    """`text.format` -> the response_format of a chat."""
    if not isinstance(given, dict):
        raise wrong_type("text.format", "an object", given)
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}


def _tool_choice(given: Any) -> Any:
    """That of a chat."""
    if not isinstance(given, dict):
        return given
    if given.get("type") != "function":
        raise InvalidParam("tool_choice", "tool_choice must be none, auto, required or a function.", "unsupported_value")
    return {"type": "function", "function": {"name": given.get("name")}}


def _messages(given: Any) -> list[dict[str, Any]]:
    """`input`: a text, or items, each of which is a message or belongs to a call of a function."""
    if given is None:
        raise InvalidParam("input", "input is required.", "missing_required_parameter")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise wrong_type("input", "a string or an array of items", given)
    if not given:
        raise InvalidParam("input", "input is empty: there is nothing to answer.")
    out: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        for message in _item(item, f"input[{i}]"):
            if "tool_calls" in message and out and out[-1]["role"] == "assistant":  # a call belongs to what was said with it
                out[-1] = {**out[-1], "tool_calls": out[-1].get("tool_calls", []) + message["tool_calls"]}
            else:
                out.append(message)
    return out


def _item(item: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(item, dict):
        raise wrong_type(at, "an object", item)
    kind = item.get("type", "message")
    if kind == "message":
        if not isinstance(item.get("role"), str):
            raise InvalidParam(f"{at}.role", f"{at}.role is required.", "missing_required_parameter")
        text = text_of(item.get("content"), f"{at}.content", ("input_text", "output_text", "text"))
        return [{"role": item["role"], "content": text}]
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        calls = [{"id": item.get("call_id"), "type": "function", "function": function}]
        return [{"role": "assistant", "content": None, "tool_calls": calls}]
    if kind == "function_call_output":
        text = text_of(item.get("output"), f"{at}.output", ("input_text", "output_text", "text"))
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": text}]
    if kind == "reasoning":  # what a model thought earlier is no part of the conversation
        return []
    raise InvalidParam(f"{at}.type", "items may be messages, function calls and their outputs.", "unsupported_value")


def not_stored(response_id: str) -> RequestError:
    """404 for whatever asks for a response that was given earlier."""
    text = f"Response {response_id[:80]!r} was not found: this server keeps no responses. Send the whole conversation as input."
    return RequestError(text, status=404, param="response_id", code="response_not_found")
