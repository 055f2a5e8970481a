"""Runs `python -m minisgl bench`: what each optimisation buys, or what a setting trades, on the same requests.

    minisgl bench --offline --ablate overlap,radix,chunked       base, variant, base, variant, ..., base: a table of differences
    minisgl bench --online 4 --sweep step_tokens=128,256,512     throughput against latency, a point for each value

Every run starts an engine of its own, warms it up and empties its prefix cache, so that none profits from the one before.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minisgl.bench import report, svg
from minisgl.bench.ablations import ABLATIONS, Setup, changed, variants
from minisgl.bench.provenance import line, provenance
from minisgl.bench.replay import Progress, Run, measure
from minisgl.bench.workload import ON_CPU, ON_GPU, Workload, jobs_of
from minisgl.commands.flags import add_engine_flags, model_of
from minisgl.commands.parser import Parser
from minisgl.config import AUTO_ITL, Config, ModelSpec, engine_config
from minisgl.errors import UserError
from minisgl.simulation.trace import load

_GPU_SETTLE = 10.0  # seconds
_OF_REQUESTS = ("concurrency", "rate")  # what a sweep may change beside the settings of the engine


class Planned(NamedTuple):
    """A run to be done."""

    name: str
    setup: Setup
    work: Workload


def _parser() -> Parser:
    p = Parser(
        engine=True,
        prog="minisgl bench",
        description="Measure what each optimisation of the engine buys (--ablate), or what a setting trades (--sweep), without "
        "HTTP.  The flags of the engine describe the base.",
        epilog="Ablations: " + "; ".join(f"{name}: without {a.term}, {a.off}" for name, a in ABLATIONS.items()),
    )
    load_group = p.add_argument_group("requests")
    one = load_group.add_mutually_exclusive_group()
    one.add_argument("--offline", action="store_true", help="all requests at once (the default)")
    one.add_argument("--online", type=float, metavar="RATE", help="requests at random times, RATE a second")
    one.add_argument("--trace", metavar="FILE", help="Mooncake .jsonl, Azure .csv or synthetic:..., at its times")
    text = f"of --offline and --online: n, input, output, shared, groups, seed (on a CPU {ON_CPU}; on a GPU {ON_GPU})"
    load_group.add_argument("--requests", default="", metavar="KEY=VALUE,...", help=text)
    load_group.add_argument("--concurrency", type=int, default=0, metavar="N", help="at most N open at a time; 0: no bound")
    load_group.add_argument("--limit", type=int, default=0, metavar="N", help="the first N requests of --trace; 0: all")
    load_group.add_argument("--scale", type=float, default=1.0, metavar="X", help="--trace X times as fast (%(default)s)")
    what = p.add_argument_group("measurement")
    names = ",".join(ABLATIONS)
    what.add_argument("--ablate", metavar="NAMES", help=f"{names}; or setting=value; a+b for both at once; all")
    what.add_argument("--sweep", metavar="NAME=V1,V2,...", help="a setting of the engine, concurrency, or the rate of --online")
    what.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each variant or point (%(default)s)")
    what.add_argument(
        "--settle",
        type=float,
        metavar="S",
        help=f"seconds for graphs to be captured before a run (0, on a GPU {_GPU_SETTLE:g})",
    )
    what.add_argument("--json", metavar="FILE", help="write every run with every request's latencies")
    what.add_argument("--plot", metavar="FILE.svg", help="draw the table")
    add_engine_flags(p)
    return p


def run(argv: list[str]) -> int:
    """Measure, print, write.  Returns 0, or 1 if some requests had no answer.  Raises UserError."""
    args = _parser().parse_args(argv)
    _check(args)
    from minisgl.model.checkpoint.resolve import resolve
    from minisgl.model.common.shard import check_tp

    spec = resolve(model_of(args), args.revision)
    online = args.online is not None or args.trace is not None
    given = vars(args)
    if online and args.itl_target_ms is None:
        given = given | {"itl_target_ms": AUTO_ITL}  # as the server has it
    config = Config(spec, engine_config(given))
    check_tp(spec, config.engine.tp)
    work, left_out = _workload(args, config)
    base = Setup(config.engine, work.longest, spec.format == "fake")
    if args.settle is None:
        args.settle = _GPU_SETTLE if config.engine.device == "cuda" and not base.fake else 0.0
    planned, labels, found = _plan(args, config, base, work)
    for p in planned:
        if engine_config(p.setup.settings) != p.setup.engine:
            raise UserError(f"{p.name}: MINISGL_DISABLE_OVERLAP_SCHEDULING holds --lag at 1; unset it")
    about = provenance()
    print(f"{line(about)}\n{spec.name} on {config.engine.device} {base.changed}".rstrip())
    tokens = sum(len(job.prompt) for job in work.jobs), sum(job.output for job in work.jobs)
    print(f"{work.name}: {len(work.jobs)} requests, {tokens[0]:,} + {tokens[1]:,} tokens; {len(planned)} runs\n", flush=True)
    runs, failed = _execute(spec, planned, args.settle)
    found += left_out + [f"{name}: left out, {why}" for name, why in failed.items()] + report.notes(runs, online)
    command = "minisgl bench " + shlex.join(argv)
    data: dict[str, Any] = {"command": command, "provenance": about, "model": spec.name, "base": base.settings}
    data |= {"requests": work.name, "notes": found}
    title = f"{spec.name} on {config.engine.device}, {work.name}"
    if args.sweep:
        points, name = report.points(runs, labels), args.sweep.partition("=")[0]
        print(report.sweep_table(name, points))
        data["points"] = list(map(report.point_data, points))
        picture = svg.sweep(name, points, title)
    else:
        rows = report.rows(runs)
        print(f"{report.ablation_table(rows)}\n\n{report.METHOD}")
        data |= {"method": report.METHOD, "rows": list(map(report.row_data, rows))}
        data["ablations"] = {n: {"term": a.term, "off": a.off, "where": a.where} for n, a in ABLATIONS.items()}
        picture = svg.ablations(rows, title)
    for note in found:
        print(f"note: {note}")
    data["runs"] = list(map(report.run_data, runs))
    if args.json:
        _write("--json", args.json, json.dumps(data))
    if args.plot:
        _write("--plot", args.plot, picture)
    return 1 if any(s.error for r in runs for s in r.streams) else 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for what can be seen before a model is looked for."""
    numbers = (("--repeats", 1, 1000), ("--concurrency", 0, 65535), ("--limit", 0, 1 << 31), ("--scale", 1e-6, 1e6))
    for name, low, high in (*numbers, ("--online", 1e-3, 1e5), ("--settle", 0, 3600)):
        value = getattr(args, name[2:])
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} must be between {low:g} and {high:g}, got {value:g}")
    if not args.ablate and not args.sweep:
        raise UserError(
            f"name what to measure: --ablate {','.join(list(ABLATIONS)[:3])} (or all), or --sweep step_tokens=128,256"
        )
    if args.trace and args.requests:
        raise UserError("--requests describes those of --offline and --online: --trace has its own")
    for name in ("limit", "scale"):
        if not args.trace and getattr(args, name) != {"limit": 0, "scale": 1.0}[name]:
            raise UserError(
                f"--{name} belongs to --trace; n=... of --requests is the number of those of --offline and --online"
            )
    for name in ("json", "plot"):
        if (path := getattr(args, name)) and not Path(path).resolve().parent.is_dir():
            raise UserError(f"--{name} {path}: there is no folder {Path(path).parent}")
    if args.plot and not args.plot.endswith(".svg"):
        raise UserError(f"--plot {args.plot}: the picture is an SVG, so name it FILE.svg")


