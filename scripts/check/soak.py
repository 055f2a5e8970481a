"""A steady mixed load for a long time: does a process grow, do pauses between tokens become longer, is anything kept?

    .venv/bin/python scripts/check/soak.py [--minutes 30] [--engine fake|cpu|MODEL] [--seed 0] [--json FILE] [-- flags]

Clients ask a seeded set of mixed requests (those of chaos.py) again and again.  In every interval it samples the resident
memory, descriptors and threads of each process, and the pauses in the streams that were read.  At the end:

rss_mb_h     slope of each process's memory by least squares, MB an hour, without the first quarter; at most --rss-limit, or
             GROWTH megabytes in all where the run is short
p99          of the pauses: the median interval of the last third is at most 1.5 times that of the second (long runs only)
structure    answers are those of the first round, the pool is whole, no request is open, and every process is still the one
             that it was and has as many threads and descriptors as after the warm-up

What follows -- are flags of the server.  The last line is the verdict; exit code 1 if it is bad.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from scripts.lib.answers import slope
from scripts.lib.storm import COMMON, SHOWN, Chaos, Options
from scripts.lib.watched import Watched, descriptors, rss

GROWTH = 12.0  # megabytes
SPARE = {"descriptors": 16, "threads": 4}  # more of them than after the warm-up are a leak
LONG = 600.0  # seconds from which pauses are judged


@dataclass
class Sample:
    """What was seen at the end of an interval.  `processes`: name -> (pid, megabytes, descriptors, threads)."""

    at: float
    processes: dict[str, tuple[int, float, int, int]]
    p99: float
    pauses: int


def _look(server: Watched) -> dict[str, tuple[int, float, int, int]]:
    found = {}
    for name, pid in (("api", server.pid), *server.children()):
        try:
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        except OSError:
            threads = 0
        found[name] = (pid, rss(pid), descriptors(pid), threads)
    return found


class Soak(Chaos):
    """A run without any attack."""

    def __init__(self, options: Options, server: Watched, session: aiohttp.ClientSession, interval: float) -> None:
        super().__init__(options, server, session, None, None)
        self.interval = interval
        self.samples: list[Sample] = []

    async def _storm(self) -> None:
        self.asker.pauses = []
        watch = asyncio.create_task(self._watch())
        try:
            await super()._storm()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self) -> None:
        began = time.monotonic()
        while True:
            await asyncio.sleep(self.interval)
            pauses, self.asker.pauses = self.asker.pauses or [], []
            p99 = statistics.quantiles(pauses, n=100)[98] if len(pauses) > 1 else 0.0
            self.samples.append(Sample(time.monotonic() - began, _look(self.server), p99, len(pauses)))


def judge(samples: list[Sample], rss_limit: float) -> tuple[dict[str, Any], list[str]]:
    """The figures of a run, and what is wrong with it."""
    kept, found = samples[len(samples) // 4 :], []
    if len(kept) < 3:
        return {}, ["short: fewer than three samples after the warm-up"]
    first, last = kept[0], kept[-1]
    hours = (last.at - first.at) / 3600
    slopes = {}
    for name, (pid, _, *counts) in first.processes.items():
        if {s.processes.get(name, (0,))[0] for s in kept} != {pid}:
            found.append(f"ended: the process {name} is not the one that it was")
            continue
        slopes[name] = round(slope([s.at / 3600 for s in kept], [s.processes[name][1] for s in kept]), 2)
        if slopes[name] > rss_limit and slopes[name] * hours > GROWTH:
            found.append(f"leaked: {name} grows by {slopes[name]} MB/h")
        for what, was, now in zip(SPARE, counts, last.processes[name][2:], strict=True):
            if now > was + SPARE[what]:
                found.append(f"leaked: {name} has {now} {what} instead of {was}")
    third = len(kept) // 3
    early, late = (statistics.median(s.p99 for s in part) for part in (kept[third : 2 * third], kept[2 * third :]))
    stable = late <= 1.5 * early + 0.002
    if not stable and last.at >= LONG:
        found.append(f"changed: the 99th percentile of the pauses grew from {early:.4f} to {late:.4f} s")
    figures = {
        "samples": len(samples),
        "rss_mb": {name: [round(first.processes[name][1], 1), round(last.processes[name][1], 1)] for name in slopes},
        "rss_mb_h": slopes,
        "p99_s": {"first": round(early, 4), "last": round(late, 4), "stable": stable, "pauses": sum(s.pauses for s in kept)},
    }
    return figures, found


async def soak(options: Options, interval: float, rss_limit: float) -> tuple[dict[str, Any], list[str]]:
    """Start a server, put the load on it, end it.  Returns the figures and what is wrong."""
    flags = [*options.setting("flags"), *COMMON, *options.flags]
    with tempfile.TemporaryDirectory(prefix="soak-") as data:
        server = Watched(*flags, "--data-dir", data, echo=options.echo)
        try:
            timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0, family=socket.AF_INET)
            async with aiohttp.ClientSession(server.url, timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
                run = Soak(options, server, session, interval)
                figures = await run.run()
        finally:
            left = await asyncio.to_thread(server.end)
    judged, found = judge(run.samples, rss_limit)
    for text in (*found, *left, *server.failures()):
        run.fault(text)
    wanted = ("requests", "refused", "stream_gap_s", "undisturbed_s", "storm_s")
    return {"server": flags, **judged, **{k: figures[k] for k in wanted}, "faults": dict(run.kinds)}, run.faults


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--engine", default="fake", help="fake, cpu (the embedded model), or a model for the GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between two samples; default: 60 of them")
    parser.add_argument("--rss-limit", type=float, default=10.0, help="MB an hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and all faults there, too")
    parser.add_argument("--echo", action="store_true", help="show what the server logs")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    seconds, flags = args.minutes * 60, sys.argv[at + 1 :]
    options = Options(
        *(args.engine, 0, args.seed),
        attacks=frozenset(),
        seconds=seconds,
        clients=args.clients,
        flags=flags,
        echo=args.echo,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with us
    from scripts.lib.reference import provenance

    made = {"check": "soak", "engine": args.engine, "seed": args.seed, "minutes": args.minutes, **provenance()}
    print(json.dumps(made), flush=True)
    figures, found = asyncio.run(soak(options, args.interval or max(0.5, seconds / 60), args.rss_limit))
    print(json.dumps(figures), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({**made, **figures, "ok": not found, "all_faults": found}, indent=1))
    for text in found[:SHOWN]:
        print(f"  {text}")
    worst = max(figures.get("rss_mb_h", {}).items(), key=lambda item: item[1], default=("", 0.0))
    text = f"{figures['requests']} requests in {args.minutes:g} minutes, steepest memory: {worst[0]} {worst[1]:+.1f} MB/h"
    stable = figures.get("p99_s", {}).get("stable")
    print(f"soak: {f'{len(found)} faults' if found else 'nothing is kept'}; {text}; p99 {'stable' if stable else 'not stable'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
