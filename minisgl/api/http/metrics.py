"""What the server counts, as GET /metrics in Prometheus' text format 0.0.4.  Runs in the api process.

`Metered` stands between the facade and the gateway and looks at what passes: nothing in the engine knows of it.  The names are
vLLM's with our prefix (minisgl_num_requests_running, ...), so that a dashboard needs one substitution; labels come from closed
sets, never from a request.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from minisgl.api.engine import ChatPrompt, Chunk, Deliver, Engine, Prompt, TakeIds, TakeText, TextPrompt
from minisgl.config import Config
from minisgl.errors import RequestError
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)


class Histogram:
    """Observations, by the smallest of the ascending `bounds` that is not below them; `counts[-1]` are above all."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Metrics:
    """The numbers themselves.  `responses`: (method, route, status) -> HTTP answers; `finished`: how requests ended."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str, int]] = Counter()
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.ttft, self.itl, self.e2e = Histogram(_TTFT), Histogram(_ITL), Histogram(_E2E)


class Metered:
    """An Engine that counts what goes through it, and is otherwise the one it was made from."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.config: Config = engine.config
        self.metrics = Metrics()
        self._open: set[int] = set()

    @property
    def stats(self) -> dict[str, int]:
        return self._engine.stats

    @property
    def tokenizer_info(self) -> dict[str, Any]:
        return self._engine.tokenizer_info

    @property
    def state(self) -> str:
        return self._engine.state

    @property
    def open_requests(self) -> int:
        return self._engine.open_requests

    def open(self, prompt: Prompt, params: SamplingParams, deliver: Deliver, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        metrics, began, last, uid = self.metrics, time.monotonic(), 0.0, -1

        def count(item: Chunk | RequestError) -> None:
            nonlocal last
            deliver(item)
            now = time.monotonic()
            if isinstance(item, RequestError):
                metrics.finished["timeout" if item.code == "timeout" else "error"] += 1
                self._open.discard(uid)
            else:
                n = len(item.token_ids)
                if not last and (n or item.finish):
                    metrics.ttft.observe(now - began)
                    metrics.prompt_tokens += item.prompt_tokens
                    metrics.cached_tokens += item.cached_tokens
                elif n:
                    metrics.itl.observe((now - last) / n, n)
                metrics.generation_tokens += n
                last = now
                if item.finish:
                    metrics.finished[item.finish.reason or "abort"] += 1
                    metrics.e2e.observe(now - began)
                    self._open.discard(uid)

        uid = self._engine.open(prompt, params, count, options)
        self._open.add(uid)
        return uid

    def tokenize(self, prompt: TextPrompt | ChatPrompt, take: TakeIds) -> int:
        return self._engine.tokenize(prompt, take)

    def detokenize(self, ids: Sequence[int], skip_special: bool, take: TakeText) -> int:
        return self._engine.detokenize(ids, skip_special, take)

    def close(self, uid: int) -> None:
        if uid in self._open:
            self._open.discard(uid)
            self.metrics.finished["abort"] += 1  # its client has left before it was finished
        self._engine.close(uid)

    def flush_cache(self) -> None:
        self._engine.flush_cache()

    def render(self) -> str:
        """The body of GET /metrics."""
        return "\n".join(_lines(self.metrics, self._engine)) + "\n"


def _lines(m: Metrics, engine: Engine) -> Iterator[str]:
    stats = engine.stats
    pages = stats.get("total_pages", 0)
    used = pages - stats.get("free_pages", 0) - stats.get("cached_pages", 0)
    yield from _gauge("num_requests_running", "Requests in the running batch.", stats.get("running_requests", 0))
    yield from _gauge("num_requests_waiting", "Requests that wait to be started.", stats.get("waiting_requests", 0))
    yield from _gauge("num_requests_open", "Requests that have no end yet, wherever they are.", engine.open_requests)
    yield from _gauge("num_tokens_waiting", "Prompt tokens of the waiting requests.", stats.get("waiting_tokens", 0))
    held = "Share of the KV cache that is not free: "
    yield from _gauge("kv_cache_usage_perc", f"{held}running requests alone.", used / pages if pages else 0.0)
    yield from _gauge(
        "kv_cache_filled_perc", f"{held}cached prefixes included.", 1 - stats.get("free_pages", 0) / pages if pages else 0.0
    )
    yield from _gauge("kv_cache_pages", "Pages of the KV cache.", pages)
    for name, text, key in _COUNTERS:
        yield from _counter(name, text, [("", stats.get(key, 0))])
    yield from _counter("prompt_tokens", "Tokens of the prompts of requests that got a first token.", [("", m.prompt_tokens)])
    yield from _counter("prompt_tokens_cached", "Of these, found in the prefix cache.", [("", m.cached_tokens)])
    yield from _counter("generation_tokens", "Tokens that were generated and delivered.", [("", m.generation_tokens)])
    ends = [(f'{{finished_reason="{reason}"}}', n) for reason, n in sorted(m.finished.items())]
    yield from _counter("request_success", "Requests by how they ended.", ends)
    answers = [(f'{{method="{a}",route="{b}",status="{c}"}}', n) for (a, b, c), n in sorted(m.responses.items())]
    yield from _counter("http_requests", "HTTP answers.", answers)
    yield from _histogram("time_to_first_token_seconds", "From the arrival of a request to its first token.", m.ttft)
    yield from _histogram("inter_token_latency_seconds", "Between the tokens of a request.", m.itl)
    yield from _histogram("e2e_request_latency_seconds", "From the arrival of a request to its end.", m.e2e)


_COUNTERS = (
    ("prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache.", "prompt_tokens"),
    ("prefix_cache_hits", "Prompt tokens that were found there.", "cached_tokens"),
    ("num_warmups", "Graphs captured and kernels compiled while a step waited for them.", "warmups"),
    ("num_preemptions", "Running requests that were retracted for want of memory.", "retractions"),
    ("request_timeouts", "Requests that missed their deadline.", "timeouts"),
    ("engine_steps", "Steps of the engine.", "steps"),
)


def _gauge(name: str, text: str, value: float) -> Iterator[str]:
    yield from _head(name, text, "gauge")
    yield f"minisgl_{name} {value:g}" if isinstance(value, float) else f"minisgl_{name} {value}"


def _counter(name: str, text: str, rows: Sequence[tuple[str, int]]) -> Iterator[str]:
    yield from _head(f"{name}_total", text, "counter")
    for labels, value in rows:
        yield f"minisgl_{name}_total{labels} {value}"


def _histogram(name: str, text: str, h: Histogram) -> Iterator[str]:
    yield from _head(name, text, "histogram")
    below = 0
    for bound, count in zip((*h.bounds, "+Inf"), h.counts, strict=True):
        below += count
        yield f'minisgl_{name}_bucket{{le="{bound}"}} {below}'
    yield f"minisgl_{name}_sum {h.total:.6f}"
    yield f"minisgl_{name}_count {below}"


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP minisgl_{name} {text}"
    yield f"# TYPE minisgl_{name} {kind}"
