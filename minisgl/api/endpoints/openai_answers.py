"""Renders the answers of OpenAI's chats and completions, as JSON bodies and server-sent events.

Pure; runs in the api process.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii
from types import MappingProxyType
from typing import Any

from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.api.events import SmallEvents
from minisgl.api.parsers.reply import Reply, delta
from minisgl.api.rendering import Rendered, Turns, by_tokens, json_pieces, parts_of
from minisgl.api.requests.openai import ChatRequest, GenerationRequest
from minisgl.api.sse import COMMENT, sse
from minisgl.api.usage import Result, Timings, explained
from minisgl.config import Config
from minisgl.errors import RequestError
from minisgl.version import __version__

FINGERPRINT = f"minisgl-{__version__}"
DONE = b"data: [DONE]\n\n"


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


class OpenAIAnswer(SmallEvents):
    """The answer to a chat or a completion; implements table.Answer.

    The common parts of its events are rendered once, so that an event with text costs one string escape.  Payloads are ASCII:
    no text of a model or a user can end a line, not even U+2028.  With `stream_options.include_usage` every event but the last
    has `"usage": null`, and the last has `"choices": []`; without it every event has a choice.
    """

    alive = COMMENT

    def __init__(self, config: Config, request: GenerationRequest) -> None:
        choices = len(request.prompts) * request.n
        self.request = request
        self._chat = isinstance(request, ChatRequest)
        self._fields = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": FINGERPRINT,
        }
        self._results = [Result() for _ in range(choices)]
        self._replies = [Reply(request.form) for _ in range(choices)] if request.form else []
        chunk = {"object": "chat.completion.chunk"} if self._chat else {}
        self._common = b"data: " + _dump(self._fields | chunk)[:-1] + b',"choices":['
        self._heads = [b'%s{"index":%d' % (self._common, i) for i in range(choices)]
        self._text = b',"delta":{"content":' if self._chat else b',"text":'
        self._logprobs = (b"}" if self._chat else b"") + b',"logprobs":'
        self._so_far, self._details = request.usage.so_far, request.usage.cached
        self._no_usage = b',"usage":null' if request.usage.last else b""
        self._set_end(self._no_usage)

    # ---------------- the answer in one piece
    async def complete(self, chunks: list[Chunk], timings: Timings) -> dict[str, Any]:
        turns, choices = Turns(), []
        for i, (result, chunk) in enumerate(zip(self._results, chunks, strict=True)):
            result.add(chunk)
            choices.append(await self._choice(i, chunk, turns))
            if len(chunks) > 1:  # nothing of a former choice is kept but its bytes
                chunks[i] = chunk._replace(logprobs=())
                choices[-1] = Rendered(json_pieces(choices[-1]))
                await turns.spend(20 + len(chunk.text) // 256)
        return {**self._fields, "choices": choices, **self._cached(), **self._explained(), **self._counts(timings)}

    async def _choice(self, index: int, chunk: Chunk, turns: Turns) -> Any:
        reason, logprobs = chunk.finish.reason, None
        if self.request.params.logprobs is not None:
            logprobs = await by_tokens(chunk.logprobs, self._render_logprobs, turns)
        body: dict[str, Any] = {"text": chunk.text}
        if self._replies:
            reply = self._replies[index]
            for part in parts_of(chunk):
                reply.feed(part.text, part.finish, thinking=chunk.thinking)
                await turns.spend(len(part.text))
            body, reason = {"message": reply.message()}, reply.reason(chunk.finish)
        elif self._chat:
            body = {"message": {"role": "assistant", "content": chunk.text, "refusal": None}}
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": reason}

    def _counts(self, timings: Timings) -> dict[str, Any]:
        """The counts at the end of an answer; in a chat also those of the thoughts."""
        results, n = self._results, self.request.n
        counts = usage(results, n)
        if self._chat:
            counts["completion_tokens_details"] = {"reasoning_tokens": sum(r.reasoning_tokens for r in results)}
        return {"usage": counts, "timings": timings.render(results, n)}

    def _cached(self) -> dict[str, Any]:
        """SGLang's details of the prefix cache: those of the first choice, as there."""
        if not self.request.usage.cached:
            return {}
        return {"sglext": {"cached_tokens_details": {"device": self._results[0].cached_tokens, "host": 0}}}

    def _explained(self) -> dict[str, Any]:
        return explained(self._results, self.request.n) if self.request.options.explain_cache else {}

    def _render_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        requested = self.request.params.logprobs or 0
        return chat_logprobs(logprobs) if self._chat else completion_logprobs(logprobs, requested)

    # ---------------- the stream
    def start(self) -> bytes:
        """The events before the first text: in a chat, one for each choice that announces the role."""
        if not self._chat:
            return b""
        return b"".join(head + b',"delta":{"role":"assistant","content":""' + self._go_on for head in self._heads)

    def add(self, index: int, chunk: Chunk) -> bytes:
        """The events of a chunk of choice `index`, none if all of its text is held back."""
        head, result = self._heads[index], self._results[index]
        result.add(chunk)
        if self._so_far or self._details or self.request.options.explain_cache:
            counts = b',"usage":' + _dump(usage([result])) if self._so_far else self._no_usage
            more = self._cached() if self._details and chunk.finish and index == 0 else {}
            if chunk.finish and not self.request.usage.last and all(r.finish for r in self._results):
                more |= self._explained()
            self._set_end(counts, more)
        if not chunk.finish:
            return self._items(index, chunk) if self._replies else self._text_event(head, chunk, None)
        if not self._chat:
            return self._text_event(head, chunk, chunk.finish.reason)
        if self._replies:
            out, reason = self._items(index, chunk), self._replies[index].reason(chunk.finish)
        else:
            out, reason = self._text_event(head, chunk, None), chunk.finish.reason
        return out + head + b',"delta":{' + self._end_event((), reason)

    def end(self, timings: Timings) -> bytes:
        if not self.request.usage.last:
            return DONE
        return self._common + b"]," + _dump({**self._explained(), **self._counts(timings)})[1:] + b"\n\n" + DONE

    def failed(self, error: RequestError) -> bytes:
        return sse(error.body()) + DONE

    def _set_end(self, counts: bytes, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """The end of events from now on.

        `more`: what the last event of a choice tells of the cache; some clients look for a choice in every event.
        """
        self._end = b"}]" + counts + b"}\n\n"
        self._final = b"}]," + _dump(dict(more))[1:-1] + counts + b"}\n\n" if more else self._end
        self._go_on = self._logprobs + b'null,"finish_reason":null' + self._end

    def _text_event(self, head: bytes, chunk: Chunk, reason: str | None) -> bytes:
        if reason is None and not chunk.logprobs:
            return head + self._text + encode_basestring_ascii(chunk.text).encode() + self._go_on if chunk.text else b""
        return head + self._text + encode_basestring_ascii(chunk.text).encode() + self._end_event(chunk.logprobs, reason)

    def _items(self, index: int, chunk: Chunk) -> bytes:
        """One event for each growth of an item; the log probabilities go with the first."""
        head, logprobs, out = self._heads[index], chunk.logprobs, b""
        for item, text in self._replies[index].feed(chunk.text, chunk.finish, thinking=chunk.thinking):
            unclosed = _dump(delta(item, text))[:-1]  # `_end_event` has the brace
            out += head + b',"delta":' + unclosed + self._end_event(logprobs, None)
            logprobs = ()
        if logprobs:
            return head + self._text + b'""' + self._end_event(logprobs, None)
        return out

    def _end_event(self, logprobs: Sequence[TokenLogprob], reason: str | None) -> bytes:
        """The end of an event, from its log probabilities on."""
        if not logprobs and reason is None:
            return self._go_on
        rendered = self._render_logprobs(logprobs) if logprobs else None
        end = self._end if reason is None else self._final
        return b"".join((self._logprobs, _dump(rendered), b',"finish_reason":', _dump(reason), end))


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
