"""Converts parts of /v1/responses and /v1/messages to those of a chat.  Pure functions; run in the api process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from minisgl.api.requests.fields import Field, Fields, Support, check_object, check_string, harmless, without, wrong_type
from minisgl.api.requests.openai import CHAT
from minisgl.errors import InvalidParam

# Fields of a chat that mean the same in both, and are checked with the chat that a request becomes.
SHARED = without(
    CHAT.having(Support.SUPPORTED),
    *("messages", "max_tokens", "max_completion_tokens", "n", "best_of", "stream_options", "logprobs", "response_format"),
    *("reasoning_effort", "verbosity", "return_cached_tokens_details"),
)


def passed(body: Mapping[str, Any], fields: Sequence[Field] = SHARED) -> dict[str, Any]:
    """The part of a body that a chat takes unchanged."""
    return {field.name: body[field.name] for field in fields if field.name in body}


def unused(values: Mapping[str, Any], name: str, used: str) -> tuple[str, ...]:
    """The names of the keys of the object in the field `name` that are not `used`."""
    return tuple(f"{name}.{key}" for key, value in values.get(name, {}).items() if key != used and value is not None)


def text_of(content: Any, at: str, kinds: Sequence[str]) -> str:
    """A string, or the texts of an array of parts whose `type` is one of `kinds`.  Raises InvalidParam."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(at, "a string or an array of text parts", content)
    texts = []
    for i, part in enumerate(content):
        check_object(f"{at}[{i}]", part)
        if part.get("type") not in kinds:
            raise InvalidParam(f"{at}[{i}].type", "only text parts are supported by this model.", "unsupported_value")
        texts.append(check_string(f"{at}[{i}].text", part.get("text")))
    return "\n".join(texts)


def result_of(content: Any, at: str, kinds: Sequence[str]) -> Any:
    """A tool's result as the content of a chat's message, in which images may stand (see tools.results_in_words)."""
    if not isinstance(content, list) or all(isinstance(part, dict) and part.get("type") in kinds for part in content):
        return text_of(content, at, kinds)
    out = []
    for i, part in enumerate(content):
        check_object(f"{at}[{i}]", part)
        text = part.get("type") in kinds
        out.append({"type": "text", "text": check_string(f"{at}[{i}].text", part.get("text"))} if text else part)
    return out


def functions(given: Sequence[Any], kinds: Sequence[str | None], schema: str, at: str = "tools") -> list[dict[str, Any]]:
    """The field `tools` -> the tools of a chat.  Tools that are no functions stay as they are.  Raises InvalidParam.

    `kinds`: the values that a function's `type` may have.  `schema`: the name of its field for the schema of its parameters.
    """
    out: list[dict[str, Any]] = []
    for i, tool in enumerate(given):
        place = f"{at}[{i}]"
        check_object(place, tool)
        if tool.get("type") in kinds:
            function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
            out.append({"type": "function", "function": {**function, "parameters": tool.get(schema)}})
        elif tool.get("type") == "namespace" and isinstance(tool.get("tools"), list):
            out.append({**tool, "tools": functions(tool["tools"], kinds, schema, f"{place}.tools")})
        else:
            out.append(tool)
    return out


Names = Mapping[str, str | Callable[[re.Match[str]], str]]


def places(messages: Sequence[Mapping[str, Any]], call_id: str) -> Names:
    """The names of the messages of a chat where they come from: each, and each of its calls, has its place in `at`.

    `call_id`: the name that the id of a call has there.  For `renamed`.
    """

    def call(match: re.Match[str]) -> str:
        return str(messages[int(match[1])]["tool_calls"][int(match[2])]["at"])

    def message(match: re.Match[str]) -> str:
        return str(messages[int(match[1])]["at"])

    return {
        r"messages\[(\d+)\]\.tool_calls\[(\d+)\]\.id": lambda m: f"{call(m)}.{call_id}",
        r"messages\[(\d+)\]\.tool_calls\[(\d+)\](\.function)?": call,
        r"messages\[(\d+)\]\.tool_call_id": lambda m: f"{message(m)}.{call_id}",
        r"messages\[(\d+)\]": message,
    }


def counting(fields: Fields, counted: Sequence[str], *more: Field, taken: Sequence[str] = ()) -> Fields:
    """The fields of an endpoint that counts the tokens of a prompt: those in `counted` as they are, `more`, and the others
    without effect, unless they are refused.  `taken`: refused fields that are not refused here."""
    checked = {f.name for f in fields if f.name in counted or (f.support is Support.REFUSED and f.name not in taken)}
    others = harmless(*(f.name for f in fields if f.name not in checked))
    return Fields(*(f for f in fields if f.name in checked), *more, *others)


@contextmanager
def renamed(names: Names) -> Iterator[None]:
    """Renames the fields of a chat in its errors.  `names`: regular expression for the beginning of a name -> replacement; the
    first that matches counts."""
    try:
        yield
    except InvalidParam as e:
        for pattern, name in names.items():
            if e.param and re.match(pattern, e.param):
                param = re.sub(pattern, name, e.param, count=1)
                raise InvalidParam(param, e.message.replace(e.param, param), e.code or "") from None
        raise
