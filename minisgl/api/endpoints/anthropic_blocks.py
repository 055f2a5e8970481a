"""Renders the answer of /v1/messages: content blocks (thinking, text, tool_use), as one body and as events.

Runs in the api process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minisgl.api.endpoints.answer_items import Event, Fields, ItemAnswer
from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.api.events import Pieces
from minisgl.api.parsers.reply import Item
from minisgl.api.requests.openai import ChatRequest
from minisgl.api.sse import sse
from minisgl.api.usage import explained
from minisgl.config import Config
from minisgl.errors import InvalidParam, RequestError
from minisgl.sampling_params import Finish

_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ERRORS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
_DELTAS = {
    "thought": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


class Message(ItemAnswer):
    """A message."""

    prefix = "msg"
    alive = sse({"type": "ping"}, "ping")

    def __init__(self, config: Config, request: ChatRequest) -> None:
        super().__init__(request)
        self._stops, self._end_ids = request.params.stop, {*config.model.eos_ids, *request.params.stop_token_ids}
        self._started = False

    # ---------------- the body
    def body(self) -> Fields:
        """The message; before its first item has begun, without content and reason."""
        body = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.request.model,
            "content": [_block(item, item.text) for item in self.reply.items],
            **self._reason(),
            "usage": self._usage(),
        }
        return body | ({"timings": self.timings} if self.timings else {}) | explained([self.result])

    def _usage(self) -> Fields:
        """The tokens of the request; those found in the cache do not count as input tokens."""
        r = self.result
        return {
            "input_tokens": r.prompt_tokens - r.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": r.cached_tokens,
            "output_tokens": r.completion_tokens,
        }

    def _reason(self) -> Fields:
        """Why the message ended.  The engine does not say which stop sequence it met, so only a single one is named."""
        reason, sequence, finish = "end_turn", None, self.result.finish
        if finish is Finish.LENGTH:
            reason = "max_tokens"
        elif self.reply.reason(finish) == "tool_calls":
            reason = "tool_use"
        elif self._stops and self.result.last not in self._end_ids:
            reason, sequence = "stop_sequence", self._stops[0] if len(self._stops) == 1 else None
        return {"stop_reason": reason if finish else None, "stop_sequence": sequence if finish else None}

    # ---------------- the events
    def adding(self, index: int, chunk: Chunk) -> Pieces:
        """The first event counts the tokens of the prompt, so it has to wait for the first chunk."""
        if not self._started:
            self._started = True
            self.result.prompt_tokens, self.result.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
            yield self.render([("message_start", {"message": self.body()})])
        yield from super().adding(index, chunk)

    def opened(self, item: Item) -> list[Event]:
        return [("content_block_start", {"index": item.index, "content_block": _block(item, "")})]

    def grown(self, item: Item, text: str, logprobs: Sequence[TokenLogprob]) -> Event:
        kind, key = _DELTAS[item.kind]
        return "content_block_delta", {"index": item.index, "delta": {"type": kind, key: text}}

    def closed(self, item: Item) -> list[Event]:
        return [("content_block_stop", {"index": item.index})]

    def ended(self) -> list[Event]:
        last = {"delta": self._reason(), "usage": self._usage(), "timings": self.timings}
        return [("message_delta", last), ("message_stop", explained([self.result]))]

    def failed(self, error: RequestError) -> bytes:
        return self.render([("error", error_body(error))])


def _block(item: Item, text: str) -> Fields:
    if item.kind == "call":
        return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": _arguments(text)}
    return {"type": "text", "text": text} if item.kind == "text" else {"type": "thinking", "thinking": text, "signature": ""}


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call; none if they were cut off or are not an object."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class ThreadError(InvalidParam):
    """A request has a `thread`.  From the details the SDKs learn to send all of a conversation instead of its newest part."""

    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}  # noqa: RUF012


def error_body(error: RequestError) -> Fields:
    """Anthropic's error object."""
    kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    details = {"details": error.details} if isinstance(error, ThreadError) else {}
    return {"type": "error", "error": {"type": kind, "message": error.message, **details}}
