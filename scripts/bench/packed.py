"""Products with weights packed in 4 and 8 bits: right, and how fast, over the shapes of Qwen3; one JSON line each.

    python scripts/bench/packed.py [--seconds 110] [--models 14b 8b 0.6b] [--formats awq q4_k q8_0] [--no-grid] [--jobs 16]

Each figure is the median over replays of a CUDA graph that runs the product once for each of several copies of the weight,
together larger than the L2 cache.  us: time; tb_s: bytes of the packed weight in that time; of_bytes: time over that of its
bytes at 4.3 TB/s; bf16: time of cuBLAS with the weight in bfloat16; dequantize: of `many_rows`.  error: the norm of the
difference to the product with the exact weights in float32, over that product's.  The grid: the best settings for 14B.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from minisgl.model.kernels import packed_matmul as pm
from minisgl.model.kernels.norm_activation import silu_mul
from scripts.lib.reference import provenance
from scripts.tune.kernels import graph_us, say

SHAPES = {  # model -> product -> (N, K)
    "14b": {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (34_816, 5120), "down": (5120, 17_408)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24_576, 4096), "down": (4096, 12_288)},
    "0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
}
FORMATS = {"awq": (4, 128, False), "q4_k": (4, 32, True), "q8_0": (8, 32, False)}  # bits, group, zeros are no whole numbers
ROWS = (1, 2, 4, 8, 16, 32, 33, 64, 256)
COPIES = 160 << 20  # bytes
ERROR = 6e-3  # of a product that is rounded to bfloat16 once; three times as much where it is rounded three times


def weight(n: int, k: int, form: str, gated: bool) -> tuple[pm.Packed, torch.Tensor]:
    """A random packed weight, and its exact values f32 [N, K]."""
    bits, group, real = FORMATS[form]
    scales = (torch.rand(n, k // group, device="cuda") * 0.004 + 0.002).half().float()
    zeros = torch.full((n, k // group), 128.0, device="cuda")
    if bits == 4:
        zeros = torch.rand(n, k // group, device="cuda") * 4 + 5.5
        zeros = zeros if real else zeros.round()
    numbers = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda")
    packed = pm.pack(numbers, scales, zeros, bits, group, torch.bfloat16, gated=gated)
    exact = (numbers.view(n, -1, group).float() - zeros[..., None]) * scales[..., None]
    return packed, exact.view(n, k)


def copies(w: pm.Packed) -> list[pm.Packed]:
    number = max(2, -(-COPIES // (w.units.nbytes + w.words.nbytes)))
    return [w, *(replace(w, units=w.units.clone(), words=w.words.clone()) for _ in range(number - 1))]


def grid(rows: int, n: int, k: int, gated: bool) -> Iterator[dict[str, Any]]:
    blocks = k // 128
    if rows <= 16:
        shapes, stages = ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4)), (3, 4, 6)
        options = list(itertools.product((8, 16) if rows <= 8 else (16,), shapes, stages, (0, 4), (1, 2), (1, 2)))
    else:
        heights = (32,) if rows <= 32 else (64,) if rows <= 64 else (64, 128)
        options = list(itertools.product(heights, ((64, 2), (64, 4), (128, 4), (128, 8)), (3, 5), (0,), (1,), (1,)))
    for block_m, (block_n, warps), depth, prefetch, chains, unroll in options:
        if block_m >= 64 and (warps == 2 or (block_m == 128 and (warps < 8 or depth > 3))):
            continue
        if block_m == 16 and rows <= 8 and (chains == 1 or warps == 1):
            continue
        tiles = -(-n // block_n) * -(-rows // block_m)
        for splits in (1,) if gated else (2, 4, 8) if rows <= 16 else (1, 2, 4, 8):
            if tiles * splits < 100 or tiles * splits * block_n > 132 * 16 * 64 or (unroll > 1 and blocks // splits % unroll):
                continue
            yield {
                "splits": splits, "block_m": block_m, "block_n": block_n, "warps": warps, "stages": depth,
                "prefetch": prefetch, "chains": chains, "unroll": unroll,
            }  # fmt: skip


def compile_share(job: tuple[int, int, list[str], list[str], bool, float]) -> None:
    """One process's share of the kernels, on small weights: sizes are no part of a kernel."""
    index, jobs, models, formats, with_grid, deadline = job
    wanted: dict[tuple[Any, ...], None] = {}
    for form, (name, (n, k)), rows in itertools.product(formats, SHAPES["14b"].items(), ROWS):
        gated = name == "gate_up"
        found = [pm.settings(rows, *s[name], gated=gated) for m, s in SHAPES.items() if m in models]
        if with_grid:
            found += list(grid(rows, n, k, gated)) if form == "awq" or rows == 1 else []
        for setting in found:
            wanted[form, gated, tuple((setting | {"splits": min(2, setting["splits"])}).items())] = None
    made = {(form, gated): weight(1024, 1024, form, gated)[0] for form in formats for gated in (False, True)}
    for at, (form, gated, setting) in enumerate(wanted):
        if at % jobs == index and time.time() < deadline:
            try:
                x = torch.zeros(16, 1024, device="cuda", dtype=torch.bfloat16)
                pm.product(x, made[form, gated], **dict(setting))
            except Exception as e:
                print(form, gated, setting, repr(e)[:200], file=sys.stderr, flush=True)


