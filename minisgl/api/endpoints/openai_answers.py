"""Renders the answers of OpenAI's chats and completions, as JSON bodies and server-sent events.

Pure; runs in the api process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.api.generation import Result, Timings
from minisgl.api.parsers.reply import Growth, Reply, delta
from minisgl.api.requests.openai import ChatRequest, GenerationRequest
from minisgl.errors import RequestError
from minisgl.version import __version__

FINGERPRINT = f"minisgl-{__version__}"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """The fields that every part of one answer repeats.  `created`: seconds since 1970.  `model`: the served name."""

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


def usage(results: Sequence[Result], n: int = 1) -> dict[str, Any]:
    """The `usage` object: tokens, summed over all choices.  Prompt tokens are counted once per prompt, not once per choice.

    `n`: choices per prompt.
    """
    prompt = sum(r.prompt_tokens for r in results[::n])
    completion = sum(r.completion_tokens for r in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in results[::n])},
    }


def render_timings(results: Sequence[Result], timings: Timings, n: int = 1) -> dict[str, Any]:
    """The `timings` object of a request."""
    return timings.render(sum(r.completion_tokens for r in results), sum(r.cached_tokens for r in results[::n]))


def _counts(results: Sequence[Result], n: int, timings: Timings, *, chat: bool) -> dict[str, Any]:
    """The counts at the end of an answer; in a chat also those of the thoughts."""
    counts = usage(results, n)
    if chat:
        counts["completion_tokens_details"] = {"reasoning_tokens": sum(r.reasoning_tokens for r in results)}
    return {"usage": counts, "timings": render_timings(results, timings, n)}


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat.  A token that ends inside a character has U+FFFD for text; its bytes are exact."""

    def entry(text: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _text(text), "logprob": logprob, "bytes": list(text)}

    content = [
        {**entry(t.text, t.logprob), "top_logprobs": [entry(text, logprob) for _, text, logprob in t.top]} for t in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], requested: int) -> dict[str, Any]:
    """The `logprobs` object of a completion.  Alternatives are keyed by text; the likelier of two with the same text stays.

    The token itself is one of the alternatives even if it is not among the `requested` most likely.
    """
    tops: list[dict[str, float] | None] = []
    for t in tokens:
        top: dict[str, float] = {}
        for text, logprob in [(text, logprob) for _, text, logprob in t.top] + [(t.text, t.logprob)]:
            if logprob is not None:
                top[_text(text)] = max(logprob, top.get(_text(text), logprob))
        tops.append(top if t.logprob is not None else None)
    return {
        "tokens": [_text(t.text) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": tops if requested else None,
        "text_offset": [t.offset for t in tokens],
    }


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def chat_body(head: Head, results: Sequence[Result], timings: Timings) -> dict[str, Any]:
    """The answer to a chat request that does not stream; all choices answer the same conversation."""
    choices = [
        {
            "index": i,
            "message": r.reply.message() if r.reply else {"role": "assistant", "content": r.text, "refusal": None},
            "logprobs": None if r.logprobs is None else chat_logprobs(r.logprobs),
            "finish_reason": r.reply.reason(r.finish) if r.reply else r.finish.reason,
        }
        for i, r in enumerate(results)
    ]
    return {**head.fields("chat.completion"), "choices": choices, **_counts(results, len(results), timings, chat=True)}


def completion_body(head: Head, results: Sequence[Result], n: int, requested: int, timings: Timings) -> dict[str, Any]:
    """The answer to a completion request that does not stream; choice i continues prompt i // n."""
    choices = [
        {
            "index": i,
            "text": r.text,
            "logprobs": None if r.logprobs is None else completion_logprobs(r.logprobs, requested),
            "finish_reason": r.finish.reason,
        }
        for i, r in enumerate(results)
    ]
    return {**head.fields("text_completion"), "choices": choices, **_counts(results, n, timings, chat=False)}


class AnswerEvents:
    """The Events of a chat or a completion.  What they have in common is rendered once: text costs one string escape.

    Payloads are ASCII: no text of a model or a user can end a line, not even U+2028.  With `stream_options.include_usage` every
    event but the last has `"usage": null`, and the last has `"choices": []`; without it every event has a choice.
    """

    def __init__(self, head: Head, request: GenerationRequest) -> None:
        choices = len(request.prompts) * request.n
        self._request = request
        self._chat = isinstance(request, ChatRequest)
        self._results = [Result() for _ in range(choices)]
        self._replies = [Reply(request.form) for _ in range(choices)] if request.form else []
        common = _dump(head.fields("chat.completion.chunk" if self._chat else "text_completion"))[:-1]
        self._common = b"data: " + common + b',"choices":['
        self._heads = [b'%s{"index":%d' % (self._common, i) for i in range(choices)]
        self._text = b',"delta":{"content":' if self._chat else b',"text":'
        self._logprobs = (b"}" if self._chat else b"") + b',"logprobs":'
        self._set_end(b'}],"usage":null}\n\n' if request.usage.last else b"}]}\n\n")

    def start(self) -> bytes:
        """The events before the first text: in a chat, one for each choice that announces the role."""
        if not self._chat:
            return b""
        return b"".join(head + b',"delta":{"role":"assistant","content":""' + self._go_on for head in self._heads)

    def add(self, index: int, chunk: Chunk) -> bytes:
        """The events of a chunk of choice `index`, none if all of its text is held back."""
        result, head = self._results[index], self._heads[index]
        result.add(chunk)
        if self._request.usage.so_far:
            self._set_end(b'}],"usage":%s}\n\n' % _dump(usage([result])))
        reason = chunk.finish.reason
        if self._replies:
            reply = self._replies[index]
            out = self._items(head, reply.feed(chunk.text, end=bool(chunk.finish)), chunk.logprobs)
            reason = reply.reason(chunk.finish)
        elif chunk.text or chunk.logprobs or (chunk.finish and not self._chat):  # the last text of a completion has the reason
            end = self._end_event(chunk.logprobs, None if self._chat else reason)
            out = head + self._text + encode_basestring_ascii(chunk.text).encode() + end
        else:
            out = b""
        return out + head + b',"delta":{' + self._end_event((), reason) if self._chat and chunk.finish else out

    def end(self, timings: Timings) -> bytes:
        if not self._request.usage.last:
            return DONE
        counts = _counts(self._results, self._request.n, timings, chat=self._chat)
        return self._common + b"]," + _dump(counts)[1:] + b"\n\n" + DONE

    def failed(self, error: RequestError) -> bytes:
        return error_event(error) + DONE

    def _set_end(self, end: bytes) -> None:
        self._end = end
        self._go_on = self._logprobs + b'null,"finish_reason":null' + end

    def _items(self, head: bytes, growths: Sequence[Growth], logprobs: Sequence[TokenLogprob]) -> bytes:
        """The growth of items, one event each; the log probabilities go with the first."""
        if logprobs and not growths:
            return head + b',"delta":{"content":""' + self._end_event(logprobs, None)
        out = b""
        for item, text in growths:
            out += (
                head + b',"delta":' + _dump(delta(item, text))[:-1] + self._end_event(logprobs, None)
            )  # the end has its brace
            logprobs = ()
        return out

    def _end_event(self, logprobs: Sequence[TokenLogprob], reason: str | None) -> bytes:
        """The end of an event, from its log probabilities on."""
        if not logprobs and reason is None:
            return self._go_on
        rendered: dict[str, Any] | None = None
        if logprobs:
            requested = self._request.params.logprobs or 0
            rendered = chat_logprobs(logprobs) if self._chat else completion_logprobs(logprobs, requested)
        return b"".join((self._logprobs, _dump(rendered), b',"finish_reason":', _dump(reason), self._end))


def error_event(error: RequestError) -> bytes:
    """The event that reports the failure of a stream; `DONE` follows."""
    return b"data: " + _dump(error.body()) + b"\n\n"


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
