"""Requests at random times against the engine's processes, without HTTP: latencies by the arrival rate; one JSON line each.

    python scripts/bench/online.py [--shape qwen3-14b] [--rate 1 4 8] [--seconds 30] [--input 100-1024] [--output 64-256]
                                   [--engine '{"itl_target_ms": 20}' ...]

Poisson arrivals, sent whether or not earlier requests are answered (open loop), random prompts without a prefix cache, answers
as long as drawn.  The engine is that of `LLM`: random weights have no text, so a stream over HTTP would not show every token.
Each of --engine is one engine with these settings, all with the same requests; `empty_ms` is the time to the first token of
each fifth request of the same list when it is sent alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from minisgl import LLM
from minisgl.bench.outcomes import gaps, spread
from minisgl.bench.provenance import provenance
from minisgl.bench.replay import replay
from minisgl.bench.workload import Job


def between(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low) + 1


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-14b")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0, 4.0, 8.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals")
    parser.add_argument("--input", type=between, default=between("100-1024"), metavar="LOW-HIGH")
    parser.add_argument("--output", type=between, default=between("64-256"), metavar="LOW-HIGH")
    parser.add_argument(
        "--settle", type=float, default=15.0, help="seconds before the first request, for graphs to be captured"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", type=json.loads, nargs="+", default=[{}], metavar="JSON", help="settings of an engine")
    args = parser.parse_args()
    print(json.dumps({"bench": "online", **provenance(), "shape": args.shape}), flush=True)
    for engine in args.engine:
        settings: dict[str, Any] = {"cache": "none", "device": args.device, **engine}
        with LLM(f"random:{args.shape}", **settings) as llm:
            time.sleep(args.settle)
            for rate in args.rate:
                rng = np.random.default_rng(0)
                at = np.cumsum(rng.exponential(1 / rate, int(args.seconds * rate) + 1))
                jobs = [
                    Job(
                        float(t),
                        tuple(rng.integers(0, 10_000, int(rng.integers(*args.input))).tolist()),
                        int(rng.integers(*args.output)),
                    )
                    for t in at
                ]
                _, alone = replay(llm, [Job(0.0, job.prompt, 2) for job in jobs[::5]], concurrency=1)
                seconds, streams = replay(llm, jobs)
                if failed := [s.error for s in (*alone, *streams) if s.error]:
                    raise SystemExit(f"a request has no answer: {failed[0]}")
                line = {
                    "engine": engine,
                    "rate": rate,
                    "requests": len(streams),
                    "seconds": round(seconds, 1),
                    "empty_ms": (spread([s.ttft for s in alone]) or {})["p50"],
                    "ttft_ms": spread([s.ttft for s in streams]),
                    "itl_ms": spread(gaps(streams)),
                }
                print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
