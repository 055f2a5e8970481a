"""Renders the answer of /generate: text, token ids and `meta_info`, as SGLang has them.  Runs in the api process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from minisgl.api.endpoints.openai_answers import DONE
from minisgl.api.endpoints.sglang import NativeRequest
from minisgl.api.engine import Chunk, TokenLogprob
from minisgl.api.events import SmallEvents
from minisgl.api.rendering import Rendered, Turns, by_tokens, json_pieces, rendered_numbers
from minisgl.api.sse import COMMENT, sse
from minisgl.api.usage import Timings
from minisgl.config import Config
from minisgl.errors import RequestError


class NativeAnswer(SmallEvents):
    """An object, or an array of them if the request has several prompts; implements table.Answer.

    Every event has all of the text so far, or the new text alone with `incremental`.
    """

    alive = COMMENT

    def __init__(self, config: Config, request: NativeRequest) -> None:
        self.request = request
        self._parts = [_Part(request, i) for i in range(len(request.prompts))]

    async def complete(self, chunks: list[Chunk], timings: Timings) -> Any:
        turns, bodies = Turns(), []
        for i, (part, chunk) in enumerate(zip(self._parts, chunks, strict=True)):
            part.add(chunk)
            bodies.append(Rendered(json_pieces(await part.complete(turns))))
            chunks[i] = chunk._replace(logprobs=())
            part.logprobs.clear()
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
        text, ids, logprobs = self.text, self.ids, self.logprobs
        if chunk is not None:
            text, ids, logprobs = chunk.text, list(chunk.token_ids), list(chunk.logprobs)
        meta = self._meta()
        if self.request.top is not None:
            prompt, output = self._split(logprobs)
            meta |= self._triples("output", output) | (self._triples("input", prompt) if self.request.scored else {})
            text = self._own(text, output)
        out = {"text": text, "output_ids": ids, "meta_info": meta}
        return {"index": self.index, **out} if self.request.several and self.request.stream else out

    async def complete(self, turns: Turns) -> dict[str, Any]:
        """The same as `body`, rendered over several turns."""
        text, meta = self.text, self._meta()
        if self.request.top is not None:
            prompt, output = self._split(self.logprobs)
            meta |= await by_tokens(output, partial(self._triples, "output"), turns)
            if self.request.scored:
                meta |= await by_tokens(prompt, partial(self._triples, "input"), turns)
            text = self._own(text, output)
        return {"text": text, "output_ids": await rendered_numbers(self.ids, turns), "meta_info": meta}

    def _meta(self) -> dict[str, Any]:
        last = self.last
        assert last is not None
        reason = {"type": "length", "length": len(self.ids)} if last.finish.reason == "length" else {"type": "stop"}
        return {
            "id": self.request.rid,
            "finish_reason": reason if last.finish else None,
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": len(self.ids),
            "cached_tokens": last.cached_tokens,
            "e2e_latency": round(time.monotonic() - self.began, 6),
        }

    def _split(self, logprobs: list[TokenLogprob]) -> tuple[list[TokenLogprob], list[TokenLogprob]]:
        """Those of the prompt, if it is scored, and those of the answer."""
        n_prompt = self.last.prompt_tokens if self.request.scored and self.last is not None else 0
        return logprobs[:n_prompt], logprobs[n_prompt:]

    def _own(self, text: str, output: list[TokenLogprob]) -> str:
        """The text without that of a scored prompt."""
        return text[output[0].offset :] if self.request.scored and output else text

    def _triples(self, name: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """SGLang's triples: log probability, id, text."""
        tops = [[(lp, i, b.decode("utf-8", "replace")) for i, b, lp in t.top] if t.top else None for t in tokens]
        return {
            f"{name}_token_logprobs": [(t.logprob, t.token_id, t.text.decode("utf-8", "replace")) for t in tokens],
            f"{name}_top_logprobs": tops if self.request.top else [],
        }
