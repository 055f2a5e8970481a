"""Counts requests, tokens and latencies for GET /metrics.  Runs in the api process.

`Metered` stands between the facade and the gateway and counts the chunks that pass; the engine does not know of it.  It keeps
plain numbers, because metrics of prometheus_client would make a chunk three times as expensive.  The numbers become metrics
when they are scraped (exposition.py).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, takewhile

from minisgl.api.engine import Chunk, Engine, OnChunk, Prompt, WrappedEngine
from minisgl.api.http.process_facts import ProcessFacts
from minisgl.errors import RequestError
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

# Bounds in seconds: vLLM's and SGLang's, so that their boards and ours add up, and before them some for what is fast.
TTFT: tuple[float, ...] = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0)
TTFT += (2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
SGLANG_TTFT = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
E2E: tuple[float, ...] = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
E2E += (120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_FAST_ITL, _FAST_PHASE = (0.001, 0.0025, 0.005), (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def token_bounds(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    steps = (float(f"{digit}e{power}") for power in range(19) for digit in (1, 2, 5))
    return tuple(takewhile(lambda n: n <= most, steps))


class Histogram:
    """Observations, counted by the smallest of the ascending `bounds` that is not below them; `counts[-1]` are above all."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def at_most(self, bounds: Sequence[float]) -> list[int]:
        """How many observations are at most each of some of its bounds, and how many there are."""
        sums = list(accumulate(self.counts))
        return [*(sums[self.bounds.index(bound)] for bound in bounds), sums[-1]]


def kv_shares(stats: Mapping[str, int]) -> tuple[float, float]:
    """The shares of the KV cache that are not free: with prefixes that nobody uses now, and without those."""
    pages, filled = stats["total_pages"] or 1, stats["total_pages"] - stats["free_pages"]
    return filled / pages, (filled - stats["evictable_pages"]) / pages


class Metrics:
    """The counts.  `responses`: (method, route, status) -> HTTP answers; `finished`: how requests ended.

    `connections`: how many are open; `closed`: those ended for the good of others, see connection_limits.py.
    """

    def __init__(self, max_context: int) -> None:
        self.responses: Counter[tuple[str, str, int]] = Counter()
        self.finished: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.connections: Callable[[], int] = int
        self.processes = ProcessFacts()
        self.spans: Callable[[], Mapping[str, int]] | None = None  # by what has become of them; None: nobody traces
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.ttft, self.e2e = Histogram(sorted({*TTFT, *SGLANG_TTFT})), Histogram((*_FAST_PHASE, *E2E))
        self.itl, self.tpot = (Histogram((*_FAST_ITL, *ITL)) for _ in range(2))
        self.queue, self.prefill, self.decode, self.inference = (Histogram((*_FAST_PHASE, *E2E)) for _ in range(4))
        self.prompts, self.answers = (Histogram(token_bounds(max_context)) for _ in range(2))  # of tokens

    def begin(self, chunk: Chunk, ttft: float) -> None:
        """The first chunk of a request has come, so many seconds after it was opened."""
        self.ttft.observe(ttft)
        self.queue.observe(chunk.queued)
        self.prefill.observe(ttft - chunk.waited)
        self.prompt_tokens += chunk.prompt_tokens
        self.cached_tokens += chunk.cached_tokens

    def end(self, chunk: Chunk, ttft: float, e2e: float, tokens: int) -> None:
        """The last chunk of a request has come; its answer has so many tokens."""
        self.finished[chunk.finish.reason or "abort"] += 1
        self.e2e.observe(e2e)
        self.decode.observe(e2e - ttft)
        self.inference.observe(e2e - chunk.waited)
        self.prompts.observe(chunk.prompt_tokens)
        self.answers.observe(tokens)
        if tokens > 1:
            self.tpot.observe((e2e - ttft) / (tokens - 1))


class Metered(WrappedEngine):
    """Counts the chunks that pass through it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.metrics = Metrics(engine.config.max_context)
        self._open: set[int] = set()

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        metrics, began, first, last, tokens, uid = self.metrics, time.monotonic(), 0.0, 0.0, 0, -1

        def count(item: Chunk | RequestError) -> None:
            nonlocal first, last, tokens
            on_chunk(item)
            now = time.monotonic()
            if isinstance(item, RequestError):
                metrics.finished["timeout" if item.code == "timeout" else "error"] += 1
                self._open.discard(uid)
            else:
                n = len(item.token_ids)
                if not first and (n or item.finish):
                    first = now
                    metrics.begin(item, now - began)
                elif n:
                    metrics.itl.observe((now - last) / n, n)
                tokens += n
                metrics.generation_tokens += n
                last = now
                if item.finish:
                    metrics.end(item, first - began, now - began, tokens)
                    self._open.discard(uid)

        uid = super().open(prompt, params, count, options)
        self._open.add(uid)
        return uid

    def close(self, uid: int) -> None:
        if uid in self._open:
            self._open.discard(uid)
            self.metrics.finished["abort"] += 1  # the client left before the end
        super().close(uid)
