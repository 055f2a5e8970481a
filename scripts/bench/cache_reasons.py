"""CPU time that remembering prompts, and finding why they were not cached, takes of the api process, for each request.

    .venv/bin/python scripts/bench/cache_reasons.py

One JSON line per measure: measure, value, unit, must, config.  CPU time of one core, median over requests: all that happens to
a request that does not ask for its explanation, from its tokens to the end of its answer of 60 tokens.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np

from minisgl.api.cache_reasons import CacheReasons
from minisgl.arrays import I32
from minisgl.config import Config, EngineConfig
from minisgl.model.checkpoint.presets import random_shape
from minisgl.sampling_params import RequestOptions, SamplingParams

MUST_US = 20.0
# Tokens of a prompt at its end, turns of its conversation, and whether all conversations begin with half of these tokens.
CASES = ((100, 1, True), (1_000, 1, True), (1_000, 8, True), (8_000, 20, True), (1_000, 1, False))


def requests(tokens: int, turns: int, shared: bool) -> list[tuple[I32, list[int]]]:
    """(prompt, answer) of conversations with a system message of half their tokens, shared by all or by none."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> I32:
        return rng.integers(0, 50_000, n).astype(np.int32)

    system, out = draw(tokens // 2), []
    for _ in range(2_000 // turns):
        ids = system if shared else draw(tokens // 2)
        for _ in range(turns):
            ids = np.append(ids, draw(max(1, tokens // 2 // turns - 60)))
            out.append((ids, draw(60).tolist()))
            ids = np.append(ids, np.array(out[-1][1], np.int32))
    return out


def measure(tokens: int, turns: int, shared: bool) -> float:
    """Microseconds a request."""
    reasons = CacheReasons(Config(random_shape("qwen3-0.6b"), EngineConfig()))
    params, options, times = SamplingParams(), RequestOptions(), []
    shape = np.arange(3 * 2 * turns, dtype="<u4").tobytes()
    for ids, said in requests(tokens, turns, shared):
        began = time.thread_time_ns()
        known = reasons.recall(ids, params, options, shape)
        reasons.begin(known, ids, len(ids) // 2 // 16 * 16, explain=False)
        reasons.end(known, said)
        times.append(time.thread_time_ns() - began)
    return statistics.median(times) / 1000


def main() -> None:
    for case in CASES:
        row = {"measure": "cache_reasons", "value": round(measure(*case), 1), "unit": "us/request", "must": MUST_US}
        print(json.dumps(row | {"config": dict(zip(("tokens", "turns", "shared"), case, strict=True))}))


if __name__ == "__main__":
    main()
