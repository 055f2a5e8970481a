"""Renders the answer of /generate: text, token ids and `meta_info`, as SGLang has them.  Runs in the api process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.api.endpoints.openai_answers import DONE
from minisgl.api.endpoints.sglang import NativeRequest
from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.api.generation import Timings
from minisgl.api.sse import sse
from minisgl.config import Config
from minisgl.errors import RequestError


class NativeAnswer:
    """An object, or an array of them if the request has several prompts; implements table.Answer.

    Every event has all of the text so far, or the new text alone with `incremental`.
    """

    def __init__(self, config: Config, request: NativeRequest) -> None:
        self.request = request
        self._parts = [_Part(request, i) for i in range(len(request.prompts))]

    def complete(self, chunks: Sequence[Chunk], timings: Timings) -> Any:
        for part, chunk in zip(self._parts, chunks, strict=True):
            part.add(chunk)
        bodies = [part.body() for part in self._parts]
        return bodies if self.request.several else bodies[0]

    def start(self) -> bytes:
        return b""

    def add(self, index: int, chunk: Chunk) -> bytes:
        self._parts[index].add(chunk)
        return sse(self._parts[index].body(chunk if self.request.incremental else None))

    def end(self, timings: Timings) -> bytes:
        return DONE

    def failed(self, error: RequestError) -> bytes:
        return sse(error.body()) + DONE


@dataclass(slots=True)
class _Part:
    """The answer to one prompt so far."""

    request: NativeRequest
    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Chunk | None = None
    began: float = field(default_factory=time.monotonic)

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.last = chunk

    def body(self, chunk: Chunk | None = None) -> dict[str, Any]:
        """All of the answer; with `chunk` only the text and tokens of that chunk."""
        last = self.last
        assert last is not None
        reason = {"type": "length", "length": len(self.ids)} if last.finish.reason == "length" else {"type": "stop"}
        meta: dict[str, Any] = {
            "id": self.request.rid,
            "finish_reason": reason if last.finish else None,
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": len(self.ids),
            "cached_tokens": last.cached_tokens,
            "e2e_latency": round(time.monotonic() - self.began, 6),
        }
        text, ids, logprobs = self.text, self.ids, self.logprobs
        if chunk is not None:
            text, ids, logprobs = chunk.text, list(chunk.token_ids), list(chunk.logprobs)
        if self.request.top is not None:
            text = self._add_logprobs(meta, text, logprobs, last.prompt_tokens if self.request.scored else 0)
        out = {"text": text, "output_ids": ids, "meta_info": meta}
        return {"index": self.index, **out} if self.request.several and self.request.stream else out

    def _add_logprobs(self, meta: dict[str, Any], text: str, logprobs: list[TokenLogprob], n_prompt: int) -> str:
        """Add SGLang's triples (log probability, id, text) to `meta`; returns the text without that of a scored prompt."""
        prompt, output = logprobs[:n_prompt], logprobs[n_prompt:]
        parts = [("output", output)] + ([("input", prompt)] if self.request.scored else [])
        for name, tokens in parts:
            meta[f"{name}_token_logprobs"] = [(t.logprob, t.token_id, t.text.decode("utf-8", "replace")) for t in tokens]
            tops = [[(lp, i, b.decode("utf-8", "replace")) for i, b, lp in t.top] if t.top else None for t in tokens]
            meta[f"{name}_top_logprobs"] = tops if self.request.top else []
        return text[output[0].offset :] if self.request.scored and output else text