def _workload(args: argparse.Namespace, config: Config, rate: float | None = None) -> tuple[Workload, list[str]]:
    """The requests, and a note if some do not fit into the context.  `rate` replaces that of --online.  Raises UserError."""
    if args.trace:
        name = args.trace if args.trace.startswith("synthetic:") else Path(args.trace).name
        source, flag = args.trace, "--trace"
    else:
        usual = ON_GPU if config.engine.device == "cuda" and config.model.format != "fake" else ON_CPU
        settings = dict(item.partition("=")[::2] for item in f"{usual},{args.requests}".strip(",").split(","))
        if "rate" in settings:
            raise UserError("--requests: the rate is that of --online")
        rate = args.online if rate is None else rate
        name = ("offline" if rate is None else f"online, {rate:g} a second") + "".join(
            f", {k} {v}" for k, v in settings.items()
        )
        source, flag = f"synthetic:rate={rate or 0}," + ",".join(f"{k}={v}" for k, v in settings.items()), "--requests"
    try:
        requests = load(source, args.limit, args.scale)
    except UserError as e:
        raise UserError(f"{flag}: {e}") from e
    jobs = jobs_of(requests, config.model.vocab_size, config.max_context)
    if not jobs:
        raise UserError(f"{flag}: no request fits into a context of {config.max_context} tokens (--max-context)")
    missing = len(requests) - len(jobs)
    name += f", at most {args.concurrency} at a time" if args.concurrency else ""
    note = f"{missing} of {len(requests)} requests are left out: longer than the context of {config.max_context} tokens"
    return Workload(name, jobs, args.concurrency), [note] if missing else []


