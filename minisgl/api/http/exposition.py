"""Renders GET /metrics: the counts of metrics.py and the scheduler's statistics as Prometheus reads them.

Each fact has a name of ours (minisgl_...), and the names under which the boards and routers of other engines look for it, with
their labels and buckets.  A name whose value nobody here knows is left out.  Labels come from closed sets, never from a
request.  Runs in the api process, on its event loop; docs/metrics.md has the table.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString

from minisgl.api.http.metrics import E2E, ITL, TTFT, Histogram, Metered, Metrics, kv_shares
from minisgl.api.requests.openai import served_names
from minisgl.config import Config
from minisgl.version import __version__

ENDS = ("stop", "length", "abort", "timeout", "error")
CLOSED = ("refused", "room", "headers", "slow_reader", "memory")
_VLLM_ENDS = {"timeout": "error"}  # the others have the same name there
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPEN = "application/openmetrics-text"
_OPEN_METRICS = f"{_OPEN}; version=1.0.0; charset=utf-8"
_EOF, _SLICE = b"# EOF\n", 6  # metrics that are written down at a time
_HELD = "Share of the KV cache that is not free:"


class _Slice(NamedTuple):
    """A part of a scrape, in the place of prometheus_client's registry."""

    metrics: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        return self.metrics


class _Facts(NamedTuple):
    """What is known when a scrape comes.  `stats`: of the scheduler, 0 for what it has not said."""

    stats: Mapping[str, int]
    counts: Metrics
    engine: Metered
    filled: float
    used: float

    @property
    def config(self) -> Config:
        return self.engine.config


class _Row(NamedTuple):
    """A fact without labels.  `aliases`: what other engines call it; theirs have the label model_name."""

    name: str
    text: str
    value: Callable[[_Facts], float]
    aliases: tuple[str, ...] = ()


def _stat(name: str, scale: float = 1) -> Callable[[_Facts], float]:
    return lambda f: f.stats[name] * scale


GAUGES = (
    _Row(
        "num_requests_running",
        "Requests in the running batch.",
        _stat("running_requests"),
        ("vllm:num_requests_running", "sglang:num_running_reqs"),
    ),
    _Row(
        "num_requests_waiting",
        "Requests that wait to be started.",
        lambda f: f.stats["waiting_requests"] + f.stats["compiling_requests"],
        ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    ),
    _Row("num_requests_open", "Requests that have no end yet, wherever they are.", lambda f: f.engine.open_requests),
    _Row("num_tokens_waiting", "Prompt tokens of the waiting requests.", _stat("waiting_tokens")),
    _Row(
        "kv_cache_usage_perc",
        f"{_HELD} what running requests hold.",
        lambda f: f.used,
        ("vllm:kv_cache_usage_perc", "sglang:token_usage"),
    ),
    _Row("kv_cache_filled_perc", f"{_HELD} cached prefixes included.", lambda f: f.filled),
    _Row("kv_cache_pages", "Pages of the KV cache.", _stat("total_pages")),
    _Row(
        "kv_cache_tokens",
        "Tokens that the KV cache holds.",
        lambda f: f.stats["total_pages"] * f.config.engine.page_size,
        ("sglang:max_total_num_tokens",),
    ),
    _Row("http_connections", "Open connections.", lambda f: f.counts.connections()),
    _Row(
        "unread_bytes", "Of answers that wait to be complete, or for their clients to read on.", lambda f: f.engine.kept.bytes
    ),
)
COUNTERS = (
    _Row(
        "prefix_cache_queries",
        "Prompt tokens that were looked for in the cache.",
        _stat("prompt_tokens"),
        ("vllm:prefix_cache_queries",),
    ),
    _Row("prefix_cache_hits", "Prompt tokens that were found there.", _stat("cached_tokens"), ("vllm:prefix_cache_hits",)),
    _Row(
        "evicted_tokens",
        "Tokens of cached prefixes that made room for others.",
        lambda f: f.stats["evicted_pages"] * f.config.engine.page_size,
        ("sglang:evicted_tokens",),
    ),
    _Row("num_warmups", "Graphs captured and kernels compiled while a step waited for them.", _stat("warmups")),
    _Row(
        "num_preemptions",
        "Running requests that were retracted for want of memory.",
        _stat("retractions"),
        ("vllm:num_preemptions", "sglang:num_retracted_requests"),
    ),
    _Row("request_timeouts", "Requests that missed their deadline.", _stat("timeouts")),
    _Row("nan_requests", "Requests that ended because their logits were no finite numbers.", _stat("nan_requests")),
    _Row("engine_steps", "Steps of the engine.", _stat("steps")),
    _Row("engine_busy_seconds", "Time that the device computed steps.", _stat("busy_us", 1e-6)),
    _Row("engine_idle_seconds", "Time between steps that the device waited for the next.", _stat("idle_us", 1e-6)),
    _Row("prefill_tokens", "Prompt tokens that were computed.", _stat("prefill_tokens")),
    _Row("wasted_rows", "Tokens computed for requests that had already ended.", _stat("wasted_rows")),
    _Row(
        "prompt_tokens",
        "Tokens of the prompts of requests that got a first token.",
        lambda f: f.counts.prompt_tokens,
        ("vllm:prompt_tokens", "sglang:prompt_tokens"),
    ),
    _Row(
        "prompt_tokens_cached",
        "Of these, cached.",
        lambda f: f.counts.cached_tokens,
        ("vllm:prompt_tokens_cached",),
    ),
    _Row(
        "generation_tokens",
        "Tokens that were generated and delivered.",
        lambda f: f.counts.generation_tokens,
        ("vllm:generation_tokens", "sglang:generation_tokens"),
    ),
)


