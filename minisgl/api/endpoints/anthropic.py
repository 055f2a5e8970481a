"""POST /v1/messages and /v1/messages/count_tokens: a chat in Anthropic's shape.  Runs in the api process.

As in responses.py a request becomes the body of a chat.  Errors have Anthropic's shape, too (see `error_body`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minisgl.api.endpoints.as_chat import functions, renamed, text_of
from minisgl.api.endpoints.tokenize import ids_of
from minisgl.api.engine import ChatPrompt, Engine
from minisgl.api.requests import generate
from minisgl.api.requests.fields import Fields, wrong_type
from minisgl.api.requests.openai import CHAT_USED, ChatRequest, refuse_unsupported, unknown_fields
from minisgl.errors import InvalidParam

_PASSED = CHAT_USED - {
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "n",
    "best_of",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "response_format",
    "reasoning_effort",
}
MESSAGE_FIELDS = _PASSED | {"messages", "system", "max_tokens", "stop_sequences", "thinking", "output_config", "output_format"}
# Of a count; the other fields of a message do not count.
COUNT_FIELDS = frozenset({"model", "messages", "system", "tools", "tool_choice", "thinking", "chat_template_kwargs"})
MESSAGE_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": ()}
_HARMLESS = frozenset({"metadata", "service_tier", "cache_control", "context_management", "inference_geo", "speed"})
_NAMES = {  # fields of a chat, as they are called here
    r"stop$": "stop_sequences",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = {"enabled": True, "adaptive": True, "disabled": False}


@dataclass(frozen=True, slots=True)
class MessageRequest:
    """The chat that a request became; `stops` are its stop sequences."""

    chat: ChatRequest
    stops: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def stream(self) -> bool:
        return self.chat.stream


def parse_messages(engine: Engine, body: Mapping[str, Any]) -> MessageRequest:
    """Check the body of POST /v1/messages, for the model that is served.  Raises RequestError: 400, or 404 for the model."""
    fields = Fields(body)
    if body.get("max_tokens") is None:
        raise InvalidParam("max_tokens", "max_tokens is required.", "missing_required_parameter")
    chat, ignored = _chat(engine, body)
    chat["max_tokens"] = fields.integer("max_tokens", 1, (1 << 31) - 1)
    form, form_field, unused = _format(fields)
    if form is not None:
        chat["response_format"] = {"type": "json_schema", "json_schema": form}
    stops = fields.get("stop_sequences", list, "an array of strings") or []
    if not all(isinstance(s, str) for s in stops):
        raise wrong_type("stop_sequences", "an array of strings", next(s for s in stops if not isinstance(s, str)))
    with renamed({**_NAMES, r"response_format(\.json_schema)?": form_field}):
        parsed = generate.chat_request(engine, {**chat, "stop": stops})
    if form is not None:
        parsed = replace(parsed, bound_by=form_field)
    return MessageRequest(parsed, tuple(stops), ignored + unused)


def _chat(engine: Engine, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The body of a chat with what makes its prompt; names of fields that are not used."""
    fields = Fields(body)
    refuse_unsupported(body, MESSAGE_UNSUPPORTED)
    chat: dict[str, Any] = {name: body[name] for name in _PASSED if name in body}
    chat["messages"] = _conversation(body)
    chat["tools"] = functions(fields.get("tools", list, "an array of tools"), (None, "custom"), "input_schema")
    choice = fields.get("tool_choice", dict, "an object") or {"type": "auto"}
    if choice.get("type") == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif choice.get("type") in _CHOICES:
        chat["tool_choice"] = _CHOICES[choice["type"]]
    else:
        raise InvalidParam("tool_choice.type", "tool_choice.type must be auto, any, tool or none.")
    if choice.get("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    ignored = unknown_fields(body, MESSAGE_FIELDS | MESSAGE_UNSUPPORTED.keys() | _HARMLESS)
    thinking = fields.get("thinking", dict, "an object") or {}
    if not thinking:
        return chat, ignored
    if (kind := thinking.get("type")) not in _THINKING:
        raise InvalidParam("thinking.type", "thinking.type must be enabled, adaptive or disabled.")
    if engine.config.server.reasoning_parser:
        given = fields.get("chat_template_kwargs", dict, "an object") or {}
        chat["chat_template_kwargs"] = {"enable_thinking": _THINKING[kind], **given}
        ignored += tuple(f"thinking.{name}" for name in thinking if name != "type")  # a thought has no bounds of its own
    elif _THINKING[kind]:
        ignored += ("thinking",)
    return chat, ignored


def _format(fields: Fields) -> tuple[dict[str, Any] | None, str, tuple[str, ...]]:
    """`output_config.format`, in older clients `output_format`: (what a chat has for it, its name, unused names)."""
    config = fields.get("output_config", dict, "an object") or {}
    unused = tuple(f"output_config.{name}" for name, value in config.items() if name != "format" and value is not None)
    given, at = config.get("format"), "output_config.format"
    if given is None:
        given, at = fields.get("output_format", dict, "an object"), "output_format"
    if given is None:
        return None, at, unused
    if not isinstance(given, dict):
        raise wrong_type(at, "an object", given)
    if given.get("type") != "json_schema":
        raise InvalidParam(f"{at}.type", f"{at}.type must be json_schema.", "unsupported_value")
    return {"schema": given.get("schema")}, at, unused


def _conversation(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`system` and `messages` -> the messages of a chat."""
    messages = body.get("messages")
    if messages is None:
        raise InvalidParam("messages", "messages is required.", "missing_required_parameter")
    if not isinstance(messages, list):
        raise wrong_type("messages", "an array of messages", messages)
    if not messages:
        raise InvalidParam("messages", "messages is empty: there is nothing to answer.")
    system = body.get("system")
    out = [] if system in (None, "", []) else [{"role": "system", "content": text_of(system, "system", ("text",))}]
    for i, message in enumerate(messages):
        out += _message(message, f"messages[{i}]")
    if out[-1]["role"] == "assistant":
        raise InvalidParam("messages", "the last message must be the user's: an answer cannot be begun for the model here.")
    return out


def _message(message: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(message, dict):
        raise wrong_type(at, "an object", message)
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise InvalidParam(f"{at}.role", f"{at}.role must be user or assistant.")
    if not isinstance(content, list):
        return [{"role": role, "content": text_of(content, f"{at}.content", ())}]
    out: list[dict[str, Any]] = []
    texts: list[Any] = []
    calls = []
    for i, block in enumerate(content):
        place = f"{at}.content[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            text = text_of(block.get("content") or "", f"{place}.content", ("text",))
            out.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind not in ("thinking", "redacted_thinking"):  # what the model thought earlier is not told again
            texts.append(text_of([block], place, ("text",)))
    if texts or calls or not out:
        answer: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
        out.append({**answer, "tool_calls": calls} if calls else answer)
    return out


async def count_tokens(engine: Engine, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """POST /v1/messages/count_tokens: how long the prompt is.  Returns the answer and the names of unknown fields."""
    chat, ignored = _chat(engine, body)
    counted = {"messages", "tools", "tool_choice", "chat_template_kwargs", "model"}
    with renamed(_NAMES):
        [prompt] = generate.chat_request(engine, {name: chat[name] for name in counted & chat.keys()}).prompts
    if not isinstance(prompt, ChatPrompt):
        raise TypeError("a chat has a ChatPrompt")
    return {"input_tokens": len(await ids_of(engine, prompt))}, ignored
