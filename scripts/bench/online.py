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
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisgl import LLM, SamplingParams
from minisgl.api.engine import Chunk, TokenPrompt
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish
from scripts.lib.reference import provenance


@dataclass(slots=True)
class Stream:
    """When a request was sent, and its tokens came."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    ended: bool = False

    def on_chunk(self, chunk: Chunk | RequestError) -> None:
        if isinstance(chunk, RequestError):
            raise chunk
        self.times += [time.perf_counter()] * len(chunk.token_ids)
        self.ended = chunk.finish != Finish.NONE


def percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1e3, [50, 90, 99, 100])
    return dict(zip(("p50", "p90", "p99", "max"), (round(float(v), 2) for v in values), strict=True))


def between(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low) + 1


def serve(llm: LLM, requests: list[tuple[float, list[int], int]], alone: bool = False) -> list[Stream]:
    """Send each (time, prompt, output) at its time, or after the one before has ended."""
    streams: list[Stream] = []
    start = time.perf_counter()
    waiting = list(reversed(requests))
    while waiting or not all(s.ended for s in streams):
        now = time.perf_counter() - start
        if waiting and (not llm.system.gateway.open_requests if alone else waiting[-1][0] <= now):
            _, prompt, output = waiting.pop()
            streams.append(Stream(time.perf_counter()))
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output)
            llm.system.gateway.open(TokenPrompt(tuple(prompt)), params, streams[-1].on_chunk)
        else:
            llm.system.pump(min(1.0, max(0.0, waiting[-1][0] - now)) if waiting and not alone else 1.0)
    return streams


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
                requests = [
                    (
                        float(t),
                        rng.integers(0, 10_000, int(rng.integers(*args.input))).tolist(),
                        int(rng.integers(*args.output)),
                    )
                    for t in at
                ]
                alone = serve(llm, [(0.0, prompt, 2) for _, prompt, _ in requests[::5]], alone=True)
                start = time.perf_counter()
                streams = serve(llm, requests)
                gaps = [float(g) for s in streams for g in np.diff(s.times)]
                line = {
                    "engine": engine,
                    "rate": rate,
                    "requests": len(streams),
                    "seconds": round(time.perf_counter() - start, 1),
                }
                line |= {"empty_ms": percentiles([s.times[0] - s.sent for s in alone])["p50"]}
                line |= {"ttft_ms": percentiles([s.times[0] - s.sent for s in streams]), "itl_ms": percentiles(gaps)}
                print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