class _Bars(NamedTuple):
    """A histogram.  `bounds`: those of its aliases, where they have fewer."""

    name: str
    text: str
    of: Callable[[Metrics], Histogram]
    aliases: tuple[str, ...]
    bounds: tuple[float, ...] | None = None


_FROM = "From the arrival of a request to its"
HISTOGRAMS = (
    _Bars(
        "time_to_first_token_seconds",
        f"{_FROM} first token.",
        lambda m: m.ttft,
        ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
        TTFT,
    ),
    _Bars(
        "inter_token_latency_seconds",
        "Between the tokens of a request.",
        lambda m: m.itl,
        ("vllm:inter_token_latency_seconds",),
        ITL,
    ),
    _Bars(
        "request_time_per_output_token_seconds",
        "Of a request, the mean time of its tokens behind the first.",
        lambda m: m.tpot,
        ("vllm:request_time_per_output_token_seconds",),
        ITL,
    ),
    _Bars("e2e_request_latency_seconds", f"{_FROM} end.", lambda m: m.e2e, ("vllm:e2e_request_latency_seconds",), E2E),
    _Bars(
        "request_queue_time_seconds",
        "From the arrival of a request at the scheduler to its first step.",
        lambda m: m.queue,
        ("vllm:request_queue_time_seconds",),
        E2E,
    ),
    _Bars(
        "request_prefill_time_seconds",
        "From the first step of a request to its first token.",
        lambda m: m.prefill,
        ("vllm:request_prefill_time_seconds",),
        E2E,
    ),
    _Bars(
        "request_decode_time_seconds",
        "From the first token of a request to its last.",
        lambda m: m.decode,
        ("vllm:request_decode_time_seconds",),
        E2E,
    ),
    _Bars(
        "request_inference_time_seconds",
        "From the first step of a request to its last token.",
        lambda m: m.inference,
        ("vllm:request_inference_time_seconds",),
        E2E,
    ),
    _Bars("request_prompt_tokens", "Tokens of a request's prompt.", lambda m: m.prompts, ("vllm:request_prompt_tokens",)),
    _Bars(
        "request_generation_tokens", "Tokens of a request's answer.", lambda m: m.answers, ("vllm:request_generation_tokens",)
    ),
)


