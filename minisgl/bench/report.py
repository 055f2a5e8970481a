"""What the runs say: differences to the base with their intervals, points of a sweep, as tables and as plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from minisgl.bench.intervals import CONFIDENCE, Difference, base_to_base, difference, means
from minisgl.bench.replay import Run

_LATE_MS = 20.0  # a request sent later than that makes the figures doubtful


class Metric(NamedTuple):
    """A figure of a run: its key in `figures` of outcomes.py, its title, its format, and whether more is better."""

    key: str
    title: str
    digits: str
    more: bool


METRICS = (
    Metric("tok_s", "tok/s", ",.0f", True),
    Metric("ttft_ms", "TTFT ms", ",.0f", False),
    Metric("tpot_ms", "ITL ms", ",.2f", False),
    Metric("itl_p99_ms", "ITL p99 ms", ",.1f", False),
)
PER_USER = Metric("tok_s_user", "tok/s per user", ",.1f", True)

METHOD = (
    f"Differences to the mean of the base runs before and after, with {CONFIDENCE:.0%} intervals (Student's t over the "
    "logarithms of runs; noise from neighbouring base runs, pooled with the variant's repeats). ≈: the interval contains 0, "
    "the difference may be noise; of twenty such intervals one misses. base: ± the largest step from one base run to the next. "
    "TTFT: mean time to the first token, queue included; ITL: mean time per later token; ITL p99: of all pauses. Without "
    "noise: cached share of the prompt tokens, prompt tokens computed, steps. idle: share of the workers' time without a plan. "
    "same: answers that are those of the first base run, token for token."
)


# ---------------- ablations
@dataclass(slots=True)
class Row:
    """A variant, or the base: figures by metric (geometric mean of its runs), differences, and what explains them."""

    name: str
    values: dict[str, float]
    differences: dict[str, Difference]
    noise: dict[str, float]  # of the base alone: the largest factor between neighbours
    cached: float
    computed: float  # prompt tokens of a run
    steps: float  # of a run
    idle: float | None
    same: float
    repeats: int


def rows(runs: Sequence[Run]) -> list[Row]:
    """The base and then each variant, from runs in the order in which they ran; base runs are named "base"."""
    bases = [run for run in runs if run.name == "base"]
    first = [s.ids for s in bases[0].streams]
    keys = [m.key for m in METRICS if all(m.key in run.figures for run in runs)]
    of_base = {key: [run.figures[key] for run in bases] for key in keys}
    found = [_row(bases, first, keys)]
    found[0].noise = {key: base_to_base(of_base[key]) for key in keys}
    for name in dict.fromkeys(run.name for run in runs if run.name != "base"):
        mine = [(i, run) for i, run in enumerate(runs) if run.name == name]
        before = [sum(run.name == "base" for run in runs[:i]) - 1 for i, _ in mine]
        row = _row([run for _, run in mine], first, keys)
        row.differences = {key: difference(of_base[key], [run.figures[key] for _, run in mine], before) for key in keys}
        found.append(row)
    return found


def _row(runs: Sequence[Run], first: Sequence[list[int]], keys: Sequence[str]) -> Row:
    same = sum(s.ids == ids for run in runs for s, ids in zip(run.streams, first, strict=True))
    idle = [run.idle for run in runs if run.idle is not None]
    return Row(
        runs[0].name,
        {key: math.exp(sum(math.log(run.figures[key]) for run in runs) / len(runs)) for key in keys},
        {},
        {},
        sum(run.cached for run in runs) / len(runs),
        sum(run.counters.get("prefill_tokens", 0) for run in runs) / len(runs),
        sum(run.counters.get("steps", 0) for run in runs) / len(runs),
        sum(idle) / len(idle) if idle else None,
        same / (len(runs) * len(first)),
        len(runs),
    )


def percent(factor: float) -> str:
    """A factor as a difference in percent; one above ten as it is."""
    return f"{(factor - 1) * 100:+.1f} %" if factor < 10 else f"x {factor:,.0f}"


def ablation_table(found: Sequence[Row]) -> str:
    """Base and variants as a Markdown table."""
    metrics = [m for m in METRICS if m.key in found[0].values]
    head = ["", *(m.title for m in metrics), "cached", "computed", "steps", "idle", "same"]
    body = [
        [
            row.name,
            *(_cell(row, m) for m in metrics),
            f"{row.cached:.1%}",
            f"{row.computed:,.0f}",
            f"{row.steps:,.0f}",
            "-" if row.idle is None else f"{row.idle:.1%}",
            f"{row.same:.0%}",
        ]
        for row in found
    ]
    return markdown([head, *body])


def _cell(row: Row, m: Metric) -> str:
    value = format(row.values[m.key], m.digits)
    if m.key in row.noise:
        return f"{value} (± {percent(row.noise[m.key]).lstrip('+')})"
    d = row.differences[m.key]
    mark = "≈ " if d.is_noise else ""
    return f"{value} ({mark}{percent(d.factor)}, {percent(d.low).removesuffix(' %')} to {percent(d.high).removesuffix(' %')})"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the head first, as an aligned Markdown table."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    out.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(out)


# ---------------- sweeps
@dataclass(slots=True)
class Point:
    """A value of a sweep in one series: figures with (mean, low, high), and whether no other point of its series beats it."""

    series: str
    value: str
    figures: dict[str, tuple[float, float, float]]
    best: bool = False


def points(runs: Sequence[Run], labels: Mapping[str, tuple[str, str]]) -> list[Point]:
    """The points of a sweep.  `labels`: name of a run -> (series, value)."""
    metrics = [m for m in (*METRICS, PER_USER) if all(m.key in run.figures for run in runs)]
    groups = {name: [run for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)}
    columns = {m.key: means([[run.figures[m.key] for run in group] for group in groups.values()]) for m in metrics}
    found = [Point(*labels[name], {key: column[i] for key, column in columns.items()}) for i, name in enumerate(groups)]
    for point in found:
        point.best = not any(_beats(other, point) for other in found if other.series == point.series)
    return found


def _beats(a: Point, b: Point) -> bool:
    """Whether `a` is at least as good in throughput and speed per user, and better in one."""
    keys = ("tok_s", "tok_s_user")
    if not all(key in a.figures and key in b.figures for key in keys):
        return a.figures["tok_s"][0] > b.figures["tok_s"][0]
    pairs = [(a.figures[key][0], b.figures[key][0]) for key in keys]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def sweep_table(name: str, found: Sequence[Point]) -> str:
    """The points as a Markdown table."""
    metrics = [m for m in (METRICS[0], PER_USER, *METRICS[1:]) if m.key in found[0].figures]
    head = ["", name, *(m.title for m in metrics), "Pareto"]
    body = [[p.series, p.value, *(_range(p.figures[m.key], m.digits) for m in metrics), "yes" if p.best else ""] for p in found]
    return markdown([head, *body])


def _range(figure: tuple[float, float, float], digits: str) -> str:
    mean, low, high = figure
    return format(mean, digits) + ("" if math.isnan(low) else f" ({format(low, digits)} to {format(high, digits)})")


# ---------------- notes and data
def notes(runs: Sequence[Run], online: bool) -> list[str]:
    """What makes figures doubtful."""
    found = []
    for run in runs:
        if failed := [s.error for s in run.streams if s.error]:
            found.append(f"{run.name}: {len(failed)} of {len(run.streams)} requests have no answer ({failed[0]})")
        if run.restarts:
            found.append(f"{run.name}: {run.restarts} processes were started again, the figures are void")
        if warmups := run.counters.get("warmups", 0):
            found.append(f"{run.name}: {warmups} steps waited for a graph or a kernel; a larger --settle lets it come before")
        late = max(s.late for s in run.streams) * 1e3
        if online and late > _LATE_MS:
            found.append(f"{run.name}: requests were sent up to {late:.0f} ms late, this process had too little of a core")
    return list(dict.fromkeys(found))


def run_data(run: Run) -> dict[str, Any]:
    """One run for JSON, with a figure for each request."""
    done = [s for s in run.streams if s.answered]
    return {
        "name": run.name,
        "seconds": run.seconds,
        "ready_s": run.ready,
        "restarts": run.restarts,
        "figures": run.figures,
        "cached": run.cached,
        "idle": run.idle,
        "counters": run.counters,
        "errors": [s.error for s in run.streams if s.error],
        "ttft_ms": [round(s.ttft * 1e3, 3) for s in done],
        "tpot_ms": [round(s.tpot * 1e3, 4) for s in done],
    }


def row_data(row: Row) -> dict[str, Any]:
    """One row for JSON."""
    return {
        "name": row.name,
        "repeats": row.repeats,
        "values": row.values,
        "differences": {k: {**d._asdict(), "is_noise": d.is_noise} for k, d in row.differences.items()},
        "base_to_base": row.noise,
        "cached": row.cached,
        "prefill_tokens": row.computed,
        "steps": row.steps,
        "idle": row.idle,
        "same_answers": row.same,
    }


def point_data(point: Point) -> dict[str, Any]:
    """One point for JSON; without repeats there is no interval."""
    figures = {
        k: {"mean": m, **({} if math.isnan(low) else {"low": low, "high": high})} for k, (m, low, high) in point.figures.items()
    }
    return {"series": point.series, "value": point.value, "figures": figures, "pareto": point.best}
