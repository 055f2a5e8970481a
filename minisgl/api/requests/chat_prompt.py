"""Checks the `messages` of a chat request and packs them for the tokenizer process, which renders the chat template.

Only the fields that chat templates read are passed on, so a client cannot smuggle others into a template; in which form they
reach it is up to the template (minisgl.model.text.conversation).  Pure functions; run in the api process, and in that of LLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.api.engine import ChatPrompt
from minisgl.api.requests import fields
from minisgl.api.requests.fields import STRING, Check, Field, Schema, an_object, list_of, tagged
from minisgl.config import Config
from minisgl.errors import InvalidParam

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOL_CALLS = 128
MAX_TEMPLATE_KWARGS = 32
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SAME = {"developer": "system", "function": "tool"}  # roles with two names
OTHER_PARTS = ("image", "image_url", "input_image", "document", "file", "input_file", "input_audio", "audio", "video")  # of a
# tool's result, where a word stands for them (tools.results_in_words)
_STRINGS = ("name", "tool_call_id")  # passed on unchanged
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names that clients and servers have for a thought
_CONTINUE, _ANSWER = "continue_final_message", "add_generation_prompt"
# Names that a request cannot set: the server's own for a template, and those with a meaning to transformers.
_RESERVED = {"messages", "conversation", "chat_template", "tools", "documents", "add_generation_prompt"} | {
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


def chat_prompt(config: Config, values: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> ChatPrompt:
    """The values of `messages` and of the fields in RENDERING of a request, and its tools -> a prompt.  Raises InvalidParam."""
    kwargs = dict(values.get("chat_template_kwargs", {}))
    kwargs |= {name: values[name] for name in (_CONTINUE, _ANSWER) if name in values}
    if kwargs.get(_CONTINUE) and kwargs.get(_ANSWER):
        raise InvalidParam(_CONTINUE, f"{_CONTINUE} and {_ANSWER} exclude each other.")
    template = values.get("chat_template", "")
    if template and not config.server.trust_request_chat_template:
        text = "chat_template is taken from requests only by a server that was started with --trust-request-chat-template."
        raise InvalidParam("chat_template", text, "unsupported_parameter")
    return packed(values["messages"], {**kwargs, "tools": list(tools)} if tools else kwargs, template)


def packed(messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any], template: str = "") -> ChatPrompt:
    """The prompt of checked messages.  `kwargs`: variables of the template; `template`: one to use instead of the model's."""
    payload = {"messages": messages, "kwargs": kwargs} | ({"template": template} if template else {})
    return ChatPrompt(json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode())


def check_messages(at: str, value: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a conversation, checked: text parts are joined by newlines, a role has one name, arguments are text.

    Raises InvalidParam naming the part that is wrong, as a part of `at`.
    """
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidParam(at, f"{at} must hold 1 to {MAX_MESSAGES} messages, not {len(value)}.")
    return [_message(m, f"{at}[{i}]") for i, m in enumerate(value)]


def _message(message: Any, at: str) -> dict[str, Any]:
    fields.check_object(at, message)
    role = _required(message, "role", at)
    if role not in ROLES:
        raise InvalidParam(f"{at}.role", f"{at}.role must be one of {', '.join(ROLES)}.")
    out: dict[str, Any] = {"role": _SAME.get(role, role)}
    content, answers = message.get("content"), role == "assistant"
    calls = _calls(message, at) if answers else []
    thoughts = (
        [fields.check_string(f"{at}.{name}", message[name]) for name in _THOUGHTS if message.get(name)] if answers else []
    )
    if content is None and answers:
        content = message.get("refusal") or ("" if thoughts and not calls else None)
    if content is None and not calls:
        raise fields.missing(f"{at}.content")
    out["content"] = None if content is None else _text(content, f"{at}.content")
    if calls:
        out["tool_calls"] = calls
    if thoughts:
        out["reasoning_content"] = thoughts[0]
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
        kind = _required(part, "type", f"{at}[{i}]")
        if kind not in ("text", "refusal"):
            raise InvalidParam(f"{at}[{i}].type", "only text parts are supported by this model.", "unsupported_value")
        texts.append(_required(part, kind, f"{at}[{i}]"))
    return "\n".join(texts)


def _calls(message: Mapping[str, Any], at: str) -> list[dict[str, Any]]:
    """`tool_calls`, and the older `function_call`."""
    calls, place = message.get("tool_calls") or [], f"{at}.tool_calls"
    if not isinstance(calls, list):
        raise fields.wrong_type(place, "an array", calls)
    if len(calls) > MAX_TOOL_CALLS:
        raise InvalidParam(place, f"{place} may hold at most {MAX_TOOL_CALLS} calls.")
    old = message.get("function_call")
    out = [] if old is None else [_call(old, f"{at}.function_call")]
    return out + [_tool_call(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    out = _call(fields.function_of(call, at), f"{at}.function")
    return out if call.get("id") is None else {**out, "id": fields.check_string(f"{at}.id", call["id"])}


def _call(function: Any, at: str) -> dict[str, Any]:
    """Arguments may be any text: those of an answer that was cut off are no JSON."""
    fields.check_object(at, function)
    name, arguments = _required(function, "name", at), function.get("arguments")
    if isinstance(arguments, dict | list):  # as offline conversations have them
        arguments = json.dumps(arguments, ensure_ascii=False)
    arguments = "" if arguments is None else fields.check_string(f"{at}.arguments", arguments)
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


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


def _required(values: Mapping[str, Any], name: str, at: str) -> str:
    if values.get(name) is None:
        raise fields.missing(f"{at}.{name}")
    value: str = fields.check_string(f"{at}.{name}", values[name])
    return value


# ---------------- declarations
def text_or(*parts: Schema) -> Schema:
    """The schema of a content: a text, or an array of such parts."""
    return {"oneOf": [STRING, list_of({"oneOf": list(parts)} if len(parts) > 1 else parts[0])]}


TEXT: Schema = tagged("text", {"text": STRING})


def messages(check: Check, content: Schema, *roles: str) -> Field:
    """The declaration of `messages`."""
    item = {"role": {"enum": list(roles)}, "content": content}
    schema = {"type": "array", "minItems": 1, "items": {"type": "object", "required": list(item), "properties": item}}
    return Field("messages", "The conversation, oldest first.", schema, fields.of_type(list, "an array of messages", check))


_PARTS = text_or(TEXT, tagged("refusal", {"refusal": STRING}), an_object({"type": {"enum": list(OTHER_PARTS)}}))
MESSAGES = messages(check_messages, fields.nullable(_PARTS), *ROLES)
_SWITCHES: Schema = {"additionalProperties": {"type": ["string", "number", "boolean", "null"]}}
RENDERING = (
    fields.json_object("chat_template_kwargs", "Switches of the model's chat template.", _check_template_kwargs, _SWITCHES),
    fields.boolean(_CONTINUE, "The answer goes on with the last message, which is not closed."),
    fields.boolean(_ANSWER, "The prompt ends where the template has the assistant begin (default)."),
    fields.string("chat_template", "A Jinja template instead of the model's own; needs --trust-request-chat-template."),
)
