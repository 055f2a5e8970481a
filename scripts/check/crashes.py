"""Kills actors of a deterministic engine at every point of mixed requests, by seed, and compares every answer.

    .venv/bin/python scripts/check/crashes.py [--seeds 10000] [--first 0] [--each SCENARIO] [--processes 1]

--seeds   scenarios with one to six deaths each, at random points: tests/crash_scenario.py says what must hold
--each    instead: one scenario without disturbance, and again for each point of each actor, where this actor is killed

Prints a line for each run that fails, with what repeats it, and at the end one line of JSON.  Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

crash_scenario: Any = importlib.import_module("crash_scenario")

Job = tuple[int, str, int]  # seed; whom to kill at which point of its life, "" for deaths by the seed


def _tried(job: Job) -> tuple[Job, str, int, int, int]:
    """(job, what is wrong or "", deaths, events, requests refused as poison)"""
    seed, name, point = job
    run = crash_scenario.make(seed, {name: (1, point)}) if name else crash_scenario.disturbed(seed)
    try:
        crash_scenario.finish(run)
        wrong = ""
    except Exception as e:  # whatever breaks first: a comparison, a check of the books, an actor
        wrong = f"{type(e).__name__}: {e}"
    return job, wrong, sum(run.cluster.deaths.values()), run.cluster.events, run.poison


def _jobs(args: argparse.Namespace) -> list[Job]:
    if args.each is None:
        return [(seed, "", 0) for seed in range(args.first, args.first + args.seeds)]
    points = crash_scenario.finish(crash_scenario.make(args.each)).cluster.points
    return [(args.each, name, k) for name, n in sorted(points.items()) for k in range(1, n + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--each", type=int, metavar="SCENARIO")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    jobs, began, total = _jobs(args), time.monotonic(), Counter[str]()
    with ProcessPoolExecutor(args.processes) as pool:
        results: Iterable[tuple[Job, str, int, int, int]]
        results = pool.map(_tried, jobs, chunksize=16) if args.processes > 1 else map(_tried, jobs)
        for n, (job, wrong, deaths, events, poison) in enumerate(results, 1):
            total.update(runs=1, failed=wrong != "", deaths=deaths, events=events, refused_as_poison=poison)
            if wrong:
                print(f"{job}: {wrong:.300}", flush=True)
            if n % 500 == 0:
                print(
                    f"{n} of {len(jobs)} runs, {total['failed']} failed, {n / (time.monotonic() - began):.1f} a second",
                    flush=True,
                )
    seconds = time.monotonic() - began
    print(
        json.dumps(
            {**total, "seconds": round(seconds, 1), "runs_per_s": round(len(jobs) / seconds, 2), "ok": not total["failed"]}
        )
    )
    return int(total["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
