"""A decode step for every number of rows, and a prefill step on every path: no step may be slower than a larger one.

    python scripts/bench/row_counts.py [--shape S] [--quantization fp8 | --weight-format awq] [--rows N ...] [--variants W ...]
    python scripts/bench/row_counts.py --prefill 1024 2048 ... [--shape S]

One worker, no other processes; GPU time of a step by events, median of 50, as one JSON line for each number of rows.  The rows
are all borders between kernels and graphs, and what lies between.  Exit code 1 where a step is more than 3 % slower than one
with more rows, whose number the last line names.  --variants measures other paths for few rows in the same engine, all or some
(by a word of their name).  --prefill compares a step as a graph (Triton attention) and launched kernel by kernel (the engine's
prefill backend), for one prompt and for prompts of 558 tokens.

What a step must take: the bytes of the weights and of the rows' KV cache at 4.3 TB/s.  For 14B in fp8 13.2 GB of layers and 1.6
GB of head are 3.4 ms, whatever the rows.  Predicted for 2 to 16 rows: 5.3 ms with the library (its time at 17 rows, instead of
10.7 to 11.8), 4.2 to 4.6 ms with our kernel for float8 rows (the bytes at 85 % of the bandwidth, and one kernel less a layer).
For a prefill of 2,048 tokens of 0.6B: 2.7 ms of products (1.8 TFLOP), 2 ms of attention (0.5 TFLOP at 240 TFLOP/s) and 1 ms
of the rest as a graph, instead of 15 ms of launches; from about 6,000 tokens on launches are hidden and FlashInfer is ahead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from minisgl.model.cuda import layers, step
from minisgl.model.kernels import decode_attention, packed_matmul
from minisgl.model.kernels.compilations import compiled
from minisgl.model.kernels.small_batch_matmul import choose
from scripts.bench.ablate_step import Bench
from scripts.lib.reference import provenance

ROWS = (1, 2, 3, 4, 8, 12, 15, 16, 17, 24, 25, 32, 33, 48, 64, 65, 96, 127, 128, 129, 144, 192, 193, 255, 256)
FEW = (1, 2, 4, 8, 12, 16, 17, 24, 32)
SLOWER = 1.03


def constants(module: Any = layers, **values: int) -> list[Any]:
    """Patches of the borders between paths, those of float8 layers by default."""
    return [mock.patch.object(module, name, value) for name, value in values.items()]


Change = Callable[[int, int, int, bool], dict[str, int]]  # (rows, outputs, inputs, gated) -> what is set instead


def packed_settings(change: Change) -> Callable[[], list[Any]]:
    """Other settings for some packed products."""

    def patches() -> list[Any]:
        inner = packed_matmul.settings

        def found(rows: int, n: int, k: int, *, no_partial_sums: bool = False, gated: bool = False) -> dict[str, int]:
            changed = change(rows, n, k, gated)
            if no_partial_sums:
                changed.pop("splits", None)
            return inner(rows, n, k, no_partial_sums=no_partial_sums, gated=gated) | changed

        return [mock.patch.object(packed_matmul, "settings", found)]

    return patches


FP8_VARIANTS: dict[str, tuple[Sequence[int], Callable[[], list[Any]]]] = {
    "library": (FEW, lambda: constants(OUR_ROWS=0)),
    "library, rows as they are": (FEW[1:6], lambda: constants(OUR_ROWS=0, LIBRARY_ROWS=1)),
    "our float8 kernel up to 64 rows": ((*FEW, 48, 64), lambda: constants(OUR_ROWS=64)),
}
ONE = (1, 8)


def of(product: str, **setting: int) -> Change:
    """A setting for one product of a layer of 14B."""

    def change(rows: int, n: int, k: int, gated: bool) -> dict[str, int]:
        found = "gate and up" if gated else "down" if k > 8192 else "output" if n < 6144 else "QKV"
        return setting if found == product else {}

    return change


PACKED_CHANGES: dict[str, tuple[Sequence[int], Change]] = {
    f"{product} {setting}": (ONE, of(product, **setting))
    for product, settings in {
        "gate and up": (
            {"block_n": 64, "warps": 2, "stages": 3},
            {"stages": 6}, {"stages": 8}, {"prefetch": 4}, {"prefetch": 8}, {"unroll": 1, "chains": 1}, {"unroll": 4},
            {"block_n": 16, "warps": 1}, {"unroll": 4, "stages": 3},
        ),
        "down": (
            {"block_n": 64, "warps": 2, "stages": 4}, {"block_n": 64, "warps": 2, "stages": 4, "prefetch": 4},
            {"block_n": 32, "warps": 1, "stages": 6},
            {"block_n": 32, "warps": 1, "stages": 5, "unroll": 2, "chains": 2, "splits": 4},
            {"prefetch": 4}, {"unroll": 2, "chains": 2},
        ),
        "output": (
            {"splits": 2}, {"splits": 2, "unroll": 2, "chains": 2}, {"unroll": 2, "chains": 2}, {"prefetch": 0},
            {"splits": 1, "unroll": 2, "chains": 2}, {"block_n": 16, "splits": 2},
        ),
        "QKV": ({"splits": 2}, {"splits": 1}, {"prefetch": 0}, {"unroll": 1, "chains": 1}, {"block_n": 64, "warps": 2}),
    }.items()
    for setting in settings
}  # fmt: skip
PACKED_VARIANTS: dict[str, tuple[Sequence[int], Callable[[], list[Any]]]] = {
    name: (rows, packed_settings(change)) for name, (rows, change) in PACKED_CHANGES.items()
}
VARIANTS: dict[str, tuple[Sequence[int], Callable[[], list[Any]]]] = {
    "parts joined head by head": (FEW, lambda: constants(decode_attention, TOGETHER_FROM=1 << 20)),
    "parts of all heads joined at once": ((1,), lambda: constants(decode_attention, TOGETHER_FROM=1)),
    "library from 2 rows": (FEW[1:], lambda: [mock.patch.object(layers, "choose", library_from_two)]),
}


def library_from_two(rows: int, *args: int, **options: bool) -> dict[str, Any] | None:
    return choose(rows, *args, **options) if rows == 1 else None


def measure(bench: Bench, rows: int, context: int, **about: object) -> float:
    """Milliseconds of a step of `rows` rows, printed."""
    before = len(compiled)
    ms = bench.decode(rows, context) / 1e3
    print(
        json.dumps({"bench": "row_counts", **about, "rows": rows, "ms": round(ms, 3), "compiled": len(compiled) - before}),
        flush=True,
    )
    return ms


def cliffs(ms: dict[int, float]) -> list[tuple[int, int]]:
    """Pairs of rows of which the fewer take more than 3 % longer than the more."""
    return [(a, b) for a in ms for b in ms if a < b and ms[a] > SLOWER * ms[b]]


def prefill_paths(bench: Bench, tokens: Sequence[int], **about: object) -> None:
    """Milliseconds of steps of one prompt, and of prompts of 558 tokens, as a graph and launched."""
    steps = bench.runner._steps
    for n in tokens:
        for chunk in (n, 558):
            for path, sizes in (("graph", [n]), ("launched", [])):
                with mock.patch.object(steps, "_graph_tokens", sizes), mock.patch.object(step, "SHORT_CONTEXT", n):
                    bench.runner._graphs.clear()
                    line = {"path": path, "tokens": n, "prompt": chunk, "ms": round(bench.prefill(n, chunk) / 1e3, 3)}
                print(json.dumps({"bench": "prefill_paths", **about, **line}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--context", type=int, default=300, help="mean context of the rows (%(default)s)")
    parser.add_argument("--variants", nargs="*", metavar="WORD", help="; ".join({**FP8_VARIANTS, **VARIANTS}))
    parser.add_argument("--prefill", type=int, nargs="*", default=[], metavar="TOKENS")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--weight-format", default="auto", help="awq, gptq, q4_k or q8_0: packed weights")
    parser.add_argument("--attention-backend", default="auto")
    args = parser.parse_args()
    engine = {k: getattr(args, k) for k in ("kv_cache_dtype", "quantization", "weight_format", "attention_backend")}
    about = {"shape": args.shape, **engine}
    print(json.dumps({**about, "gpu": torch.cuda.get_device_name(), **provenance()}), flush=True)
    if args.prefill:
        most = max(args.prefill)
        prefill_paths(Bench(args.shape, [(1, most)], most, **engine), args.prefill, **about)
        return 0
    rows = sorted(set(args.rows))
    bench = Bench(args.shape, [(n, args.context) for n in (*rows, *FEW, 64)], 0, **engine)
    print(json.dumps({"bench": "row_counts", **about, "weights_gb": round(bench.runner._weights / 1e9, 2)}), flush=True)
    ms = {n: measure(bench, n, args.context, variant="default", **about) for n in rows}
    variants = FP8_VARIANTS if args.quantization == "fp8" else PACKED_VARIANTS if args.weight_format != "auto" else VARIANTS
    for name, (variant_rows, patches) in variants.items():
        if args.variants is None or (args.variants and not any(word in name for word in args.variants)):
            continue
        with ExitStack() as stack:
            for patch in patches():
                stack.enter_context(patch)
            for n in variant_rows:
                try:
                    measure(bench, n, args.context, variant=name, **about)
                except Exception as e:  # settings that do not fit the GPU
                    print(json.dumps({"bench": "row_counts", "variant": name, "rows": n, "failed": repr(e)[:200]}), flush=True)
    found = cliffs(ms)
    print(json.dumps({"bench": "row_counts", **about, "slower_than_more_rows": found}), flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
