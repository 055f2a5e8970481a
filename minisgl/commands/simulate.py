"""`python -m minisgl simulate TRACE` runs a trace through the real scheduler and cache, on a modelled GPU in virtual time."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time

from minisgl.actors.scheduler.interface import GPU_PROMPT_SECONDS, SchedulerLimits
from minisgl.cache.no_cache import CACHES
from minisgl.cache.radix import RadixCache
from minisgl.commands import capacity
from minisgl.commands.adjusted import Adjusted
from minisgl.commands.fit.hardware import GPUS
from minisgl.commands.parser import Parser
from minisgl.errors import UserError
from minisgl.simulation import plots
from minisgl.simulation.fleet import simulate
from minisgl.simulation.gpu import PRESETS, read_costs
from minisgl.simulation.policies import POLICIES
from minisgl.simulation.report import Summary, comparison, summarise, table
from minisgl.simulation.router import ROUTERS
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, load

_ROUTER = "prefix"
# Flags with a number: group, flag, metavar, default (which has the type), lowest, highest, help.
_NUMBERS: tuple[tuple[str, str, str, int | float, float, float, str], ...] = (
    ("trace", "--limit", "N", 0, 0, 1 << 31, "only the first N requests; 0: all"),
    ("trace", "--duration", "S", 0.0, 0, 1e9, "only the first S seconds of the trace; 0: all"),
    ("trace", "--scale", "X", 1.0, 1e-6, 1e6, "run the trace X times as fast (%(default)s); --rate-scale is the same"),
    ("GPU", "--latency-us", "US", 100.0, 0, 1e6, "a call of the scheduler (%(default)s)"),
    ("engine", "--kv-tokens", "TOKENS", 524_288, 1, 1 << 31, "KV cache per replica (%(default)s); --pool-tokens is the same"),
    ("engine", "--page-size", "TOKENS", 16, 1, 1024, "tokens per page (%(default)s)"),
    ("engine", "--max-running", "N", 256, 1, 65535, "slots per replica (%(default)s)"),
    ("engine", "--step-tokens", "TOKENS", 8192, 2, 1 << 20, "budget of a step (%(default)s)"),
    ("engine", "--max-context", "TOKENS", 0, 0, 1 << 31, "0: as the longest request needs"),
    ("engine", "--lag", "N", 2, 1, 8, "plans in flight (%(default)s)"),
    ("engine", "--itl-target-ms", "MS", 0.0, -1, 60_000, "0: off; -1: as the server does"),
    ("plan", "--max-replicas", "N", 1000, 1, 1000, "the largest number that --slo tries (%(default)s)"),
    ("plan", "--price-per-hour", "X", 0.0, 0, 1e6, "of a replica: prints the cost of a million tokens, in the same currency"),
)
_ALSO = {"--scale": "--rate-scale", "--kv-tokens": "--pool-tokens"}


def _parser() -> Parser:
    p = Parser(prog="minisgl simulate", description=(__doc__ or "").strip())
    p.add_argument("trace", metavar="TRACE", help="Mooncake .jsonl, Azure .csv, or synthetic:rate=4,input=100-1024,...")
    groups = {name: p.add_argument_group(name) for name in ("trace", "GPU", "engine", "fleet", "plan", "output")}
    for group, flag, metavar, default, _, _, text in _NUMBERS:
        names = [flag, *filter(None, [_ALSO.get(flag)])]
        groups[group].add_argument(*names, type=type(default), metavar=metavar, default=default, help=text)
    gpu, engine, fleet, out = groups["GPU"], groups["engine"], groups["fleet"], groups["output"]
    gpu.add_argument(
        "--gpu", metavar="PRESET", default="llama-3.1-8b", help=f"a model on one GPU: {', '.join(PRESETS)} (%(default)s)"
    )
    gpu.add_argument("--hardware", metavar="GPU", default="h200", help=f"that GPU: {', '.join(GPUS)} (%(default)s)")
    gpu.add_argument("--cost-json", metavar="FILE", help="fitted coefficients instead of a preset (scripts/tune/fit_costs.py)")
    text = f"{', '.join(CACHES)} or MODULE:CLASS, your own subclass of RadixCache (%(default)s)"
    engine.add_argument("--cache", metavar="NAME", default="radix", help=text)
    engine.add_argument("--order", choices=("prefix", "arrival"), default="prefix", help="which starts first (%(default)s)")
    fleet.add_argument(
        "--replicas", type=int, metavar="N", help="engines behind one router (1; with --slo: as many as it takes)"
    )
    fleet.add_argument("--router", choices=tuple(ROUTERS), help=f"({_ROUTER})")
    capacity.add_flags(groups["plan"])
    out.add_argument(
        "--compare", nargs="?", const="all", metavar="NAMES", help="run several policies; all, or names with commas"
    )
    out.add_argument("--json", action="store_true", help="one JSON line per run instead of the table")
    out.add_argument(
        "--plot", metavar="FILE", help="FILE.png: latencies, queue, KV cache, hit rate (needs matplotlib); with --slo FILE.svg"
    )
    return p


def _check(args: argparse.Namespace) -> None:
    for _, flag, _, _, low, high, _ in _NUMBERS:
        value = getattr(args, flag[2:].replace("-", "_"))
        if not low <= value <= high or not math.isfinite(value):
            raise UserError(f"{flag} must be between {low:g} and {high:g}, got {value:g}")
    if args.kv_tokens < args.page_size:
        raise UserError(f"--kv-tokens ({args.kv_tokens}) must hold at least a page of --page-size ({args.page_size})")
    if args.step_tokens <= args.max_running:
        raise UserError(f"--step-tokens ({args.step_tokens}) must be larger than --max-running ({args.max_running})")
    if args.gpu not in PRESETS:
        raise UserError(f"--gpu must be one of {', '.join(PRESETS)}, got {args.gpu!r}")
    if args.replicas is not None and not 1 <= args.replicas <= 1024:
        raise UserError(f"--replicas must be between 1 and 1024, got {args.replicas}")
    if args.cost_json and args.hardware != "h200":
        raise UserError("--hardware belongs to the presets of --gpu: fitted costs (--cost-json) are those of their own machine")
    if args.compare and args.plot:
        raise UserError("--plot draws one run: use it without --compare")


def _cache_class(name: str) -> type[RadixCache]:
    """The cache that --cache names: a built-in one, or CLASS of the Python module MODULE.  Raises UserError."""
    if name in CACHES:
        return CACHES[name]
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise UserError(f"--cache must be {', '.join(CACHES)} or MODULE:CLASS, got {name!r}")
    sys.path.insert(0, os.getcwd())  # the `minisgl` command does not look there
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as e:
        raise UserError(f"--cache {name}: {module} cannot be imported ({e}); is it in this folder or on PYTHONPATH?") from e
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(found, type) or not issubclass(found, RadixCache):
        raise UserError(f"--cache {name}: {attribute} of {module} is not a subclass of RadixCache")
    return found


def run(argv: list[str]) -> int:
    """Simulate and print.  Returns the exit code.  Raises UserError."""
    args = _parser().parse_args(argv)
    _check(args)
    capacity.check(args)
    if args.plot and not args.slo:
        plots.check()
    names = ["as given"]
    if args.compare:
        names = list(POLICIES) if args.compare == "all" else args.compare.split(",")
    if unknown := [n for n in names if n not in POLICIES]:
        raise UserError(f"--compare: unknown policy {unknown[0]!r}; there are {', '.join(POLICIES)}")
    costs = read_costs(args.cost_json) if args.cost_json else capacity.on_hardware(PRESETS[args.gpu], args.hardware)
    requests = load(args.trace, args.limit, args.scale, args.duration)
    limits = SchedulerLimits(
        slots=args.max_running,
        num_pages=args.kv_tokens // args.page_size,
        page_size=args.page_size,
        max_context=args.max_context or max(r.input + r.output for r in requests),
        step_tokens=args.step_tokens,
        max_steps_in_flight=args.lag,
        vocab_size=FIRST_PROMPT_TOKEN,
        cache=_cache_class(args.cache),
        itl_target=None if args.itl_target_ms < 0 else args.itl_target_ms / 1000,
        prompt_seconds=GPU_PROMPT_SECONDS,
        order=args.order,
    )
    if limits.kv_tokens != args.kv_tokens:
        whole = Adjusted("--kv-tokens", args.kv_tokens, limits.kv_tokens, f"in whole pages of {args.page_size} tokens")
        print(f"minisgl simulate: {whole}", file=sys.stderr)
    if args.slo is not None:
        capacity.plan(args, requests, limits, costs)
        return 0
    replicas = args.replicas or 1
    results: dict[str, Summary] = {}
    known: dict[SchedulerLimits, Summary] = {}  # policies that change nothing here need no run of their own
    for name in names:
        changed = POLICIES[name](limits)
        if changed not in known:
            start = time.perf_counter()
            router, latency = args.router or _ROUTER, args.latency_us * 1e-6
            done = simulate(requests, changed, costs, replicas=replicas, router=router, latency=latency)
            known[changed] = summarise(done) | {"wall_seconds": time.perf_counter() - start}
            if args.plot:
                gpu = args.cost_json or args.gpu
                plots.plot(done, args.plot, f"{args.trace.rpartition('/')[2]}, {replicas} x {gpu}")
        results[name] = known[changed]
        if args.json:
            print(json.dumps({"policy": name, "trace": args.trace, **results[name]}), flush=True)
    if not args.json:
        print(comparison(results) if args.compare else table(results["as given"]))
    return 0
