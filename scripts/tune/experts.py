"""Times the kernels of a mixture of experts over the sizes of their programs; one JSON line each, the best last.

    python scripts/tune/experts.py [--shape qwen3-30b-a3b] [--tp N] [--tokens 1 8 64 256 2048 8192] [--jobs 16] [--fp8] > FILE

Kernels are compiled by several processes first.  Each figure is the median over replays of a CUDA graph that runs a whole layer
(route, count, place, both products) for several inputs, whose choices are even; beside it the share of the memory's rate at
which the weights of the experts that were hit would be read in that time.  Every setting is compared with the one that the
engine would choose.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.common.shard import Shard
from minisgl.model.kernels.moe import Settings, Weights, choose, experts, in_float8, route
from scripts.lib.reference import provenance
from scripts.tune.kernels import graph_us, say

INPUTS = 3


def sizes(tokens: int, top: int, e: int, fp8: bool) -> Iterator[dict[str, int]]:
    each = tokens * top / e
    heights = [m for m in (16, 32, 64, 128) if m / 4 <= max(4, each) and (m >= each / 8 or m == 128)]
    pipelines = ((4, 3), (4, 4), (4, 5), (8, 3), (8, 4))
    for m, n, k, (warps, stages) in itertools.product(heights, (32, 64, 128), (128, 256) if fp8 else (64, 128), pipelines):
        if stages * (m + 2 * n) * k * (1 if fp8 else 2) <= 200_000 and m * n <= 128 * 64:
            yield {"block_m": m, "block_n": n, "block_k": k, "warps": warps, "stages": stages}


def compile_share(job: tuple[int, int, list[int], int, int, int, int, bool, bool]) -> None:
    """Every `jobs`-th setting, on little data: what is compiled lands in Triton's cache on disk."""
    index, jobs, counts, e, top, inner, outer, norm, fp8 = job
    weights = Weights(
        *(torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((e, 2 * inner, outer), (e, outer, inner)))
    )
    weights = in_float8(weights) if fp8 else weights
    x, logits = (
        torch.zeros(32, outer, device="cuda", dtype=torch.bfloat16),
        torch.randn(32, e, device="cuda").to(torch.bfloat16),
    )
    unique = {tuple(s.items()): s for tokens in counts for s in sizes(tokens, top, e, fp8)}
    for setting in list(unique.values())[index::jobs]:
        with contextlib.suppress(Exception):  # a setting that does not fit is reported when it is timed
            experts(x, logits, weights, Settings(top, norm), setting)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048, 8192])
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes per second (H200: 4.8e12, H100: 3.35e12)")
    parser.add_argument("--fp8", action="store_true", help="experts in float8; errors are those against exact weights")
    args = parser.parse_args()
    spec = random_shape(args.shape)
    start, end = Shard.of(spec, 0, args.tp).expert
    e, top, inner, outer = spec.num_experts, spec.experts_per_token, end - start, spec.hidden_size
    print(
        json.dumps({"gpu": torch.cuda.get_device_name(), "shape": spec.name, "tp": args.tp, "fp8": args.fp8, **provenance()}),
        flush=True,
    )

    shape = (e, top, inner, outer, spec.norm_topk, args.fp8)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(compile_share, [(i, args.jobs, args.tokens, *shape) for i in range(args.jobs)], chunksize=1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(torch.bfloat16) / 30

    exact, settings = Weights(rand(e, 2 * inner, outer), rand(e, outer, inner)), Settings(top, spec.norm_topk)
    weights = in_float8(exact) if args.fp8 else exact
    for tokens in args.tokens:
        inputs = [(rand(tokens, outer), rand(tokens, e) * 30) for _ in range(INPUTS)]
        hit = sum(len(np.unique(route(logits, top, True)[0].cpu().numpy())) for _, logits in inputs) / INPUTS
        least = hit * 3 * inner * outer * weights.down.itemsize / args.bandwidth * 1e6
        chosen = choose(tokens, top, e, fp8=args.fp8)
        want = experts(*inputs[0], exact, settings).float().sum(0)
        figures = []
        for setting in [chosen, *(s for s in sizes(tokens, top, e, args.fp8) if s != chosen)]:
            try:
                us = graph_us([partial(experts, x, logits, weights, settings, setting) for x, logits in inputs])
            except Exception as error:  # more shared memory than there is, say: the next one may fit
                say(tokens=tokens, **setting, failed=f"{type(error).__name__}: {error}"[:120])
                continue
            got = experts(*inputs[0], weights, settings, setting).float().sum(0)
            wrong = float((got - want).norm() / want.norm())
            figures.append({**setting, "us": round(us, 1), "of_limit": round(least / us, 3), "error": round(wrong, 4)})
            say(tokens=tokens, chosen=setting == chosen, **figures[-1])
        say(
            tokens=tokens,
            best=min((f for f in figures if f["error"] < (0.08 if args.fp8 else 0.02)), key=lambda f: f["us"]),
            now=figures[0],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
