"""Counts requests, tokens and latencies, and exposes them at GET /metrics for Prometheus.  Runs in the api process.

`Metered` stands between the facade and the gateway and counts the chunks that pass; the engine does not know of it.  It keeps
plain numbers, because metrics of prometheus_client would make a chunk three times as expensive.  The numbers become metrics
when they are scraped.  The names are vLLM's with our prefix (minisgl_num_requests_running, ...), so a dashboard needs one
substitution.  Labels come from closed sets, never from a request.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from minisgl.api.cache_reasons import REASONS
from minisgl.api.engine import Chunk, Engine, OnChunk, Prompt, WrappedEngine
from minisgl.errors import RequestError
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HELD = "Share of the KV cache that is not free:"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0)


class Histogram:
    """Observations, counted by the smallest of the ascending `bounds` that is not below them; `counts[-1]` are above all."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def metric(self, name: str, text: str) -> Metric:
        buckets = zip((*map(str, self.bounds), "+Inf"), accumulate(self.counts), strict=True)
        return HistogramMetricFamily(f"minisgl_{name}_seconds", text, list(buckets), self.total)


def kv_shares(stats: Mapping[str, int]) -> tuple[float, float]:
    """The shares of the KV cache that are not free: with cached prefixes, and of running requests alone."""
    pages, filled = stats["total_pages"] or 1, stats["total_pages"] - stats["free_pages"]
    return filled / pages, (filled - stats["cached_pages"]) / pages


class Metrics:
    """The counts.  `responses`: (method, route, status) -> HTTP answers; `finished`: how requests ended.

    `connections`: how many are open; `closed`: those ended for the good of others, see connection_limits.py.
    """

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, str, int]] = Counter()
        self.finished: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.connections: Callable[[], int] = int
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.ttft, self.itl, self.e2e = Histogram(_TTFT), Histogram(_ITL), Histogram(_E2E)


class Metered(WrappedEngine):
    """Counts the chunks that pass through it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.metrics = Metrics()
        self._open: set[int] = set()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def open(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk, options: RequestOptions = DEFAULT_OPTIONS) -> int:
        metrics, began, last, uid = self.metrics, time.monotonic(), 0.0, -1

        def count(item: Chunk | RequestError) -> None:
            nonlocal last
            on_chunk(item)
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

        uid = super().open(prompt, params, count, options)
        self._open.add(uid)
        return uid

    def close(self, uid: int) -> None:
        if uid in self._open:
            self._open.discard(uid)
            self.metrics.finished["abort"] += 1  # the client left before the end
        super().close(uid)

    def render(self) -> bytes:
        """The body of GET /metrics: Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics as prometheus_client has them; called by the registry."""
        m, stats = self.metrics, defaultdict(int, self._engine.stats)
        filled, used = kv_shares(stats)
        for name, text, value in (
            ("num_requests_running", "Requests in the running batch.", stats["running_requests"]),
            ("num_requests_waiting", "Requests that wait to be started.", stats["waiting_requests"]),
            ("num_requests_open", "Requests that have no end yet, wherever they are.", self._engine.open_requests),
            ("num_tokens_waiting", "Prompt tokens of the waiting requests.", stats["waiting_tokens"]),
            ("kv_cache_usage_perc", f"{_HELD} running requests alone.", used),
            ("kv_cache_filled_perc", f"{_HELD} cached prefixes included.", filled),
            ("kv_cache_pages", "Pages of the KV cache.", stats["total_pages"]),
            ("http_connections", "Open connections.", m.connections()),
            ("unread_bytes", "Of answers that wait to be complete, or for their clients to read on.", self._engine.kept.bytes),
        ):
            yield GaugeMetricFamily(f"minisgl_{name}", text, value)
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache.", stats["prompt_tokens"]),
            ("prefix_cache_hits", "Prompt tokens that were found there.", stats["cached_tokens"]),
            ("num_warmups", "Graphs captured and kernels compiled while a step waited for them.", stats["warmups"]),
            ("num_preemptions", "Running requests that were retracted for want of memory.", stats["retractions"]),
            ("request_timeouts", "Requests that missed their deadline.", stats["timeouts"]),
            ("nan_requests", "Requests that ended because their logits were no finite numbers.", stats["nan_requests"]),
            ("journal_failures", "Journals that ended because they could not be written.", stats["journal_failures"]),
            ("engine_steps", "Steps of the engine.", stats["steps"]),
            ("prompt_tokens", "Tokens of the prompts of requests that got a first token.", m.prompt_tokens),
            ("prompt_tokens_cached", "Of these, found in the prefix cache.", m.cached_tokens),
            ("generation_tokens", "Tokens that were generated and delivered.", m.generation_tokens),
        ):
            yield CounterMetricFamily(f"minisgl_{name}", text, value)
        reasons = self._engine.cache_reasons
        for name, text, counts in (
            ("prefix_cache_misses", "Requests by why no more of their prompt was cached.", reasons.requests),
            ("prefix_cache_missed_tokens", "Their prompt tokens that were not cached.", reasons.tokens),
        ):
            family = CounterMetricFamily(f"minisgl_{name}", text, labels=("reason",))
            for reason in REASONS:
                family.add_metric((reason,), counts[reason])
            yield family
        restarts = CounterMetricFamily(
            "minisgl_restarts", "Processes that were started again, after a death or a hang.", labels=("process",)
        )
        for name, n in self._engine.restarts.items():
            restarts.add_metric((name,), n)
        yield restarts
        ends = CounterMetricFamily("minisgl_request_success", "Requests by how they ended.", labels=("finished_reason",))
        for reason, n in m.finished.items():
            ends.add_metric((reason,), n)
        answers = CounterMetricFamily("minisgl_http_requests", "HTTP answers.", labels=("method", "route", "status"))
        for (method, route, status), n in m.responses.items():
            answers.add_metric((method, route, str(status)), n)
        closed = CounterMetricFamily("minisgl_http_connections_closed", "Connections ended early.", labels=("reason",))
        for reason, n in m.closed.items():
            closed.add_metric((reason,), n)
        yield from (ends, answers, closed)
        yield m.ttft.metric("time_to_first_token", "From the arrival of a request to its first token.")
        yield m.itl.metric("inter_token_latency", "Between the tokens of a request.")
        yield m.e2e.metric("e2e_request_latency", "From the arrival of a request to its end.")
