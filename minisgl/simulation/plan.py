"""Capacity planning: how many replicas a trace needs to meet a service level objective (SLO), by router, and what that costs.

The SLO is on requests, as in DistServe (Zhong et al. 2024): the goodput is the share of the requests of the trace whose times
are all within it, and a number of replicas meets it if the goodput is at least `share`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.arrays import F64, I32
from minisgl.errors import UserError
from minisgl.simulation.fleet import Run
from minisgl.simulation.gpu import CostModel, Work
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, TraceRequest, ideal_hits

Mask = np.ndarray[Any, np.dtype[np.bool_]]
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds: `ttft` to the first token, `itl` the mean between a request's tokens, `gap` the longest; `share` of requests."""

    ttft: float = math.inf
    itl: float = math.inf
    gap: float = math.inf
    share: float = 0.9

    def __str__(self) -> str:
        times = [f"{f.name} <= {getattr(self, f.name) * 1e3:g} ms" for f in fields(self) if f.name != "share"]
        return ", ".join(t for t in times if "inf" not in t) + f" for {self.share:.4g} of the requests"


def parse_slo(text: str) -> Slo:
    """`ttft=500ms,itl=50ms,share=0.9`, with `us`, `ms` or `s`.  Raises UserError naming --slo."""
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        names = [f.name for f in fields(Slo)]
        if name not in names:
            raise UserError(f"--slo {text}: unknown part {name!r}; write ttft=500ms,itl=50ms,share=0.9 ({', '.join(names)})")
        if name in found:
            raise UserError(f"--slo {text}: {name} is there twice")
        number = value.rstrip("smu")
        unit = value[len(number) :]
        try:
            found[name] = float(number) * ({"": 1.0} if name == "share" else _UNITS)[unit]
        except (ValueError, KeyError):
            example = "0.9" if name == "share" else "500ms or 0.5s"
            raise UserError(f"--slo {text}: {name} must look like {example}, got {value!r}") from None
        if not 0 < found[name] < math.inf or (name == "share" and found[name] > 1):
            most = " and at most 1" if name == "share" else ""
            raise UserError(f"--slo {text}: {name} must be larger than 0{most}, got {value}")
    if not found.keys() & {"ttft", "itl", "gap"}:
        raise UserError(f"--slo {text}: name at least one time, as in ttft=500ms,itl=50ms,share=0.9")
    return Slo(**found)


# ---------------- one run against the objective
def _times(run: Run) -> dict[str, F64]:
    """Seconds by request; infinite for one that was refused."""
    log, served = run.log, run.log.tokens > 0
    ttft = np.where(served, log.first - log.arrival, np.inf)
    itl = np.where(served, (log.last - log.first) / np.maximum(log.tokens - 1, 1), np.inf)
    return {"ttft": ttft, "itl": itl, "gap": np.where(served, log.worst, np.inf)}


def within(run: Run, slo: Slo) -> Mask:
    """Which requests are within the SLO."""
    good: Mask = np.ones(len(run.inputs), np.bool_)
    for name, seconds in _times(run).items():
        good &= seconds <= getattr(slo, name)
    return good


@dataclass(frozen=True, slots=True)
class Point:
    """A number of replicas behind a router.  Times in milliseconds at the percentile of the SLO's share; rates as fractions."""

    router: str
    replicas: int
    goodput: float
    hit_rate: float
    ttft_ms: float
    itl_ms: float
    gap_ms: float
    gpu_busy: float
    busiest: float  # requests of the replica with the most, over the mean
    seconds: float  # from the first arrival to the last token
    tokens: int  # prompts and answers
    output_tokens: int
    cost_per_million: float | None = None  # tokens, prompts and answers
    cost_per_million_output: float | None = None


def point(run: Run, router: str, slo: Slo, price_per_hour: float = 0.0) -> Point:
    """What a run says, with the cost of its replicas from the first arrival to the last token."""
    log, served = run.log, run.log.tokens > 0
    n, prompts, answers = len(run.routed), int(run.inputs[served].sum()), int(log.tokens.sum())
    seconds = float(np.nanmax(log.last) - log.arrival.min()) if served.any() else 0.0
    at = {name: float(np.quantile(t, slo.share, method="inverted_cdf")) * 1e3 for name, t in _times(run).items()}
    cost = price_per_hour * n * seconds / 3600 * 1e6
    return Point(
        router=router,
        replicas=n,
        goodput=float(within(run, slo).mean()),
        hit_rate=float(log.cached[served].sum()) / max(1, prompts),
        ttft_ms=at["ttft"],
        itl_ms=at["itl"],
        gap_ms=at["gap"],
        gpu_busy=run.busy,
        busiest=max(run.routed) * n / max(1, sum(run.routed)),
        seconds=seconds,
        tokens=prompts + answers,
        output_tokens=answers,
        cost_per_million=cost / max(1, prompts + answers) if price_per_hour else None,
        cost_per_million_output=cost / max(1, answers) if price_per_hour else None,
    )


