"""POST /v1/responses, its stateless core: OpenAI's newer shape of a chat.  Runs in the api process.

A request becomes the body of a chat and is checked as one, so every sampling field means what it means there.  Nothing is kept:
`previous_response_id` and whatever else needs a memory is refused, `store: true` is reported as ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.api import serving
from minisgl.api.answers import Result, chat_logprobs
from minisgl.api.fields import Fields, wrong_type
from minisgl.api.http import sse
from minisgl.api.openai import CHAT_USED, HARMLESS, ChatRequest, parse_chat, refuse_unsupported, unknown_fields
from minisgl.api.requests import Chunk, Engine, TokenLogprob
from minisgl.api.stream import StreamedAnswer
from minisgl.api.translate import text_of, whole
from minisgl.errors import InvalidParam, RequestError
from minisgl.types import Finish

_PASSED = CHAT_USED - {"messages", "max_tokens", "max_completion_tokens", "n", "best_of", "stream_options", "logprobs"}
RESPONSE_FIELDS = _PASSED | {"input", "instructions", "max_output_tokens", "text", "include"}
RESPONSE_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (),  # nothing is kept here
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "truncation": ("disabled",),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "context_management": ([],),
}
_HARMLESS = HARMLESS | {"max_tool_calls", "stream_options", "client_metadata", "prompt_cache_options"}
_LOGPROBS = "message.output_text.logprobs"
_NOT_SHOWN = "reasoning.encrypted_content"  # there is none to include


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """The chat that a request became, and what its answer repeats of it."""

    chat: ChatRequest
    echoed: dict[str, Any]
    ignored: tuple[str, ...]


def parse_responses(body: Mapping[str, Any], served: Sequence[str], defaults: Mapping[str, Any]) -> ResponsesRequest:
    """Check the body of POST /v1/responses.  Raises RequestError: 400, or 404 for the model."""
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
    parsed = parse_chat(chat, served, defaults)
    unknown = unknown_fields(body, RESPONSE_FIELDS | RESPONSE_UNSUPPORTED.keys() | _HARMLESS)
    stored = ("store",) if fields.boolean("store") else ()
    p = parsed.params
    echoed = {
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": body.get("metadata") or {},
        "temperature": p.temperature,
        "top_p": p.top_p,
        "text": {"format": {"type": "text"}, **text},
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
    return [m for i, item in enumerate(given) for m in _item(item, f"input[{i}]")]


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


# ---------------- answers
@dataclass(slots=True)
class _Answer:
    """One response as it grows, and its events."""

    request: ResponsesRequest
    result: Result = field(default_factory=Result)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    item: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    number: int = 0  # of the next event

    def body(self, status: str, error: RequestError | None = None) -> dict[str, Any]:
        ended = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.request.chat.model,
            "output": [self.message(status)] if ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": self.request.chat.params.logprobs or 0,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            **self.request.echoed,
        }

    def message(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part("".join(self.texts), self.logprobs)]
        return {"id": self.item, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": _logprobs(logprobs)}

    def _usage(self) -> dict[str, Any]:
        r = self.result
        return {
            "input_tokens": r.prompt_tokens,
            "input_tokens_details": {"cached_tokens": r.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": r.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": r.prompt_tokens + r.completion_tokens,
        }

    @property
    def status(self) -> str:
        return "incomplete" if self.result.finish is Finish.LENGTH else "completed"

    # ---------------- events
    def event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return sse({"type": kind, "sequence_number": self.number - 1, **fields}, kind)

    def start(self) -> bytes:
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        body = self.body("in_progress")
        return b"".join(
            (
                self.event("response.created", response=body),
                self.event("response.in_progress", response=body),
                self.event("response.output_item.added", output_index=0, item=self.message("in_progress")),
                self.event("response.content_part.added", **place, part=self.part("", ())),
            )
        )

    def news(self, index: int, chunk: Chunk) -> bytes:
        self.result.add(chunk)
        self.texts.append(chunk.text)
        self.logprobs.extend(chunk.logprobs)
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        if chunk.text or chunk.logprobs:
            told = _logprobs(chunk.logprobs)
            return self.event("response.output_text.delta", **place, delta=chunk.text, logprobs=told)
        return b""

    def end(self) -> bytes:
        text, place = "".join(self.texts), {"item_id": self.item, "output_index": 0, "content_index": 0}
        return b"".join(
            (
                self.event("response.output_text.done", **place, text=text, logprobs=_logprobs(self.logprobs)),
                self.event("response.content_part.done", **place, part=self.part(text, self.logprobs)),
                self.event("response.output_item.done", output_index=0, item=self.message(self.status)),
                self.event(f"response.{self.status}", response=self.body(self.status)),
            )
        )

    def failed(self, error: RequestError) -> bytes:
        told = {"code": error.code, "message": error.message, "param": error.param}
        return self.event("error", **told) + self.event("response.failed", response=self.body("failed", error))


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = chat_logprobs(tokens)["content"]
    return told


async def respond(engine: Engine, request: ResponsesRequest) -> dict[str, Any]:
    """The answer without a stream.  Raises RequestError."""
    answer = _Answer(request)
    answer.result, _ = await whole(engine, request.chat)
    answer.texts, answer.logprobs = [answer.result.text], answer.result.logprobs or []
    return answer.body(answer.status)


async def stream(engine: Engine, request: ResponsesRequest) -> StreamedAnswer:
    """The streamed answer.  Raises RequestError."""
    return await serving.stream(engine, request.chat, _Answer(request))


def not_stored(response_id: str) -> RequestError:
    """404 for whatever asks for a response that was given earlier."""
    text = f"Response {response_id[:80]!r} was not found: this server keeps no responses. Send the whole conversation as input."
    return RequestError(text, status=404, param="response_id", code="response_not_found")
