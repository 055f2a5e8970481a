"""Renders GET /metrics: the counts of metrics.py and the scheduler's statistics as Prometheus reads them.

Each fact has a name of ours (minisgl_...), and the names under which the boards and routers of other engines look for it, with
their labels and buckets.  A name whose value nobody here knows is left out.  Labels come from closed sets, never from a
request.  Runs in the api process, on its event loop; docs/metrics.md has the table.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString

from minisgl.api.cache_reasons import REASONS
from minisgl.api.http.metric_names import COUNTERS, GAUGES, HISTOGRAMS, Facts
from minisgl.api.http.metrics import Metered, kv_shares
from minisgl.api.requests.openai import served_names
from minisgl.version import __version__

ENDS = ("stop", "length", "abort", "timeout", "error")
CLOSED = ("refused", "room", "headers", "slow_reader", "memory")
_VLLM_ENDS = {"timeout": "error"}  # the others have the same name there
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPEN = "application/openmetrics-text"
_OPEN_METRICS = f"{_OPEN}; version=1.0.0; charset=utf-8"
_EOF, _SLICE = b"# EOF\n", 6  # metrics that are written down at a time


class _Slice(NamedTuple):
    """A part of a scrape, in the place of prometheus_client's registry."""

    metrics: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        return self.metrics


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
        facts = Facts(stats, self._engine.metrics, self._engine, *kv_shares(stats))
        yield from _unlabelled(facts)
        yield from _labelled(facts)
        yield from _histograms(facts)
        yield from _infos(facts)
        yield from _processes(facts)


def _model(facts: Facts, alias: str) -> dict[str, str]:
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


def _unlabelled(facts: Facts) -> Iterator[Metric]:
    for kind, rows in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, text, value, aliases in rows:
            found = value(facts)
            yield _family(kind, f"minisgl_{name}", text, [({}, found)])
            for alias in aliases:
                yield _family(kind, alias, _as(name), [(_model(facts, alias), found)])


def _labelled(facts: Facts) -> Iterator[Metric]:
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
    reasons = engine.cache_reasons
    for name, text, counts in (
        ("misses", "Requests by why no more of their prompt was cached.", reasons.requests),
        ("missed_tokens", "Their prompt tokens that were not cached.", reasons.tokens),
    ):
        by = {reason: counts[reason] for reason in REASONS}
        yield _by("reason", CounterMetricFamily, f"minisgl_prefix_cache_{name}", text, by)
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


def _histograms(facts: Facts) -> Iterator[Metric]:
    for name, text, of, aliases in HISTOGRAMS:
        histogram = of(facts.counts)
        for each, about in ((f"minisgl_{name}", text), *((alias, _as(name)) for alias in aliases)):
            mine = each.startswith("minisgl_")
            shown = aliases.get(each) or histogram.bounds
            labels = {} if mine else _model(facts, each)
            buckets = zip(_written(shown), histogram.at_most(shown), strict=True)
            family = HistogramMetricFamily(each, about, labels=tuple(labels))
            family.add_metric(tuple(labels.values()), list(buckets), histogram.total)
            yield family


def _infos(facts: Facts) -> Iterator[Metric]:
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


def _processes(facts: Facts) -> Iterator[Metric]:
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