class Exposition:
    """The body of GET /metrics."""

    def __init__(self, engine: Metered) -> None:
        self._engine = engine

    async def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body and its content type: Prometheus' text format, or OpenMetrics where the Accept header asks for it.

        All numbers are of one moment; writing them down takes milliseconds, in which streams have their turns.
        """
        wanted = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
        # All names fit the oldest rules but for their colons, which the encoder would replace without this escaping.
        encode, _ = choose_encoder(f"{_OPEN}; version=1.0.0; escaping=allow-utf-8" if _OPEN in wanted else "")
        metrics, parts = list(self.collect()), list[bytes]()
        for at in range(0, len(metrics), _SLICE):
            parts.append(encode(_Slice(metrics[at : at + _SLICE])).removesuffix(_EOF))
            await asyncio.sleep(0)
        return (b"".join((*parts, _EOF)), _OPEN_METRICS) if _OPEN in wanted else (b"".join(parts), _TEXT)

    def collect(self) -> Iterator[Metric]:
        """The metrics as prometheus_client has them."""
        stats = defaultdict(int, self._engine.stats)
        facts = _Facts(stats, self._engine.metrics, self._engine, *kv_shares(stats))
        yield from _unlabelled(facts)
        yield from _labelled(facts)
        yield from _histograms(facts)
        yield from _infos(facts)
        yield from _processes(facts)


def _model(facts: _Facts, alias: str) -> dict[str, str]:
    """The labels of an alias."""
    name = {"model_name": served_names(facts.config)[0]}
    return name | {"engine": "0"} if alias.startswith("vllm:") else name


def _as(name: str) -> str:
    """The text about an alias."""
    return f"As minisgl_{name}."


def _family(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    text: str,
    samples: Sequence[tuple[Mapping[str, str], float]],
) -> Metric:
    """A metric with its samples, all of which have the same labels."""
    family = kind(name, text, labels=tuple(samples[0][0]) if samples else ())
    for labels, value in samples:
        family.add_metric(tuple(labels.values()), value)
    return family


def _unlabelled(facts: _Facts) -> Iterator[Metric]:
    for kind, rows in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, text, value, aliases in rows:
            found = value(facts)
            yield _family(kind, f"minisgl_{name}", text, [({}, found)])
            for alias in aliases:
                yield _family(kind, alias, _as(name), [(_model(facts, alias), found)])


def _labelled(facts: _Facts) -> Iterator[Metric]:
    stats, m, engine = facts.stats, facts.counts, facts.engine
    capacity = stats["waiting_requests"] - stats["following_requests"]
    waiting = {"capacity": capacity, "deferred": stats["compiling_requests"] + stats["following_requests"]}
    text = "Requests that wait for room (capacity), or for a grammar or a prefix that is being computed (deferred)."
    yield _by("reason", GaugeMetricFamily, "minisgl_num_requests_waiting_by_reason", text, waiting)
    alias, text = "vllm:num_requests_waiting_by_reason", _as("num_requests_waiting_by_reason")
    yield _by("reason", GaugeMetricFamily, alias, text, waiting, _model(facts, alias))
    finished = {end: m.finished[end] for end in (*ENDS, *m.finished)}
    yield _by("finished_reason", CounterMetricFamily, "minisgl_request_success", "Requests by how they ended.", finished)
    theirs: Counter[str] = Counter()
    for end, n in finished.items():
        theirs[_VLLM_ENDS.get(end, end)] += n
    alias = "vllm:request_success"
    yield _by("finished_reason", CounterMetricFamily, alias, _as("request_success"), theirs, _model(facts, alias))
    names = (*(name for name in m.processes.read() if name != "api"), *engine.restarts)
    restarts = {name: engine.restarts.get(name, 0) for name in names}
    text = "Processes that were started again, after a death or a hang."
    yield _by("process", CounterMetricFamily, "minisgl_restarts", text, restarts)
    missed = {n.removeprefix("missed_").removesuffix("_tokens"): v for n, v in stats.items() if n.startswith("missed_")}
    text = "Prompt tokens that were not cached, by why their prompt did not match further."
    yield _by("reason", CounterMetricFamily, "minisgl_prefix_cache_missed_tokens", text, missed)
    closed = {reason: m.closed[reason] for reason in (*CLOSED, *m.closed)}
    yield _by("reason", CounterMetricFamily, "minisgl_http_connections_closed", "Connections ended early.", closed)
    answers = [({"method": a, "route": b, "status": str(c)}, float(n)) for (a, b, c), n in m.responses.items()]
    yield _family(CounterMetricFamily, "minisgl_http_requests", "HTTP answers.", answers)
    if m.spans is not None:
        text = "Spans of requests, by what has become of them."
        yield _by("outcome", CounterMetricFamily, "minisgl_otel_spans", text, m.spans())


def _by(  # noqa: PLR0917
    label: str,
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    text: str,
    values: Mapping[str, float],
    more: Mapping[str, str] | None = None,
) -> Metric:
    return _family(kind, name, text, [({**(more or {}), label: key}, value) for key, value in values.items()])


@functools.lru_cache
def _written(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*map(floatToGoString, bounds), "+Inf")


def _histograms(facts: _Facts) -> Iterator[Metric]:
    for name, text, of, aliases, bounds in HISTOGRAMS:
        histogram = of(facts.counts)
        for each, about in ((f"minisgl_{name}", text), *((alias, _as(name)) for alias in aliases)):
            mine = each.startswith("minisgl_")
            shown = histogram.bounds if mine or bounds is None else bounds
            labels = {} if mine else _model(facts, each)
            buckets = zip(_written(shown), histogram.at_most(shown), strict=True)
            family = HistogramMetricFamily(each, about, labels=tuple(labels))
            family.add_metric(tuple(labels.values()), list(buckets), histogram.total)
            yield family


def _infos(facts: _Facts) -> Iterator[Metric]:
    """What does not change, as labels of a 1."""
    engine = facts.config.engine
    mine = {"version": __version__, "model": served_names(facts.config)[0], "device": engine.device, "tp": str(engine.tp)}
    yield _family(GaugeMetricFamily, "minisgl_engine_info", "What is served, and with what.", [(mine, 1)])
    cache = {
        "block_size": str(engine.page_size),
        "num_gpu_blocks": str(facts.stats["total_pages"]),
        "enable_prefix_caching": str(engine.cache != "none"),
        "cache_dtype": engine.kv_cache_dtype,
        "engine": "0",
    }
    if facts.stats["total_pages"]:
        yield _family(GaugeMetricFamily, "vllm:cache_config_info", "The KV cache, as vLLM names its settings.", [(cache, 1)])


def _processes(facts: _Facts) -> Iterator[Metric]:
    found = facts.counts.processes.read()
    for kind, name, text, of in (
        (CounterMetricFamily, "cpu_seconds", "Processor time that a process has taken.", "cpu_seconds"),
        (GaugeMetricFamily, "resident_memory_bytes", "Resident memory, with what is shared.", "memory"),
        (GaugeMetricFamily, "threads", "Threads of a process.", "threads"),
        (GaugeMetricFamily, "open_fds", "Open descriptors of a process.", "descriptors"),
    ):
        values = {process: value for process, (_, usage) in found.items() if (value := getattr(usage, of)) is not None}
        yield _by("process", kind, f"minisgl_process_{name}", text, values)
    ages = {name: process.beat_age for name, (process, _) in found.items() if process.beat_age is not None}
    text = "Time since the last sign of life of a process."
    yield _by("process", GaugeMetricFamily, "minisgl_process_heartbeat_age_seconds", text, ages)
