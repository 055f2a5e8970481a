"""POST /v1/messages and /v1/messages/count_tokens: a chat in Anthropic's shape.  Runs in the api process.

As in responses.py a request becomes the body of a chat.  Errors have Anthropic's shape, too (see `error_body`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.api import serving
from minisgl.api.answers import Result
from minisgl.api.conversation import chat_prompt
from minisgl.api.fields import Fields, wrong_type
from minisgl.api.http import sse
from minisgl.api.native import ids_of
from minisgl.api.openai import CHAT_USED, ChatRequest, parse_chat, refuse_unsupported, served_model, unknown_fields
from minisgl.api.requests import Chunk, Engine
from minisgl.api.serving import served_names
from minisgl.api.stream import StreamedAnswer
from minisgl.api.translate import text_of, whole
from minisgl.errors import InvalidParam, RequestError
from minisgl.types import Finish

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
}
MESSAGE_FIELDS = _PASSED | {"messages", "system", "max_tokens", "stop_sequences"}
COUNT_FIELDS = frozenset({"model", "messages", "system", "chat_template_kwargs"})  # the others of a message do not count
MESSAGE_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "thinking": ({"type": "disabled"},),
    "mcp_servers": ([],),
    "container": (),
    "output_config": ({},),
    "output_format": (),
}
_HARMLESS = frozenset({"metadata", "service_tier", "cache_control", "context_management", "inference_geo", "speed"})
_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ERRORS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


@dataclass(frozen=True, slots=True)
class MessageRequest:
    """The chat that a request became; `stops` are its stop sequences."""

    chat: ChatRequest
    stops: tuple[str, ...]
    ignored: tuple[str, ...]


def parse_messages(body: Mapping[str, Any], served: Sequence[str], defaults: Mapping[str, Any]) -> MessageRequest:
    """Check the body of POST /v1/messages.  Raises RequestError: 400, or 404 for the model."""
    fields = Fields(body)
    refuse_unsupported(body, MESSAGE_UNSUPPORTED)
    if body.get("max_tokens") is None:
        raise InvalidParam("max_tokens", "max_tokens is required.", "missing_required_parameter")
    chat: dict[str, Any] = {name: body[name] for name in _PASSED if name in body}
    chat["messages"] = _conversation(body)
    chat["max_tokens"] = fields.integer("max_tokens", 1, (1 << 31) - 1)
    stops = fields.get("stop_sequences", list, "an array of strings") or []
    if not all(isinstance(s, str) for s in stops):
        raise wrong_type("stop_sequences", "an array of strings", next(s for s in stops if not isinstance(s, str)))
    try:
        parsed = parse_chat({**chat, "stop": stops}, served, defaults)
    except InvalidParam as e:
        raise InvalidParam("stop_sequences", e.message, e.code or "") if e.param == "stop" else e from None
    return MessageRequest(parsed, tuple(stops), unknown_fields(body, MESSAGE_FIELDS | MESSAGE_UNSUPPORTED.keys() | _HARMLESS))


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
    served_model(Fields(body), served_names(engine.config))
    refuse_unsupported(body, MESSAGE_UNSUPPORTED)
    kwargs = body.get("chat_template_kwargs")
    prompt = chat_prompt({"messages": _conversation(body), "chat_template_kwargs": kwargs})
    tokens = await ids_of(engine, prompt)
    known = MESSAGE_FIELDS | MESSAGE_UNSUPPORTED.keys() | _HARMLESS
    return {"input_tokens": len(tokens)}, unknown_fields(body, known)


# ---------------- answers
@dataclass(slots=True)
class _Answer:
    """One message as it grows, and its events."""

    request: MessageRequest
    eos_ids: tuple[int, ...]
    result: Result = field(default_factory=Result)
    last: int = -1  # its latest token
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")
    started: bool = False

    def body(self, text: str | None, reason: tuple[str | None, str | None]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.request.chat.model,
            "content": [] if text is None else [{"type": "text", "text": text}],
            "stop_reason": reason[0],
            "stop_sequence": reason[1],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        """What was found in the cache is not among the input tokens."""
        r = self.result
        return {
            "input_tokens": r.prompt_tokens - r.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": r.cached_tokens,
            "output_tokens": r.completion_tokens,
        }

    def reason(self) -> tuple[str, str | None]:
        """(stop_reason, stop_sequence).  A sequence is named if there is but one: the engine does not say which it was."""
        if self.result.finish is Finish.LENGTH:
            return "max_tokens", None
        ended = {*self.eos_ids, *self.request.chat.params.stop_token_ids}
        if not self.request.stops or self.last in ended:
            return "end_turn", None
        return "stop_sequence", self.request.stops[0] if len(self.request.stops) == 1 else None

    def add(self, chunk: Chunk) -> None:
        self.result.add(chunk)
        self.last = chunk.token_ids[-1] if chunk.token_ids else self.last

    def start(self) -> bytes:
        return b""

    def news(self, index: int, chunk: Chunk) -> bytes:
        out = []
        self.add(chunk)
        if not self.started:
            self.started = True
            first = {"type": "message_start", "message": self.body(None, (None, None))}
            block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
            out += [sse(first, "message_start"), sse(block, "content_block_start")]
        if chunk.text:
            delta = {"type": "text_delta", "text": chunk.text}
            out.append(sse({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta"))
        return b"".join(out)

    def end(self) -> bytes:
        reason, sequence = self.reason()
        end = {"stop_reason": reason, "stop_sequence": sequence}
        out = [
            sse({"type": "content_block_stop", "index": 0}, "content_block_stop"),
            sse({"type": "message_delta", "delta": end, "usage": self.usage()}, "message_delta"),
            sse({"type": "message_stop"}, "message_stop"),
        ]
        return b"".join(out)

    def failed(self, error: RequestError) -> bytes:
        return sse(error_body(error), "error")


async def message(engine: Engine, request: MessageRequest) -> dict[str, Any]:
    """The answer without a stream.  Raises RequestError."""
    answer = _Answer(request, engine.config.model.eos_ids)
    answer.result, answer.last = await whole(engine, request.chat)
    return answer.body(answer.result.text, answer.reason())


async def stream(engine: Engine, request: MessageRequest) -> StreamedAnswer:
    """The streamed answer.  Raises RequestError."""
    return await serving.stream(engine, request.chat, _Answer(request, engine.config.model.eos_ids))


def error_body(error: RequestError) -> dict[str, Any]:
    """Anthropic's error object."""
    kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
