"""Serves the stateless core of POST /v1/responses, OpenAI's newer form of a chat.  Runs in the api process.

A request becomes the body of a chat and is checked as one, so every sampling field means the same as there.  Nothing is stored:
`previous_response_id` and other fields that need a store are refused, `store: true` is reported as ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minisgl.api.endpoints.as_chat import (
    SHARED,
    counting,
    functions,
    passed,
    places,
    renamed,
    result_of,
    text_of,
    unused,
)
from minisgl.api.endpoints.tokenize import TokenizerRequest, ids_of
from minisgl.api.engine import Engine, Prompt
from minisgl.api.requests import fields
from minisgl.api.requests.chat_prompt import ROLES, text_or
from minisgl.api.requests.fields import (
    BOOLEAN,
    JSON_SCHEMA,
    LOOSE_STRING,
    STRING,
    Field,
    Fields,
    Schema,
    Support,
    an_object,
    harmless,
    missing,
    refused,
    required,
    tagged,
    without,
)
from minisgl.api.requests.openai import EFFORT, EXTENSIONS, HARMLESS, ChatRequest, parse_chat
from minisgl.api.requests.structured_output import FORMS
from minisgl.api.requests.tools import PARAMETERS, offered_names, tool_choice_field, tools_field
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError

_LOGPROBS = "message.output_text.logprobs"
_NOT_SHOWN = "reasoning.encrypted_content"  # there is none to include
_KEY = "reasoning_content"  # of a message of a chat
_THOUGHT = {"role", _KEY, "at"}  # the keys of one that is a thought alone
_NAMES = {  # fields of a chat -> their names here
    r"response_format(\.json_schema)?": "text.format",
    r"((?:\.?tools\[\d+\])+)\.function": r"\1",
    r"max_tokens": "max_output_tokens",
    r"messages$": "input",
    r"reasoning_effort": "reasoning.effort",
}


# ---------------- checks
def _check_include(name: str, value: list[Any]) -> list[str]:
    if any(item not in (_LOGPROBS, _NOT_SHOWN) for item in value):
        raise InvalidParam(name, f"{name} may only hold {_LOGPROBS}.", "unsupported_value")
    return value


def _check_input(name: str, value: Any) -> list[dict[str, Any]]:
    """A text, or items, each of which is a message or belongs to a tool call -> the messages of a chat."""
    if isinstance(value, str):
        return [{"role": "user", "content": value, "at": name}]
    if not isinstance(value, list):
        raise fields.wrong_type(name, "a string or an array of items", value)
    if not value:
        raise InvalidParam(name, f"{name} is empty: there is nothing to answer.")
    out: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        at = f"{name}[{i}]"
        for message in _item(item, at):
            last = out[-1] if out and out[-1]["role"] == message["role"] == "assistant" else {}
            if last.keys() == _THOUGHT:  # what follows a thought belongs to it
                thoughts = [m[_KEY] for m in (last, message) if m.get(_KEY)]
                out[-1] = {**message, _KEY: "\n".join(thoughts), "at": at}
            elif last and "tool_calls" in message:  # a call belongs to the text before it
                out[-1] = {**last, "tool_calls": last.get("tool_calls", []) + message["tool_calls"]}
            else:
                out.append({**message, "at": at})
    return out


def _item(item: Any, at: str) -> list[dict[str, Any]]:
    """The message that an item is or belongs to, if any."""
    fields.check_object(at, item)
    kind = item.get("type", "message")
    if kind == "message":
        if not isinstance(item.get("role"), str):
            raise missing(f"{at}.role")
        text = text_of(item.get("content"), f"{at}.content", ("input_text", "output_text", "text"))
        return [{"role": item["role"], "content": text}]
    if kind == "function_call":
        function = {name: item.get(name) for name in ("name", "arguments", "namespace")}
        calls = [{"id": item.get("call_id"), "type": "function", "function": function, "at": at}]
        return [{"role": "assistant", "content": None, "tool_calls": calls}]
    if kind == "function_call_output":
        result = result_of(item.get("output"), f"{at}.output", ("input_text", "output_text", "text"))
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": result}]
    if kind == "reasoning":
        content = item.get("content") or item.get("summary") or []
        thought = text_of(content, f"{at}.content", ("reasoning_text", "summary_text", "text"))
        return [{"role": "assistant", _KEY: thought}] if thought else []  # an encrypted one cannot be read
    raise InvalidParam(f"{at}.type", "items may be messages, function calls and their outputs.", "unsupported_value")


# ---------------- declarations
_TEXT = an_object({"type": {"enum": ["input_text", "output_text", "text"]}, "text": STRING})
_ARGUMENTS: Schema = {"type": ["string", "object", "array"]}
_ITEMS = (
    an_object({"role": {"enum": list(ROLES)}, "content": text_or(_TEXT)}, type={"enum": ["message"]}),
    tagged("function_call", {"name": STRING}, arguments=_ARGUMENTS, call_id=STRING),
    tagged("function_call_output", {"output": text_or(an_object({"type": STRING}))}, call_id=STRING),
    tagged("reasoning"),
)
_FORM: Schema = {"oneOf": [*FORMS, tagged("json_schema", {"schema": JSON_SCHEMA}, name=LOOSE_STRING, strict=BOOLEAN)]}
RESPONSE = Fields(
    required(Field("input", "A text, or messages, calls and their outputs.", text_or(*_ITEMS), _check_input)),
    fields.string("instructions", "The system message."),
    fields.integer("max_output_tokens", "Tokens of the answer, at most.", 1),
    fields.json_object("text", "format: the form of the answer.", schema=an_object({}, format=_FORM)),
    fields.array("include", f"{_LOGPROBS} asks for log probabilities.", {"type": "string"}, then=_check_include),
    fields.json_object("reasoning", "effort: as reasoning_effort of a chat.", schema=an_object({}, effort=EFFORT.schema)),
    tools_field(tagged("function", {"name": STRING}, description=STRING, parameters=PARAMETERS, strict=BOOLEAN)),
    tool_choice_field(tagged("function", {"name": STRING}, namespace=LOOSE_STRING)),
    *without(SHARED, "tools", "tool_choice"),
    refused("previous_response_id"),  # nothing is stored here
    refused("conversation"),
    refused("background", False),
    refused("prompt"),
    refused("truncation", "disabled"),
    refused("context_management", []),
    refused("moderation"),
    *harmless("max_tool_calls", "stream_options", "client_metadata"),
    *harmless("access_programs", "background_options", "image"),  # of what is refused itself
    *EXTENSIONS,
    *without(HARMLESS, "store"),
    replace(fields.boolean("store", ""), support=Support.HARMLESS),
)
_COUNTED = ("model", "input", "instructions", "tools", "tool_choice", "reasoning", "chat_template_kwargs", "chat_template")
INPUT_TOKENS = counting(RESPONSE, _COUNTED, refused("personality"))


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """The chat that a request became, and the values that its answer repeats."""

    chat: ChatRequest
    echoed: dict[str, Any]
    ignored: tuple[str, ...]

    @property
    def stream(self) -> bool:
        return self.chat.stream

    @property
    def relaxed(self) -> tuple[str, ...]:
        return self.chat.relaxed


def parse_responses(config: Config, body: Mapping[str, Any]) -> ResponsesRequest:
    """Check the body of POST /v1/responses, for the model that is served.  Raises RequestError: 400, or 404 for the model."""
    values, unknown = RESPONSE.read(body)
    instructions, limit = values.get("instructions"), values.get("max_output_tokens")
    text, reasoning, tools = values.get("text", {}), values.get("reasoning", {}), values.get("tools", [])
    chat: dict[str, Any] = passed(body)
    chat["messages"] = [{"role": "system", "content": instructions, "at": "instructions"}] if instructions else []
    chat["messages"] += values["input"]
    chat["max_tokens"] = limit
    if text.get("format") is not None:
        chat["response_format"] = _format(text["format"])
    chat["logprobs"] = _LOGPROBS in values.get("include", ())
    chat["reasoning_effort"] = reasoning.get("effort")
    chat["tools"] = functions(tools, ("function",), "parameters")
    with renamed({**places(chat["messages"], "call_id"), **_NAMES}):
        names = offered_names(chat["tools"])
        chat["tool_choice"] = _tool_choice(values.get("tool_choice"), names)
        for message in chat["messages"]:
            for call in message.get("tool_calls", ()):
                _rename(call["function"], names)
        parsed = parse_chat(config, chat)
    bound_by = "text.format" if parsed.bound_by == "response_format" else parsed.bound_by
    parsed = replace(parsed, bound_by=bound_by, prompts=tuple(replace(p, source="input") for p in parsed.prompts))
    unknown += tuple(re.sub("^messages", "input", n) for n in parsed.ignored if n.startswith(("tools.", "messages.")))
    unknown += unused(values, "text", "format") + unused(values, "reasoning", "effort")
    unknown += ("reasoning.effort",) if "reasoning_effort" in parsed.ignored else ()
    echoed = {
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": values.get("metadata") or {},
        "temperature": parsed.params.temperature,
        "top_p": values.get("top_p", parsed.params.top_p),
        "text": {"format": text.get("format") or {"type": "text"}},
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "tools": tools,
        "tool_choice": values.get("tool_choice") or "auto",
        "parallel_tool_calls": values.get("parallel_tool_calls", True),
    }
    return ResponsesRequest(parsed, echoed, unknown)


def parse_input_tokens(config: Config, body: Mapping[str, Any]) -> TokenizerRequest[Prompt]:
    """Check the body of POST /v1/responses/input_tokens.  Raises RequestError: 400, or 404 for the model."""
    _, ignored = INPUT_TOKENS.read(body)
    request = parse_responses(config, {name: body[name] for name in _COUNTED if name in body})
    return TokenizerRequest(request.chat.prompts[0], ignored + request.ignored)


async def input_tokens(engine: Engine, request: TokenizerRequest[Prompt]) -> dict[str, Any]:
    """The length of the prompt in tokens.  Raises RequestError."""
    return {"object": "response.input_tokens", "input_tokens": len(await ids_of(engine, request.value))}


def _format(given: Any) -> Any:
    """`text.format` -> the response_format of a chat."""
    fields.check_object("text.format", given)
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {k: v for k, v in given.items() if k != "type"}}


def _tool_choice(given: Any, names: Mapping[tuple[str, str], str]) -> Any:
    """`tool_choice` -> the tool_choice of a chat.  `names`: see offered_names."""
    if not isinstance(given, dict):
        return given
    if given.get("type") != "function":
        raise InvalidParam("tool_choice", "tool_choice must be none, auto, required or a function.", "unsupported_value")
    return {"type": "function", "function": _rename({name: given.get(name) for name in ("name", "namespace")}, names)}


def _rename(function: dict[str, Any], names: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """Give a function the name under which it is offered."""
    namespace, name = function.pop("namespace", None), function.get("name")
    if isinstance(namespace, str) and isinstance(name, str):
        function["name"] = names.get((namespace, name), name)
    return function


def not_stored(response_id: str) -> RequestError:
    """404 for every request for an earlier response."""
    text = f"Response {response_id[:80]!r} was not found: this server keeps no responses. Send the whole conversation as input."
    return RequestError(text, status=404, param="response_id", code="response_not_found")
