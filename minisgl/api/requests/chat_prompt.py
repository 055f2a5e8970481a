"""Checks the `messages` of a chat request and packs them for the tokenizer process, which renders the chat template.

Only the fields that chat templates read are passed on, with bounded depth, so a client cannot smuggle others into a template.
Pure functions; run in the api process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.api.engine import ChatPrompt
from minisgl.api.requests import fields
from minisgl.api.requests.fields import Check, Field, Schema
from minisgl.errors import InvalidParam, RequestError

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOL_CALLS = 128
MAX_TEMPLATE_KWARGS = 32
MAX_DEPTH = 32  # of tool-call arguments
_ROLES = ("system", "developer", "user", "assistant", "tool")
_STRINGS = ("name", "tool_call_id", "reasoning_content", "reasoning")  # passed on unchanged
# Names that a request cannot set: the server's own for a template, and those with a meaning to transformers.
_RESERVED = {"messages", "conversation", "chat_template", "tools", "documents", "add_generation_prompt"} | {
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


def chat_prompt(values: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> ChatPrompt:
    """The values of `messages` and `chat_template_kwargs` of a request, and its tools -> a prompt."""
    kwargs = values.get("chat_template_kwargs", {})
    payload = {"messages": values["messages"], "kwargs": {**kwargs, "tools": list(tools)} if tools else kwargs}
    return ChatPrompt(json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode())


def _check_messages(at: str, value: list[Any]) -> list[dict[str, Any]]:
    """Text parts are joined by newlines, `developer` becomes `system`, and the arguments of tool calls become objects: the
    form that chat templates expect."""
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidParam(at, f"{at} must hold 1 to {MAX_MESSAGES} messages, not {len(value)}.")
    return [_message(m, f"{at}[{i}]") for i, m in enumerate(value)]


def _message(message: Any, at: str) -> dict[str, Any]:
    fields.check_object(at, message)
    role = _required(message, "role", at)
    if role not in _ROLES:
        raise InvalidParam(f"{at}.role", f"{at}.role must be one of {', '.join(_ROLES)}.")
    out: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = _tool_calls(message.get("tool_calls"), f"{at}.tool_calls") if role == "assistant" else []
    content = message.get("content")
    if content is None and not calls:
        raise fields.missing(f"{at}.content")
    out["content"] = "" if content is None else _text(content, f"{at}.content")  # many templates concatenate it
    if calls:
        out["tool_calls"] = calls
    for name in _STRINGS:
        value = message.get(name)
        if value is not None:
            out[name] = fields.check_string(f"{at}.{name}", value)
    return out


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.wrong_type(at, "a string or an array of text parts", content)
    if len(content) > MAX_PARTS:
        raise InvalidParam(at, f"{at} may hold at most {MAX_PARTS} parts.")
    texts = []
    for i, part in enumerate(content):
        fields.check_object(f"{at}[{i}]", part)
        if _required(part, "type", f"{at}[{i}]") != "text":
            raise InvalidParam(f"{at}[{i}].type", "only text parts are supported by this model.", "unsupported_value")
        texts.append(_required(part, "text", f"{at}[{i}]"))
    return "\n".join(texts)


def _tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise fields.wrong_type(at, "an array", calls)
    if len(calls) > MAX_TOOL_CALLS:
        raise InvalidParam(at, f"{at} may hold at most {MAX_TOOL_CALLS} calls.")
    return [_tool_call(call, f"{at}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    function = fields.function_of(call, at)
    name = _required(function, "name", f"{at}.function")
    out: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": _arguments(function, f"{at}.function")}}
    if call.get("id") is not None:
        out["id"] = fields.check_string(f"{at}.id", call["id"])
    return out


def _arguments(function: dict[str, Any], at: str) -> Any:
    param = f"{at}.arguments"

    def broken(fault: str) -> RequestError:
        return InvalidParam(param, f"{param} must be the JSON text of an object: {fault}.")

    text = _required(function, "arguments", at)
    value = fields.loads(text, broken) if text else {}
    if not isinstance(value, dict):
        raise broken(f"it is {fields.json_type(value)}")
    if not _shallow(value, MAX_DEPTH):
        raise broken("it is nested too deeply")
    return value


def _shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_shallow(v, depth - 1) for v in inner)


def _check_template_kwargs(at: str, value: dict[str, Any]) -> dict[str, Any]:
    """Switches such as {"enable_thinking": false}: plain values under names that the server does not use itself."""
    if len(value) > MAX_TEMPLATE_KWARGS:
        raise InvalidParam(at, f"{at} may hold at most {MAX_TEMPLATE_KWARGS} values.")
    for name, switch in value.items():
        if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
            raise InvalidParam(at, f"{at} may only hold names that a template defines itself, not {name[:40]!r}.")
        if isinstance(switch, (dict, list)):
            raise InvalidParam(at, f"the values of {at} must be strings, numbers, booleans or null.", "invalid_type")
    return value


def _required(values: dict[str, Any], name: str, at: str) -> str:
    if values.get(name) is None:
        raise fields.missing(f"{at}.{name}")
    value: str = fields.check_string(f"{at}.{name}", values[name])
    return value


# ---------------- declarations
TEXT_OR_PARTS: Schema = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}


def messages(check: Check, content: Schema, *roles: str) -> Field:
    """The declaration of `messages`."""
    item = {"role": {"enum": list(roles)}, "content": content}
    schema = {"type": "array", "minItems": 1, "items": {"type": "object", "required": list(item), "properties": item}}
    return Field("messages", "The conversation, oldest first.", schema, fields.of_type(list, "an array of messages", check))


MESSAGES = messages(_check_messages, {"oneOf": [*TEXT_OR_PARTS["oneOf"], {"type": "null"}]}, *_ROLES)
TEMPLATE_KWARGS = fields.json_object("chat_template_kwargs", "Switches of the model's chat template.", _check_template_kwargs)