# ---------------- what is run, in which order
def _plan(
    args: argparse.Namespace, config: Config, base: Setup, work: Workload
) -> tuple[list[Planned], dict[str, tuple[str, str]], list[str]]:
    """All runs in order, for a sweep the series and value of each name, and notes.  Raises UserError."""
    if not args.sweep:
        others, found = variants(args.ablate, base)
        if not others:
            raise UserError("--ablate all: nothing can be ablated here: " + "; ".join(found))
        first = Planned("base", base, work)
        pairs = [run for v in others for run in (Planned(v.name, v.setup, work), first)]
        return [first, *pairs * args.repeats], {}, found
    found, points, labels = [], [], {}
    for value, setup, its_work in _sweep(args, config, base, work):
        series = [("base", setup)]
        if args.ablate:
            others, more = variants(args.ablate, setup)
            series += [(v.name, v.setup) for v in others]
            found += more
        for name, its_setup in series:
            label = f"{name}, {args.sweep.partition('=')[0]} {value}"
            labels[label] = (name, value)
            points.append(Planned(label, its_setup, its_work))
    order = list(dict.fromkeys(series for series, _ in labels.values()))
    points.sort(key=lambda run: order.index(labels[run.name][0]))  # stable: a series is a line, in the order of its values
    return points * args.repeats, labels, list(dict.fromkeys(found))


def _sweep(args: argparse.Namespace, config: Config, base: Setup, work: Workload) -> Iterator[tuple[str, Setup, Workload]]:
    """Each value of --sweep, with the setup and the requests of its runs.  Raises UserError."""
    key, equals, text = args.sweep.partition("=")
    values = [value.strip() for value in text.split(",")] if text.strip() else []
    if not equals or not values or not all(values):
        raise UserError(f"--sweep {args.sweep}: write a name and its values, as in --sweep step_tokens=128,256,512")
    if len(set(values)) < len(values):
        raise UserError(f"--sweep {args.sweep}: a value is given twice")
    if key == "rate" and args.online is None:
        raise UserError("--sweep rate: the rate is that of --online; a --trace has --scale")
    for value in values:
        if key not in _OF_REQUESTS:
            yield value, changed(base, key, value, "--sweep"), work
            continue
        try:
            number = float(value) if key == "rate" else int(value)
        except ValueError:
            number = 0
        if not math.isfinite(number) or number <= 0 or number > 65535:
            raise UserError(f"--sweep {key}: {value!r} is no {'whole ' * (key != 'rate')}number above 0, at most 65535")
        changed_work = work if key == "rate" else Workload(work.name, work.jobs, int(number))
        yield value, base, _workload(args, config, number)[0] if key == "rate" else changed_work


def _execute(spec: ModelSpec, planned: Sequence[Planned], settle: float) -> tuple[list[Run], dict[str, str]]:
    """Do the runs; (those that were done, why variants could not be run).  Raises UserError if the base cannot."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    with _bar(sum(len(p.work.jobs) for p in planned)) as bar:
        for p in planned:
            if p.name in failed:
                continue
            try:
                runs.append(measure(p.name, spec, p.setup, p.work, settle=settle, progress=bar(p.name)))
                if not runs[-1].figures:
                    raise UserError(f"no request has an answer ({runs[-1].streams[0].error})")
            except UserError as e:
                if p.name == "base":
                    raise UserError(f"base: {e}") from e
                failed[p.name] = str(e)
    kept = [r for r in runs if r.name not in failed]
    if not any(r.name != "base" for r in kept):
        raise UserError("nothing could be measured: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    return kept, failed


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on stderr over the answers of all runs; nothing where that is no terminal."""
    from tqdm import tqdm

    with tqdm(total=total, unit="req", dynamic_ncols=True, disable=None) as bar:

        def of_run(name: str) -> Progress:
            bar.set_description(name)
            return lambda: bar.update() and None

        yield of_run


def _write(flag: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be written ({e.strerror})") from e
    print(f"{flag[2:]}: {path}", file=sys.stderr)
