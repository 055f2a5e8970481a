"""Serves POST /v1/messages and /v1/messages/count_tokens: a chat in Anthropic's format.  Runs in the api process.

As in responses.py, a request becomes the body of a chat and is checked as one.  Errors have Anthropic's format (`error_body`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minisgl.api.endpoints.anthropic_blocks import ThreadError
from minisgl.api.endpoints.as_chat import SHARED, counting, functions, passed, places, renamed, result_of, text_of, unused
from minisgl.api.endpoints.tokenize import TokenizerRequest, ids_of
from minisgl.api.engine import Engine, Prompt
from minisgl.api.requests import fields
from minisgl.api.requests.chat_prompt import TEXT, messages, text_or
from minisgl.api.requests.fields import (
    JSON_SCHEMA,
    STRING,
    Field,
    Fields,
    Schema,
    Support,
    an_object,
    harmless,
    refused,
    required,
    tagged,
    without,
)
from minisgl.api.requests.openai import EXTENSIONS, HARMLESS, ChatRequest, parse_chat
from minisgl.api.requests.sampling import STRINGS
from minisgl.api.requests.tools import PARAMETERS, tools_field
from minisgl.config import Config
from minisgl.errors import InvalidParam


def _check_messages(name: str, value: list[Any]) -> list[Any]:
    if not value:
        raise InvalidParam(name, f"{name} is empty: there is nothing to answer.")
    return value


def _check_strings(name: str, value: list[Any]) -> list[str]:
    for item in value:
        if not isinstance(item, str):
            raise fields.wrong_type(name, "an array of strings", item)
    return value


_NO_THREAD = "thread is not supported by this server, which keeps no conversation: send the whole of it, without thread."
_NO_SUMMARY = "compaction is not supported by this server: it does not summarize conversations."


def _refuse_thread(name: str, value: Any) -> Any:
    raise ThreadError(name, _NO_THREAD, "unsupported_parameter")


_SHARED = without(SHARED, "stop", "top_logprobs", "tool_choice")
_BLOCKS = (
    TEXT,
    tagged("tool_use", {"name": STRING}, id=STRING, input={"title": "object"}),
    tagged("tool_result", tool_use_id=STRING, content={"title": "string | text[]"}),
    tagged("thinking", {"thinking": STRING}),
    tagged("redacted_thinking"),
)
_ALONE: Schema = {"title": "boolean"}
_TOOL_CHOICES = (
    an_object({}, type={"enum": ["auto", "any", "none"]}, disable_parallel_tool_use=_ALONE),
    tagged("tool", {"name": STRING}, disable_parallel_tool_use=_ALONE),
)
_THINKS: Schema = {"enum": ["enabled", "adaptive", "disabled"]}
_FORM = tagged("json_schema", {"schema": JSON_SCHEMA})
_STRINGS = fields.of_type(list, "an array of strings", _check_strings)
MESSAGE = Fields(
    required(messages(_check_messages, text_or(*_BLOCKS), "system", "user", "assistant")),
    required(fields.integer("max_tokens", "Tokens of the answer, at most.", 1)),
    fields.anything("system", "The system message.", text_or(TEXT)),
    Field("stop_sequences", "The answer ends before the first of these.", STRINGS, _STRINGS),
    tools_field(an_object({"name": STRING}, type={"enum": ["custom"]}, description=STRING, input_schema=PARAMETERS)),
    fields.json_object("tool_choice", "Whether a tool is called, and which.", schema={"oneOf": list(_TOOL_CHOICES)}),
    fields.json_object("thinking", "Whether the model thinks first; for models that do.", schema=an_object({}, type=_THINKS)),
    fields.json_object("output_config", "format: the form of the answer.", schema=an_object({}, format=_FORM)),
    fields.json_object("output_format", "An older name of output_config.format.", schema=_FORM),
    *without(_SHARED, "tools"),
    refused("mcp_servers", []),
    refused("container"),
    refused("compaction", sentence=_NO_SUMMARY),
    Field("thread", _NO_THREAD, {}, _refuse_thread, support=Support.REFUSED),
    *harmless("cache_control", "context_management", "inference_geo", "speed", "diagnostics"),
    *harmless("fallbacks", "fallback_credit_token", "billing_policy"),  # of refusals and bills, which are not made here
    *harmless("betas", "user_profile_id", "workspace_id"),  # headers, which the SDK lists among the fields
    *EXTENSIONS,
    *HARMLESS,
)
_COUNTED = ("model", "messages", "system", "tools", "tool_choice", "thinking", "chat_template_kwargs", "chat_template")
COUNT = counting(MESSAGE, _COUNTED, taken=("compaction",))
_NAMES = {  # fields of a chat -> their names here
    r"stop$": "stop_sequences",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
}
_NAME_CHARS = 128  # of a tool
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = {"enabled": True, "adaptive": True, "disabled": False}


def parse_messages(config: Config, body: Mapping[str, Any]) -> ChatRequest:
    """Check the body of POST /v1/messages; returns the chat that it means, for the model that is served.

    Raises RequestError: 400, or 404 for the model."""
    values, unknown = MESSAGE.read(body)
    chat, ignored = _chat(config, body, values)
    chat["max_tokens"] = values["max_tokens"]
    chat["stop"] = values.get("stop_sequences", [])
    form, form_field, ignored_format = _format(values)
    if form is not None:
        chat["response_format"] = {"type": "json_schema", "json_schema": form}
    with renamed({**places(chat["messages"], "id"), **_NAMES, r"response_format(\.json_schema)?": form_field}):
        parsed = parse_chat(config, chat, name_chars=_NAME_CHARS)
    bound_by = form_field if parsed.bound_by == "response_format" else parsed.bound_by
    return replace(parsed, bound_by=bound_by, ignored=unknown + ignored + ignored_format + parsed.ignored)


def _chat(config: Config, body: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The body of a chat with the fields that make its prompt; names of fields that are not used."""
    chat: dict[str, Any] = passed(body, _SHARED)
    chat["messages"] = _conversation(values["messages"], values.get("system"))
    if (last := chat["messages"][-1])["role"] == "assistant":  # the answer is begun for the model
        if "tool_calls" in last or not last["content"]:
            raise InvalidParam("messages", "the last message must be the user's, or the beginning of an answer: a text.")
        chat["continue_final_message"] = True
    chat["tools"] = functions(values.get("tools", ()), (None, "custom"), "input_schema")
    choice = values.get("tool_choice") or {"type": "auto"}
    if (called := choice.get("type")) == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(called, str) and called in _CHOICES:
        chat["tool_choice"] = _CHOICES[called]
    else:
        raise InvalidParam("tool_choice.type", "tool_choice.type must be auto, any, tool or none.")
    if choice.get("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    thinking = values.get("thinking")
    if not thinking:
        return chat, ()
    if not isinstance(kind := thinking.get("type"), str) or kind not in _THINKING:
        raise InvalidParam("thinking.type", "thinking.type must be enabled, adaptive or disabled.")
    if config.server.reasoning_parser:
        chat["chat_template_kwargs"] = {"enable_thinking": _THINKING[kind], **values.get("chat_template_kwargs", {})}
        return chat, tuple(f"thinking.{name}" for name in thinking if name != "type")  # such as a budget of its own
    return chat, ("thinking",) if _THINKING[kind] else ()


def _format(values: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str, tuple[str, ...]]:
    """`output_config.format`, in older clients `output_format`: (the json_schema of a chat, the field's name, unused names)."""
    ignored = unused(values, "output_config", "format")
    given, at = values.get("output_config", {}).get("format"), "output_config.format"
    if given is None:
        given, at = values.get("output_format"), "output_format"
    if given is None:
        return None, at, ignored
    fields.check_object(at, given)
    if given.get("type") != "json_schema":
        raise InvalidParam(f"{at}.type", f"{at}.type must be json_schema.", "unsupported_value")
    return {"schema": given.get("schema")}, at, ignored


def _conversation(given: list[Any], system: Any) -> list[dict[str, Any]]:
    """`messages` and `system` -> the messages of a chat."""
    text = "" if system is None else text_of(system, "system", ("text",))
    out: list[dict[str, Any]] = [{"role": "system", "content": text, "at": "system"}] if text else []
    for i, message in enumerate(given):
        out += _message(message, f"messages[{i}]")
    return out


def _message(message: Any, at: str) -> list[dict[str, Any]]:
    fields.check_object(at, message)
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise InvalidParam(f"{at}.role", f"{at}.role must be user or assistant.")
    if not isinstance(content, list):
        return [{"role": role, "content": text_of(content, f"{at}.content", ()), "at": at}]
    out: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls = []
    for i, block in enumerate(content):
        place = f"{at}.content[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            given = block.get("input") or {}  # a text if it was cut off
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function, "at": place})
        elif kind == "tool_result" and role == "user":
            result = result_of(block.get("content") or "", f"{place}.content", ("text",))
            out.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": result, "at": place})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(fields.check_string(f"{place}.thinking", block.get("thinking")))
        elif kind != "redacted_thinking" or role != "assistant":  # a redacted thought cannot be read
            texts.append(text_of([block], place, ("text",)))
    if texts or calls or not out:
        answer: dict[str, Any] = {"role": role, "content": "\n".join(texts) if texts or not calls else None, "at": at}
        answer |= {"tool_calls": calls} if calls else {}
        out.append(answer | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {}))
    return out


def parse_count(config: Config, body: Mapping[str, Any]) -> TokenizerRequest[Prompt]:
    """Check the body of POST /v1/messages/count_tokens.  Raises RequestError: 400, or 404 for the model."""
    values, unknown = COUNT.read(body)
    chat, ignored = _chat(config, body, values)
    with renamed({**places(chat["messages"], "id"), **_NAMES}):
        read = {name: chat[name] for name in (*_COUNTED, "continue_final_message") if name in chat}
        counted = parse_chat(config, read, name_chars=_NAME_CHARS)
    [prompt] = counted.prompts
    return TokenizerRequest(prompt, unknown + ignored + counted.ignored)


async def count_tokens(engine: Engine, request: TokenizerRequest[Prompt]) -> dict[str, Any]:
    """The length of the prompt in tokens.  Raises RequestError."""
    return {"input_tokens": len(await ids_of(engine, request.value))}
