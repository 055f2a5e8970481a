"""OpenAI answers: results -> JSON bodies and server-sent events.  Pure functions; run in the api process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minisgl import __version__
from minisgl.api.requests import Chunk
from minisgl.errors import RequestError
from minisgl.types import Finish

FINGERPRINT = f"minisgl-{__version__}"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer repeats.  `created` in seconds since 1970; `model` is the served name."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


@dataclass(slots=True)
class Result:
    """The answer to one prompt, added up from its chunks."""

    text: str = ""
    finish: Finish = Finish.NONE
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, chunk: Chunk) -> None:
        """Count a chunk.  Its text is the caller's: a stream has sent it and need not keep it."""
        self.completion_tokens += len(chunk.token_ids)
        self.prompt_tokens = chunk.prompt_tokens
        self.cached_tokens = chunk.cached_tokens
        self.finish = chunk.finish


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """The `usage` object, in tokens, summed over the prompts of a request."""
    prompt = sum(r.prompt_tokens for r in results)
    completion = sum(r.completion_tokens for r in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in results)},
    }


def chat_body(head: Head, result: Result) -> dict[str, Any]:
    """The answer to a chat request that does not stream."""
    message = {"role": "assistant", "content": result.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": result.finish.reason}
    return {**head.fields("chat.completion"), "choices": [choice], "usage": usage([result])}


def completion_body(head: Head, results: Sequence[Result]) -> dict[str, Any]:
    """The answer to a completion request that does not stream; choice i continues prompt i."""
    choices = [{"index": i, "text": r.text, "logprobs": None, "finish_reason": r.finish.reason} for i, r in enumerate(results)]
    return {**head.fields("text_completion"), "choices": choices, "usage": usage(results)}


class EventStream:
    """Renders one stream.  What its events have in common is rendered once, so an event with text costs one string escape.

    Payloads are ASCII: no text of a model or a user can end a line, not even U+2028.  With `include_usage` every event but
    the last says `"usage": null`, and the last has `"choices": []`; without it no event is without a choice.
    """

    def __init__(self, head: Head, *, chat: bool, include_usage: bool) -> None:
        common = _dump(head.fields("chat.completion.chunk" if chat else "text_completion"))[:-1]
        self._chat = chat
        self._common = b"data: " + common + b',"choices":['
        self._choice = self._common + b'{"index":'
        self._text = b',"delta":{"content":' if chat else b',"text":'
        self._reason = (b"}" if chat else b"") + b',"logprobs":null,"finish_reason":'
        self._end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._go_on = self._reason + b"null" + self._end

    def start(self) -> bytes:
        """What comes before the first text: in a chat, the event that announces the role."""
        if not self._chat:
            return b""
        return self._choice + b'0,"delta":{"role":"assistant","content":""' + self._go_on

    def text(self, index: int, text: str) -> bytes:
        """Text of choice `index`; nothing at all if it is empty (a piece of a character or stop string is held back)."""
        if not text:
            return b""
        return b"".join((self._choice, b"%d" % index, self._text, _dump(text), self._go_on))

    def finish(self, index: int, text: str, finish: Finish) -> bytes:
        """The last text of choice `index` and why it ended: two events in a chat, one in a completion."""
        reason = b'"%s"' % (finish.reason or "").encode()
        if not self._chat:
            return b"".join((self._choice, b"%d" % index, self._text, _dump(text), self._reason, reason, self._end))
        return b"".join((self.text(index, text), self._choice, b'%d,"delta":{' % index, self._reason, reason, self._end))

    def usage(self, results: Sequence[Result]) -> bytes:
        """The event with the counts of tokens, if it was asked for."""
        return self._common + b'],"usage":' + _dump(usage(results)) + b"}\n\n"


def error_event(error: RequestError) -> bytes:
    """How a stream that has begun tells of its failure; `DONE` follows."""
    return b"data: " + _dump(error.body()) + b"\n\n"


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
