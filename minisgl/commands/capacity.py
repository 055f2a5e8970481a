"""`minisgl simulate TRACE --slo ...` plans capacity: replicas needed, hit rate by router, cost.  See docs/capacity.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.commands.fit.hardware import GPUS
from minisgl.errors import UserError
from minisgl.simulation import plan_plot
from minisgl.simulation.fleet import simulate
from minisgl.simulation.gpu import CostModel, Machine, Roofline
from minisgl.simulation.plan import Plan, Point, best_case, one_cache, parse_slo, point, search, table
from minisgl.simulation.router import ROUTERS
from minisgl.simulation.trace import TraceRequest, ideal_hits

DEFAULT_ROUTERS = "round-robin,least-loaded,cache-aware,prefix,exact"


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of a plan that are no numbers."""
    text = "find the replicas that meet it: ttft=500ms,itl=50ms,share=0.9; also gap=..., the longest time between two tokens"
    group.add_argument("--slo", metavar="LIST", help=text)
    group.add_argument("--routers", metavar="NAMES", help=f"of {', '.join(ROUTERS)} ({DEFAULT_ROUTERS})")
    text = "run the real step machine instead of its model at the level of requests: a hundred times as slow"
    group.add_argument("--step-level", action="store_true", help=text)


def check(args: argparse.Namespace) -> list[str]:
    """The routers to compare.  Raises UserError naming the flag."""
    names: list[str] = list(dict.fromkeys((DEFAULT_ROUTERS if args.routers is None else args.routers).split(",")))
    if unknown := [n for n in names if n not in ROUTERS]:
        raise UserError(f"--routers: unknown router {unknown[0]!r}; there are {', '.join(ROUTERS)}")
    if args.slo is None:
        flags = ("--price-per-hour", "--step-level", "--routers")
        for flag in flags:
            if getattr(args, flag[2:].replace("-", "_")):
                raise UserError(f"{flag} belongs to a capacity plan: give --slo, as in --slo ttft=500ms,itl=50ms,share=0.9")
        return names
    if args.router:
        raise UserError(f"--router {args.router} is that of one fleet: with --slo write --routers {args.router}")
    if args.compare:
        raise UserError("--compare runs policies of the scheduler on one fleet: use it without --slo")
    if args.itl_target_ms and not args.step_level:
        raise UserError("--itl-target-ms needs the real scheduler: add --step-level to --slo, or leave it at 0")
    if args.plot and not args.plot.endswith(".svg"):
        raise UserError(f"--plot {args.plot}: with --slo the picture is an SVG; name it FILE.svg")
    return names


def on_hardware(model: Roofline, name: str) -> Roofline:
    """The model on another GPU: the rates measured on an H200, in proportion to the data sheets.  Raises UserError."""
    if name not in GPUS:
        raise UserError(f"--hardware must be one of {', '.join(GPUS)}, got {name!r}")
    memory, flops = GPUS[name].bandwidth / GPUS["h200"].bandwidth, GPUS[name].flops / GPUS["h200"].flops
    m = model.machine
    machine = Machine(m.bandwidth * memory, m.kv_bandwidth * memory, m.flops * flops, m.attention_flops * flops)
    return Roofline(model.spec, machine)


def plan(args: argparse.Namespace, requests: list[TraceRequest], limits: SchedulerLimits, costs: CostModel) -> None:
    """Search for every router and print.  Raises UserError."""
    slo, start = parse_slo(args.slo), time.perf_counter()
    if not args.replicas and (best := best_case(requests, limits, costs, slo)) < slo.share:
        raise UserError(
            f"--slo {args.slo}: {best:.1%} of the requests can meet it, each alone on a GPU with everything before it cached; "
            "more replicas do not help: raise the times, lower the share, or choose a faster --hardware or a smaller model"
        )
    plans = []
    for router in check(args):

        def run(n: int, router: str = router) -> Point:
            done = simulate(
                requests,
                limits,
                costs,
                replicas=n,
                router=router,
                latency=args.latency_us * 1e-6,
                request_level=not args.step_level,
            )
            found = point(done, router, slo, args.price_per_hour)
            print(f"minisgl simulate: {router}, {n:,} replica(s): {found.goodput:.1%} within the SLO", file=sys.stderr)
            return found

        if args.replicas:
            plans.append(Plan(router, None, (run(args.replicas),), given=True))
        else:
            plans.append(search(router, run, slo.share, args.max_replicas))
    sizes = {p.replicas for found in plans for p in (found.points if args.plot else [found.shown])}
    shared = {n: one_cache(requests, limits, n) for n in sorted(sizes)}
    ideal = float(ideal_hits(requests, limits.page_size).sum()) / sum(r.input for r in requests)
    if args.plot:
        title = f"{args.trace.rpartition('/')[2]}, {args.kv_tokens:,} tokens of KV cache per replica"
        try:
            Path(args.plot).write_text(plan_plot.plot(plans, slo, shared, ideal, title), encoding="utf-8")
        except OSError as e:
            raise UserError(f"--plot {args.plot}: cannot be written ({e}).") from e
    if args.json:
        row = {"trace": args.trace, "slo": args.slo, "requests": len(requests), "ideal_hit_rate": ideal}
        routers = [found.json() | {"one_cache_hit_rate": shared[found.shown.replicas]} for found in plans]
        print(json.dumps(row | {"routers": routers, "wall_seconds": time.perf_counter() - start}))
    else:
        if not args.replicas:
            print(_answer(plans))
        print(table(plans, slo, shared, ideal))


def _answer(plans: list[Plan]) -> str:
    """The answer in a sentence."""
    able = [found for found in plans if found.needed]
    if not able:
        most = max(found.points[-1].replicas for found in plans)
        return f"no router meets the SLO with {most:,} replica(s) or fewer"
    best = min(able, key=lambda found: (found.needed or 0, -found.shown.hit_rate))
    return f"{best.needed:,} replica(s) behind {best.router} meet the SLO"
