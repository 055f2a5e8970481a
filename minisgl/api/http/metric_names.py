"""Lists the facts of GET /metrics without labels: our name of each, what it is, and what other engines call it.

docs/metrics.md has them all; exposition.py renders them.  Runs in the api process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import NamedTuple

from minisgl.api.http.metrics import E2E, ITL, SGLANG_TTFT, TTFT, Histogram, Metered, Metrics
from minisgl.config import Config

_HELD = "Share of the KV cache that is not free:"


class Facts(NamedTuple):
    """What is known when a scrape comes.  `stats`: of the scheduler, 0 for what it has not said."""

    stats: Mapping[str, int]
    counts: Metrics
    engine: Metered
    filled: float
    used: float

    @property
    def config(self) -> Config:
        return self.engine.config


class Fact(NamedTuple):
    """A fact without labels.  `aliases`: what other engines call it; theirs have the label model_name."""

    name: str
    text: str
    value: Callable[[Facts], float]
    aliases: tuple[str, ...] = ()


def _stat(name: str, scale: float = 1) -> Callable[[Facts], float]:
    return lambda f: f.stats[name] * scale


GAUGES = (
    Fact(
        "num_requests_running",
        "Requests in the running batch.",
        _stat("running_requests"),
        ("vllm:num_requests_running", "sglang:num_running_reqs"),
    ),
    Fact(
        "num_requests_waiting",
        "Requests that wait to be started.",
        lambda f: f.stats["waiting_requests"] + f.stats["compiling_requests"],
        ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    ),
    Fact("num_requests_open", "Requests that have no end yet, wherever they are.", lambda f: f.engine.open_requests),
    Fact("num_tokens_waiting", "Prompt tokens of the waiting requests.", _stat("waiting_tokens")),
    Fact(
        "kv_cache_usage_perc",
        f"{_HELD} what running requests hold.",
        lambda f: f.used,
        ("vllm:kv_cache_usage_perc", "sglang:token_usage"),
    ),
    Fact("kv_cache_filled_perc", f"{_HELD} cached prefixes included.", lambda f: f.filled),
    Fact("kv_cache_pages", "Pages of the KV cache.", _stat("total_pages")),
    Fact(
        "kv_cache_tokens",
        "Tokens that the KV cache holds.",
        lambda f: f.stats["total_pages"] * f.config.engine.page_size,
        ("sglang:max_total_num_tokens",),
    ),
    Fact("http_connections", "Open connections.", lambda f: f.counts.connections()),
    Fact(
        "unread_bytes", "Of answers that wait to be complete, or for their clients to read on.", lambda f: f.engine.kept.bytes
    ),
)
COUNTERS = (
    Fact(
        "prefix_cache_queries",
        "Prompt tokens that were looked for in the cache.",
        _stat("prompt_tokens"),
        ("vllm:prefix_cache_queries",),
    ),
    Fact("prefix_cache_hits", "Prompt tokens that were found there.", _stat("cached_tokens"), ("vllm:prefix_cache_hits",)),
    Fact(
        "evicted_tokens",
        "Tokens of cached prefixes that made room for others.",
        lambda f: f.stats["evicted_pages"] * f.config.engine.page_size,
        ("sglang:evicted_tokens",),
    ),
    Fact("num_warmups", "Graphs captured and kernels compiled while a step waited for them.", _stat("warmups")),
    Fact(
        "num_preemptions",
        "Running requests that were retracted for want of memory.",
        _stat("retractions"),
        ("vllm:num_preemptions", "sglang:num_retracted_requests"),
    ),
    Fact("request_timeouts", "Requests that missed their deadline.", _stat("timeouts")),
    Fact("nan_requests", "Requests that ended because their logits were no finite numbers.", _stat("nan_requests")),
    Fact("journal_failures", "Journals that ended because they could not be written.", _stat("journal_failures")),
    Fact("engine_steps", "Steps of the engine.", _stat("steps")),
    Fact("engine_busy_seconds", "Time that the device computed steps.", _stat("busy_us", 1e-6)),
    Fact("engine_idle_seconds", "Time between steps that the device waited for the next.", _stat("idle_us", 1e-6)),
    Fact("prefill_tokens", "Prompt tokens that were computed.", _stat("prefill_tokens")),
    Fact("wasted_rows", "Tokens computed for requests that had already ended.", _stat("wasted_rows")),
    Fact(
        "prompt_tokens",
        "Tokens of the prompts of requests that got a first token.",
        lambda f: f.counts.prompt_tokens,
        ("vllm:prompt_tokens", "sglang:prompt_tokens"),
    ),
    Fact(
        "prompt_tokens_cached",
        "Of these, cached.",
        lambda f: f.counts.cached_tokens,
        ("vllm:prompt_tokens_cached",),
    ),
    Fact(
        "generation_tokens",
        "Tokens that were generated and delivered.",
        lambda f: f.counts.generation_tokens,
        ("vllm:generation_tokens", "sglang:generation_tokens"),
    ),
)


class Bars(NamedTuple):
    """A histogram.  `aliases`: what other engines call it, with the bounds that they have of it; (): ours."""

    name: str
    text: str
    of: Callable[[Metrics], Histogram]
    aliases: Mapping[str, tuple[float, ...]]


_FROM = "From the arrival of a request to its"
HISTOGRAMS = (
    Bars(
        "time_to_first_token_seconds",
        f"{_FROM} first token.",
        lambda m: m.ttft,
        {"vllm:time_to_first_token_seconds": TTFT, "sglang:time_to_first_token_seconds": SGLANG_TTFT},
    ),
    *(
        Bars(name, text, of, {f"vllm:{name}": bounds})
        for name, text, of, bounds in (
            ("inter_token_latency_seconds", "Between the tokens of a request.", attrgetter("itl"), ITL),
            (
                "request_time_per_output_token_seconds",
                "Of a request, the mean time of its tokens behind the first.",
                attrgetter("tpot"),
                ITL,
            ),
            ("e2e_request_latency_seconds", f"{_FROM} end.", attrgetter("e2e"), E2E),
            (
                "request_queue_time_seconds",
                "From the arrival of a request at the scheduler to its first step.",
                attrgetter("queue"),
                E2E,
            ),
            (
                "request_prefill_time_seconds",
                "From the first step of a request to its first token.",
                attrgetter("prefill"),
                E2E,
            ),
            ("request_decode_time_seconds", "From the first token of a request to its last.", attrgetter("decode"), E2E),
            (
                "request_inference_time_seconds",
                "From the first step of a request to its last token.",
                attrgetter("inference"),
                E2E,
            ),
            ("request_prompt_tokens", "Tokens of a request's prompt.", attrgetter("prompts"), ()),
            ("request_generation_tokens", "Tokens of a request's answer.", attrgetter("answers"), ()),
        )
    ),
)
