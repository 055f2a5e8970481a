"""`python -m minisgl simulate TRACE`: the real scheduler and prefix cache under virtual time, before a modelled GPU."""

from __future__ import annotations

import argparse
import json
import math
import time

from minisgl.errors import UserError

_PRESETS = ("qwen3-0.6b", "qwen3-8b", "qwen3-14b", "llama-3.1-8b")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="minisgl simulate", description=(__doc__ or "").strip())
    p.add_argument("trace", metavar="TRACE", help="Mooncake .jsonl, Azure .csv, or synthetic:rate=4,input=100-1024,...")
    p.add_argument("--limit", type=int, metavar="N", default=0, help="only the first N requests; 0: all")
    p.add_argument("--duration", type=float, metavar="S", default=0.0, help="only the first S seconds of the trace; 0: all")
    p.add_argument("--scale", type=float, metavar="X", default=1.0, help="run the trace X times as fast (%(default)s)")
    gpu = p.add_argument_group("GPU")
    gpu.add_argument(
        "--gpu", metavar="PRESET", default="llama-3.1-8b", help=f"on one H200: {', '.join(_PRESETS)} (%(default)s)"
    )
    gpu.add_argument("--cost-json", metavar="FILE", help="fitted coefficients instead of a preset (scripts/tune/fit_costs.py)")
    gpu.add_argument("--latency-us", type=float, metavar="US", default=100.0, help="a call of the scheduler (%(default)s)")
    engine = p.add_argument_group("engine")
    engine.add_argument("--kv-tokens", type=int, metavar="TOKENS", default=524_288, help="KV cache per replica (%(default)s)")
    engine.add_argument("--page-size", type=int, metavar="TOKENS", default=16, help="tokens per page (%(default)s)")
    engine.add_argument("--max-running", type=int, metavar="N", default=256, help="slots per replica (%(default)s)")
    engine.add_argument("--step-tokens", type=int, metavar="TOKENS", default=8192, help="budget of a step (%(default)s)")
    engine.add_argument("--max-context", type=int, metavar="TOKENS", default=0, help="0: as the longest request needs")
    engine.add_argument("--lag", type=int, metavar="N", default=2, help="plans in flight (%(default)s)")
    engine.add_argument("--cache", choices=("radix", "none"), default="radix", help="prefix cache (%(default)s)")
    engine.add_argument("--order", choices=("prefix", "arrival"), default="prefix", help="who starts first (%(default)s)")
    engine.add_argument("--itl-target-ms", type=float, metavar="MS", default=0.0, help="0: off")
    fleet = p.add_argument_group("fleet")
    fleet.add_argument("--replicas", type=int, metavar="N", default=1, help="engines behind one router (%(default)s)")
    fleet.add_argument("--router", choices=("prefix", "round-robin"), default="prefix", help="(%(default)s)")
    out = p.add_argument_group("output")
    out.add_argument(
        "--compare", nargs="?", const="all", metavar="NAMES", help="run several policies; all, or names with commas"
    )
    out.add_argument("--json", action="store_true", help="one JSON line per run instead of the table")
    out.add_argument("--plot", metavar="FILE.png", help="draw latencies, queue, KV cache and hit rate (needs matplotlib)")
    return p


def _check(args: argparse.Namespace) -> None:
    for flag, value, low, high in (
        ("--limit", args.limit, 0, 1 << 31),
        ("--duration", args.duration, 0, 1e9),
        ("--scale", args.scale, 1e-6, 1e6),
        ("--latency-us", args.latency_us, 0, 1e6),
        ("--page-size", args.page_size, 1, 1024),
        ("--kv-tokens", args.kv_tokens, args.page_size, 1 << 31),
        ("--max-running", args.max_running, 1, 65535),
        ("--step-tokens", args.step_tokens, 2, 1 << 20),
        ("--max-context", args.max_context, 0, 1 << 31),
        ("--lag", args.lag, 1, 8),
        ("--itl-target-ms", args.itl_target_ms, 0, 60_000),
        ("--replicas", args.replicas, 1, 1024),
    ):
        if not low <= value <= high or not math.isfinite(value):
            raise UserError(f"{flag} must be between {low:g} and {high:g}, got {value:g}")
    if args.step_tokens <= args.max_running:
        raise UserError(f"--step-tokens ({args.step_tokens}) must be larger than --max-running ({args.max_running})")
    if args.gpu not in _PRESETS:
        raise UserError(f"--gpu must be one of {', '.join(_PRESETS)}, got {args.gpu!r}")
    if args.compare and args.plot:
        raise UserError("--plot draws one run: use it without --compare")


def run(argv: list[str]) -> int:
    """Simulate and print.  Returns the exit code.  Raises UserError."""
    args = _parser().parse_args(argv)
    _check(args)
    from minisgl.actors.scheduler.interface import SchedulerLimits
    from minisgl.simulation import plots
    from minisgl.simulation.fleet import simulate
    from minisgl.simulation.gpu import PRESETS, read_costs
    from minisgl.simulation.policies import POLICIES
    from minisgl.simulation.report import Summary, comparison, summarise, table
    from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, load

    if args.plot:
        plots.check()
    names = ["as given"]
    if args.compare:
        names = list(POLICIES) if args.compare == "all" else args.compare.split(",")
    if unknown := [n for n in names if n not in POLICIES]:
        raise UserError(f"--compare: unknown policy {unknown[0]!r}; there are {', '.join(POLICIES)}")
    costs = read_costs(args.cost_json) if args.cost_json else PRESETS[args.gpu]
    requests = load(args.trace, args.limit, args.scale, args.duration)
    limits = SchedulerLimits(
        slots=args.max_running,
        num_pages=args.kv_tokens // args.page_size,
        page_size=args.page_size,
        max_context=args.max_context or max(r.input + r.output for r in requests),
        step_tokens=args.step_tokens,
        max_steps_in_flight=args.lag,
        vocab_size=FIRST_PROMPT_TOKEN,
        cache=args.cache,
        itl_target=args.itl_target_ms / 1000,
        order=args.order,
    )
    results: dict[str, Summary] = {}
    known: dict[SchedulerLimits, Summary] = {}  # policies that change nothing here need no run of their own
    for name in names:
        changed = POLICIES[name](limits)
        if changed not in known:
            start = time.perf_counter()
            done = simulate(
                requests, changed, costs, replicas=args.replicas, router=args.router, latency=args.latency_us * 1e-6
            )
            known[changed] = summarise(done) | {"wall_seconds": time.perf_counter() - start}
            if args.plot:
                gpu = args.cost_json or args.gpu
                plots.plot(done, args.plot, f"{args.trace.rpartition('/')[2]}, {args.replicas} x {gpu}")
        results[name] = known[changed]
        if args.json:
            print(json.dumps({"policy": name, "trace": args.trace, **results[name]}), flush=True)
    if not args.json:
        print(comparison(results) if args.compare else table(results["as given"]))
    return 0
