"""Stands before the engine and gives the explanations of the cache their texts.  Runs in the api process.

The last chunk of an answer that is to be explained waits until the tokenizer has decoded the few tokens around the difference,
which it does beside the answer of other requests.  All other chunks pass by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from minisgl.api.cache_reasons import CacheExplanation, shown
from minisgl.api.engine import Chunk, Engine, OnChunk, Prompt, WrappedEngine
from minisgl.errors import RequestError
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams


class Explaining(WrappedEngine):
    """Holds a last chunk back until its explanation has its texts; without them if the tokenizer has no time for questions."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._open: set[int] = set()  # requests that are to be explained and that nobody has closed

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        if not options.explain_cache:
            return super().open(prompt, params, on_chunk, options)
        uid = -1

        def watch(item: Chunk | RequestError) -> None:
            if isinstance(item, RequestError) or not item.finish or item.explanation is None:
                on_chunk(item)
                if isinstance(item, RequestError) or item.finish:
                    self._open.discard(uid)
                return
            last = item

            def pass_on(explained: CacheExplanation) -> None:
                if uid in self._open:
                    self._open.discard(uid)
                    on_chunk(last._replace(explanation=explained))

            self._decode(item.explanation, options, pass_on)

        uid = super().open(prompt, params, watch, options)
        self._open.add(uid)
        return uid

    def close(self, uid: int) -> None:
        self._open.discard(uid)
        super().close(uid)

    def _decode(
        self, explanation: CacheExplanation, options: RequestOptions, then: Callable[[CacheExplanation], object]
    ) -> None:
        w = explanation.windows
        parts = [w.before, w.before + w.ours] + ([] if w.theirs is None else [w.before + w.theirs])
        texts: list[str | RequestError | None] = [None] * len(parts)

        def answer(i: int, text: str | RequestError) -> None:
            texts[i] = text
            if all(t is not None for t in texts):
                good = [t for t in texts if isinstance(t, str)]
                then(shown(explanation, good) if len(good) == len(texts) else explanation)

        asked = replace(options, timeout=0.0)
        for i, ids in enumerate(parts):
            try:
                if ids:
                    super().detokenize(ids, False, functools.partial(answer, i), asked)
                    continue
                text: str | RequestError = ""
            except RequestError as e:
                text = e
            answer(i, text)
