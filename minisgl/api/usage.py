"""Counts the tokens of an answer and measures the durations of a generation.  Runs in the api process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minisgl.api.cache_reasons import CacheExplanation
from minisgl.api.engine import Chunk
from minisgl.sampling_params import Finish


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of a generation in seconds: `first` until the first chunk of any prompt, `rest` from there to the last chunk.

    `queued`: the part of `first` in which that prompt waited for its first step (see Chunk).  The remainder of `first` is the
    prefill, with a little for tokenizing and for the ways between the processes.
    """

    first: float
    rest: float
    queued: float = 0.0

    def render(self, results: Sequence[Result], n: int = 1) -> dict[str, Any]:
        """The `timings` object: milliseconds, the rate of the tokens after the first, and the cached tokens of the prompts.

        `n`: choices per prompt.
        """
        tokens = sum(r.completion_tokens for r in results)
        return {
            "queue_ms": round(1000 * self.queued, 3),
            "ttft_ms": round(1000 * self.first, 3),
            "decode_ms": round(1000 * self.rest, 3),
            "total_ms": round(1000 * (self.first + self.rest), 3),
            "tok_s": round((tokens - 1) / self.rest, 3) if self.rest > 0 and tokens > 1 else None,
            "cached_n": sum(r.cached_tokens for r in results[::n]),
        }


@dataclass(slots=True)
class Result:
    """The counts of one answer to one prompt, accumulated from its chunks."""

    finish: Finish = Finish.NONE
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # completion tokens that belong to the thought (see parsers/outline.py), known when it has ended
    last: int = -1  # the latest token
    explanation: CacheExplanation | None = None  # of the cache, known at the end if it was asked for

    def add(self, chunk: Chunk) -> None:
        _, ids, self.finish, self.prompt_tokens, self.cached_tokens, _, _, _, self.reasoning_tokens, _, _, explanation = chunk
        self.completion_tokens += len(ids)
        if ids:
            self.last = ids[-1]
        if explanation is not None:
            self.explanation = explanation


def explained(results: Sequence[Result], n: int = 1) -> dict[str, Any]:
    """`cache_explanation`, if it was asked for: of the first choice of the prompt; of several prompts, an array of these.

    `n`: choices per prompt.
    """
    found = [r.explanation.render() for r in results[::n] if r.explanation is not None]
    return {"cache_explanation": found[0] if len(results) == n else found} if found else {}
