"""Reports: sums a run up in one flat dictionary (the JSON line), and prints tables of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minisgl.arrays import F64
from minisgl.simulation.fleet import Run
from minisgl.simulation.replica import Replica

Summary = dict[str, Any]
_STATISTICS = ("mean", "p50", "p90", "p99", "max")


def gaps(run: Run) -> F64:
    """Every inter-token gap of a run, in seconds."""
    return np.concatenate(run.log.gaps) if run.log.gaps else np.zeros(0)


def ttft(run: Run) -> F64:
    """Time to first token of every request that was served, in seconds."""
    times: F64 = (run.log.first - run.log.arrival)[run.log.tokens > 0]
    return times


def summarise(run: Run) -> Summary:
    """All metrics.  Times in seconds (`_ms` in milliseconds), rates per virtual second, `hit_rate` and others as fractions."""
    log, machines = run.log, [r.machine for r in run.replicas]
    counters = [m.counters for m in machines]
    served = log.tokens > 0
    seconds = float(np.nanmax(log.last) - log.arrival.min()) if served.any() else 0.0
    prompt = int(run.inputs[served].sum())
    misses: Counter[str] = Counter()
    for c in counters:
        misses.update(c.misses)
    return {
        "requests": int(served.sum()),
        "refused": len(run.refused),
        "replicas": len(run.replicas),
        "seconds": seconds,
        "output_tokens": int(log.tokens.sum()),
        "prompt_tokens": prompt,
        "output_tok_s": _ratio(float(log.tokens.sum()), seconds),
        "prompt_tok_s": _ratio(prompt, seconds),
        **_spread("ttft_ms", ttft(run)),
        **_spread("itl_ms", gaps(run)),
        **_levels("queue", run.replicas, "waiting", 1),
        **_levels("running", run.replicas, "running", 1),
        **_levels("kv_active", run.replicas, "active", run.limits.num_pages),
        **_levels("kv_used", run.replicas, "used", run.limits.num_pages),
        "hit_rate": _ratio(float(log.cached[served].sum()), prompt),
        "ideal_hit_rate": _ratio(float(run.ideal.sum()), float(run.inputs.sum())),
        "missed_tokens": dict(sorted(misses.items())),
        "retractions": sum(c.retractions for c in counters),
        "evicted_pages": sum(m.cache.evicted_pages for m in machines),
        "wasted_rows": sum(c.wasted_rows for c in counters),
        "starved_steps": max(r.starved for r in run.replicas),
        "steps": sum(c.steps for c in counters),
        "gpu_busy": _ratio(sum(r.busy for r in run.replicas), seconds * len(run.replicas)),
        "requests_per_replica": [r.requests for r in run.replicas],
        "hit_rate_per_replica": [_ratio(c.cached_tokens, c.prompt_tokens) for c in counters],
    }


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _spread(name: str, values: F64) -> dict[str, float]:
    """Mean and percentiles of `values` in seconds, as milliseconds."""
    values = values if len(values) else np.zeros(1)
    numbers = (values.mean(), *np.percentile(values, (50, 90, 99)), values.max())
    return {f"{name}_{key}": float(value) * 1e3 for key, value in zip(_STATISTICS, numbers, strict=True)}


def _levels(name: str, replicas: Sequence[Replica], column: str, total: int) -> dict[str, float]:
    """Mean over time and maximum of a column of the steps, over all replicas, as a share of `total`."""
    area, duration, top = 0.0, 0.0, 0.0
    for replica in replicas:
        time, values = np.array(replica.steps["time"]), np.array(replica.steps[column])
        if len(time):
            area += float((values[:-1] * np.diff(time)).sum())
            duration += float(time[-1] - time[0])
            top = max(top, float(values.max()))
    return {f"{name}_mean": _ratio(area, duration) / total, f"{name}_max": top / total}


# ---------------- tables
def table(s: Summary) -> str:
    """One run, as lines of text."""
    rows = [
        ("requests", f"{s['requests']:,} served, {s['refused']:,} refused (too long), {s['replicas']} replica(s)"),
        ("tokens", f"{s['prompt_tokens']:,} prompt, {s['output_tokens']:,} output, in {s['seconds']:,.1f} s"),
        ("throughput", f"{s['output_tok_s']:,.0f} output tok/s, {s['prompt_tok_s']:,.0f} prompt tok/s"),
        ("TTFT ms", _five(s, "ttft_ms")),
        ("ITL ms", _five(s, "itl_ms")),
        ("queue", f"mean {s['queue_mean']:,.1f}, max {s['queue_max']:,.0f}"),
        ("running", f"mean {s['running_mean']:,.1f}, max {s['running_max']:,.0f}"),
        ("KV, running", f"mean {s['kv_active_mean']:.1%}, max {s['kv_active_max']:.1%}"),
        ("KV, with cache", f"mean {s['kv_used_mean']:.1%}, max {s['kv_used_max']:.1%}"),
        ("hit rate", f"{s['hit_rate']:.2%} of prompt tokens; unbounded cache {s['ideal_hit_rate']:.2%}"),
        ("missed tokens", ", ".join(f"{k} {v:,}" for k, v in s["missed_tokens"].items()) or "none"),
        ("retractions", f"{s['retractions']:,}"),
        ("evicted pages", f"{s['evicted_pages']:,}"),
        ("wasted rows", f"{s['wasted_rows']:,}"),
        ("starved", f"at most {s['starved_steps']} steps in a row without a token for a running decode"),
        ("steps", f"{s['steps']:,}, GPU busy {s['gpu_busy']:.1%}"),
    ]
    if s["replicas"] > 1:
        shares = zip(s["requests_per_replica"], s["hit_rate_per_replica"], strict=True)
        rows.append(("per replica", ", ".join(f"{n:,} ({hit:.1%} hits)" for n, hit in shares)))
    return "\n".join(f"{name:<15} {text}" for name, text in rows)


def _five(s: Summary, name: str) -> str:
    return ", ".join(f"{key} {s[f'{name}_{key}']:,.1f}" for key in _STATISTICS)


_COLUMNS = (
    ("TTFT p50 ms", "ttft_ms_p50", ",.0f"),
    ("TTFT p99 ms", "ttft_ms_p99", ",.0f"),
    ("ITL mean ms", "itl_ms_mean", ",.1f"),
    ("ITL p99 ms", "itl_ms_p99", ",.1f"),
    ("ITL max ms", "itl_ms_max", ",.0f"),
    ("tok/s", "output_tok_s", ",.0f"),
    ("GPU busy", "gpu_busy", ".1%"),
    ("hit rate", "hit_rate", ".1%"),
    ("queue max", "queue_max", ",.0f"),
    ("retractions", "retractions", ",d"),
)


def comparison(results: dict[str, Summary]) -> str:
    """One row per policy, as a Markdown table."""
    head = ["policy", *(title for title, _, _ in _COLUMNS)]
    body = [[name, *(format(s[key], how) for _, key, how in _COLUMNS)] for name, s in results.items()]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *body]]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
