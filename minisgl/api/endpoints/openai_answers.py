"""OpenAI answers: results -> JSON bodies and server-sent events.  Pure functions; run in the api process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from minisgl.api.engine import TokenLogprob
from minisgl.api.generation import Result, Timings
from minisgl.api.parsers.reply import Part, delta
from minisgl.api.parsers.tool_calls import Said
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish
from minisgl.version import __version__

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


def usage(results: Sequence[Result], n: int = 1) -> dict[str, Any]:
    """The `usage` object, in tokens, summed over the answers of a request; each prompt, which has `n` of them, counts once."""
    prompt = sum(r.prompt_tokens for r in results[::n])
    completion = sum(r.completion_tokens for r in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in results[::n])},
    }


def told_timings(results: Sequence[Result], timings: Timings, n: int = 1) -> dict[str, Any]:
    """The `timings` object of such a request."""
    return timings.told(sum(r.completion_tokens for r in results), sum(r.cached_tokens for r in results[::n]))


def _counts(results: Sequence[Result], n: int, timings: Timings, *, chat: bool) -> dict[str, Any]:
    """What is told at the end; in a chat with the tokens of its thoughts."""
    counts = usage(results, n)
    if chat:
        counts["completion_tokens_details"] = {"reasoning_tokens": sum(r.reasoning_tokens for r in results)}
    return {"usage": counts, "timings": told_timings(results, timings, n)}


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat.  A token that is less than a character has U+FFFD for text; its bytes are exact."""

    def entry(text: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _text(text), "logprob": logprob, "bytes": list(text)}

    content = [
        {**entry(t.text, t.logprob), "top_logprobs": [entry(text, logprob) for _, text, logprob in t.top]} for t in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], wanted: int) -> dict[str, Any]:
    """The `logprobs` object of a completion, whose alternatives are by text: of those with the same one the likelier stays.

    The token itself is among them even if it is not one of the `wanted` most likely.
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
        "top_logprobs": tops if wanted else None,
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


def completion_body(head: Head, results: Sequence[Result], n: int, wanted: int, timings: Timings) -> dict[str, Any]:
    """The answer to a completion request that does not stream; choice i continues prompt i // n."""
    choices = [
        {
            "index": i,
            "text": r.text,
            "logprobs": None if r.logprobs is None else completion_logprobs(r.logprobs, wanted),
            "finish_reason": r.finish.reason,
        }
        for i, r in enumerate(results)
    ]
    return {**head.fields("text_completion"), "choices": choices, **_counts(results, n, timings, chat=False)}


class EventStream:
    """Renders one stream.  What its events have in common is rendered once, so an event with text costs one string escape.

    Payloads are ASCII: no text of a model or a user can end a line, not even U+2028.  With `include_usage` every event but
    the last says `"usage": null`, and the last has `"choices": []`; without it no event is without a choice.
    `choices`: answers in all, of which `n` belong to each prompt.  `wanted`: alternatives to each token, None without logprobs.
    """

    def __init__(
        self, head: Head, *, chat: bool, include_usage: bool, choices: int = 1, n: int = 1, wanted: int | None = None
    ) -> None:
        common = _dump(head.fields("chat.completion.chunk" if chat else "text_completion"))[:-1]
        self._chat, self._choices, self._n, self._wanted = chat, choices, n, wanted
        self._common = b"data: " + common + b',"choices":['
        self._choice = self._common + b'{"index":'
        self._text = b',"delta":{"content":' if chat else b',"text":'
        self._logprobs = (b"}" if chat else b"") + b',"logprobs":'
        self._reason = b',"finish_reason":'
        self._ends_with(b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n")
        self._heads = [b"%s%d%s" % (self._choice, i, self._text) for i in range(choices)]

    def _ends_with(self, end: bytes) -> None:
        self._end = end
        self._go_on = self._logprobs + b"null" + self._reason + b"null" + end

    def count(self, usage: Mapping[str, Any]) -> None:
        """The events from here on tell the counts of tokens so far."""
        self._ends_with(b'}],"usage":%s}\n\n' % _dump(usage))

    def start(self) -> bytes:
        """What comes before the first text: in a chat, an event for each choice that announces the role."""
        if not self._chat:
            return b""
        role = b',"delta":{"role":"assistant","content":""' + self._go_on
        return b"".join(b"%s%d%s" % (self._choice, i, role) for i in range(self._choices))

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """Text of choice `index`; nothing at all if there is none (a piece of a character or stop string is held back)."""
        if logprobs:
            return self._heads[index] + _string(text) + self._told(logprobs, b"null")
        if not text:
            return b""
        return self._heads[index] + _string(text) + self._go_on

    def finish(self, index: int, text: str, finish: Finish, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """The last text of choice `index` and why it ended: two events in a chat, one in a completion."""
        reason = b'"%s"' % (finish.reason or "").encode()
        if not self._chat:
            return self._heads[index] + _string(text) + self._told(logprobs, reason)
        end = self._logprobs + b"null" + self._reason + reason + self._end
        return b"".join((self.text(index, text, logprobs), self._choice, b'%d,"delta":{' % index, end))

    def parts(self, index: int, parts: Sequence[Part], logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        """Parts of a chat answer that is taken apart (see replies), an event each; log probabilities go with the first."""
        head = b'%s%d,"delta":' % (self._choice, index)
        out = []
        for part in parts or ([Said("")] if logprobs else []):
            body = _dump(delta(part))[:-1]  # its brace is the end's
            out.append(b"".join((head, body, self._told(logprobs, b"null") if logprobs else self._go_on)))
            logprobs = ()
        return b"".join(out)

    def close(self, index: int, reason: str | None) -> bytes:
        """Why such an answer ended."""
        end = self._logprobs + b"null" + self._reason + _dump(reason) + self._end
        return b'%s%d,"delta":{' % (self._choice, index) + end

    def _told(self, logprobs: Sequence[TokenLogprob], reason: bytes) -> bytes:
        """The end of an event with log probabilities."""
        told: dict[str, Any] | None = None
        if logprobs:
            told = chat_logprobs(logprobs) if self._chat else completion_logprobs(logprobs, self._wanted or 0)
        return b"".join((self._logprobs, _dump(told), self._reason, reason, self._end))

    def usage(self, results: Sequence[Result], timings: Timings) -> bytes:
        """The event with the counts of tokens, if it was asked for."""
        return self._common + b"]," + _dump(_counts(results, self._n, timings, chat=self._chat))[1:] + b"\n\n"


def error_event(error: RequestError) -> bytes:
    """How a stream that has begun tells of its failure; `DONE` follows."""
    return b"data: " + _dump(error.body()) + b"\n\n"


def _string(text: str) -> bytes:
    """What `_dump` makes of a string, without the making of an encoder."""
    return encode_basestring_ascii(text).encode()


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