# ---------------- the search
@dataclass(frozen=True, slots=True)
class Plan:
    """`needed`: the smallest number of replicas that meets the SLO, None if none up to the limit does; `points` by replicas.

    `given`: the number was given, not searched for.
    """

    router: str
    needed: int | None
    points: tuple[Point, ...]
    given: bool = False

    @property
    def shown(self) -> Point:
        """The point of the answer; without one, the best that was tried."""
        if self.needed is None:
            return max(self.points, key=lambda p: (p.goodput, -p.replicas))
        return next(p for p in self.points if p.replicas == self.needed)

    def json(self) -> dict[str, Any]:
        """For --json."""
        return {"router": self.router, "needed": self.needed, **asdict(self.shown), "points": [asdict(p) for p in self.points]}


def search(router: str, run: Callable[[int], Point], share: float, most: int) -> Plan:
    """Find the smallest number of replicas with goodput `share`, up to `most`: doubling, then bisection.

    More replicas are taken to be no worse.  In any case the number found meets the objective and the one below it does not.
    """
    points: dict[int, Point] = {}

    def meets(n: int) -> bool:
        points[n] = run(n)
        return points[n].goodput >= share

    fails, n = 0, 1
    while not meets(n):
        if n >= most:
            return Plan(router, None, tuple(points[k] for k in sorted(points)))
        fails, n = n, min(2 * n, most)
    while n - fails > 1:
        middle = (n + fails) // 2
        fails, n = (fails, middle) if meets(middle) else (middle, n)
    return Plan(router, n, tuple(points[k] for k in sorted(points)))


# ---------------- what is possible at all
def best_case(requests: list[TraceRequest], limits: SchedulerLimits, costs: CostModel, slo: Slo) -> float:
    """The share of requests within the SLO if each had a replica for itself, and there an unbounded cache of all before it.

    No number of replicas has a larger goodput.
    """
    good = 0
    for request, hits in zip(requests, ideal_hits(requests, limits.page_size).tolist(), strict=True):
        at, ttft = hits, 0.0
        while at < request.input:
            n = min(limits.step_tokens, request.input - at)
            ends = at + n == request.input
            ttft += costs.seconds(Work(n, n * at + n * (n + 1) // 2, at + n, samples=int(ends)))
            at += n
        context = (request.input + 1, request.input + request.output - 1)  # of the first and the last decode step
        steps = [costs.seconds(Work(decode_rows=1, decode_context=c, samples=1)) for c in context]
        itl, gap = (steps[0], steps[1]) if request.output > 1 else (0.0, 0.0)
        room = min(limits.max_context, limits.kv_tokens)
        good += request.input + request.output <= room and ttft <= slo.ttft and itl <= slo.itl and gap <= slo.gap
    return good / len(requests)


def one_cache(requests: list[TraceRequest], limits: SchedulerLimits, replicas: int) -> float:
    """The hit rate of one cache as large as those of all replicas together, one request after the other, without time.

    It shares everything between all, so routing rarely finds more.  (LRU is not optimal: where prompts return in a cycle that
    is larger than the whole, parts can keep more than the whole.)
    """
    cache, size, total = limits.cache(limits.page_size), limits.page_size, limits.num_pages * replicas
    hits = prompts = named = 0
    for uid, request in enumerate(requests):
        if request.input + request.output > min(limits.max_context, limits.kv_tokens):
            continue
        ids: I32 = np.concatenate([request.ids(), np.full(request.output - 1, uid % FIRST_PROMPT_TOKEN, np.int32)])
        match = cache.match(ids[: request.input])
        hits, prompts = hits + match.num_pages * size, prompts + request.input
        handle, _ = cache.acquire(match)
        new = -(-len(ids) // size) - match.num_pages
        cache.evict(max(0, cache.num_pages + new - total))
        pages: I32 = np.arange(named, named + len(ids) // size - match.num_pages, dtype=np.int32)
        named += len(pages)
        handle, _, _ = cache.extend(handle, ids[match.num_pages * size : len(ids) // size * size], pages)
        cache.release(handle)
    return hits / max(1, prompts)


# ---------------- text
def table(plans: list[Plan], slo: Slo, shared: dict[int, float], ideal: float) -> str:
    """One row per router, as a Markdown table; `shared`: `one_cache` by number of replicas."""
    price = any(p.shown.cost_per_million is not None for p in plans)
    names = ["router", "replicas", "within SLO", f"TTFT p{slo.share * 100:g} ms", f"ITL p{slo.share * 100:g} ms", "hit rate"]
    names += ["one cache", "GPU busy", "busiest", *(["per M tokens", "per M output"] if price else [])]
    rows = [names]
    for plan in plans:
        p = plan.shown
        row = [
            plan.router,
            f"{p.replicas:,}" if plan.needed or plan.given else f"> {plan.points[-1].replicas:,}",
            f"{p.goodput:.1%}",
        ]
        row += [f"{p.ttft_ms:,.0f}", f"{p.itl_ms:,.1f}", f"{p.hit_rate:.1%}", f"{shared[p.replicas]:.1%}"]
        row += [f"{p.gpu_busy:.0%}", f"x {p.busiest:.2f}"]
        row += [f"{cost:,.3g}" for cost in (p.cost_per_million, p.cost_per_million_output) if cost is not None]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([f"SLO: {slo}; an unbounded cache finds {ideal:.1%}", *lines])