def measure(model: str, name: str, form: str, args: argparse.Namespace, deadline: float) -> bool:
    n, k = SHAPES[model][name]
    gated = name == "gate_up"
    w, exact = weight(n, k, form, gated)
    all_copies, wrong = copies(w), False
    limit = (w.units.nbytes + w.words.nbytes) / 4.3e6
    restored = float((pm.dequantize(w).float() - exact).norm() / exact.norm())
    say(model=model, product=name, n=n, k=k, format=form, mb=round(limit * 4.3, 1), dequantize_error=round(restored, 6))
    dense = exact.bfloat16()
    several = [dense, *(dense.clone() for _ in range(max(1, COPIES // dense.nbytes)))]
    for rows in ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        want = F.linear(x.float(), exact)
        if gated:
            want = F.silu(want[:, : n // 2]) * want[:, n // 2 :]

        def run(setting: dict[str, Any], x: torch.Tensor = x) -> float:
            return graph_us([partial(pm.product, x, c, **setting) for c in all_copies], replays=9)

        def error(y: Any, want: torch.Tensor = want) -> float:
            return round(float((y.float() - want).norm() / want.norm()), 6)

        setting = pm.settings(rows, n, k, gated=gated)
        line: dict[str, Any] = {"model": model, "product": name, "format": form, "rows": rows, "setting": setting}
        line["error"] = error(pm.product(x, w, **setting))
        line["many_rows_error"] = error(silu_mul(pm.many_rows(x, w)) if gated else pm.many_rows(x, w))
        wrong |= not max(line["error"], line["many_rows_error"], restored) < ERROR * (3 if gated else 1)
        us = run(setting)
        line |= {"us": round(us, 2), "tb_s": round(limit * 4.3 / us, 2), "of_bytes": round(us / limit, 2)}
        if form == "awq":
            line["bf16"] = round(graph_us([partial(F.linear, x, d) for d in several], replays=9), 2)
            if rows >= 32:
                line["dequantize"] = round(graph_us([partial(pm.many_rows, x, c) for c in all_copies[:4]], replays=9), 2)
        best: list[tuple[float, Any]] = []
        if args.grid and model == "14b" and (form == "awq" or rows == 1) and rows not in (2, 4, 8, 33):
            for other in grid(rows, n, k, gated):
                if time.time() > deadline:
                    break
                try:
                    best.append((round(run(other), 2), tuple(other.values())))
                except Exception as e:  # more shared memory than there is
                    print(other, repr(e)[:80], file=sys.stderr, flush=True)
        say(**line, best=sorted(best)[:8])
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--no-grid", dest="grid", action="store_false")
    parser.add_argument("--jobs", type=int, default=16)
    args = parser.parse_args()
    began = time.time()
    deadline = began + args.seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    say(bench="packed", gpu=torch.cuda.get_device_name(), **provenance())
    jobs = [(i, args.jobs, args.models, args.formats, args.grid, began + 0.5 * args.seconds) for i in range(args.jobs)]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(compile_share, jobs, chunksize=1)
    say(compiled_after_s=round(time.time() - began, 1))
    wrong = []
    # First what decides: 14B in 4 bits; the rest checks and times the settings as they are.
    for form, model in itertools.product(args.formats, args.models):
        for name in SHAPES[model]:
            if time.time() > deadline:
                say(left_out=[form, model, name])
            elif measure(model, name, form, args, deadline):
                wrong.append((form, model, name))
    say(
        wrong=wrong,
        seconds=round(time.time() - began, 1),
        order=", ".join(next(grid(1, 5120, 5120, False))),
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
