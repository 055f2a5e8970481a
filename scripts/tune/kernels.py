"""Times the decode kernels over their settings, beside the libraries, on the shapes of real models; one JSON line each.

    python scripts/tune/kernels.py [--attention] [--linear] [--library] [--jobs 16] > FILE

Kernels are compiled by several processes first.  Each figure is the median over replays of a CUDA graph that runs the kernel
once for each of several sets of inputs, together larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from minisgl.model.common.activations import Product
from minisgl.model.kernels.decode_attention import DecodeWorkspace, decode_attention
from minisgl.model.kernels.small_batch_matmul import gemv, skinny

LINEAR = {  # model -> name -> (N, K)
    "0.6b": {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072), "head": (151_936, 1024)},
    "14b": {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (34_816, 5120), "down": (5120, 17_408), "head": (151_936, 5120)},
}
ROWS = {"0.6b": (1, 8, 16, 32, 64, 128, 256), "14b": (1, 8, 32, 64)}
# heads, KV heads, rows, context
ATTENTION = {
    "0.6b B256": (16, 8, 256, 850),
    "0.6b B128": (16, 8, 128, 1100),
    "0.6b B64": (16, 8, 64, 1300),
    "0.6b B16": (16, 8, 16, 1500),
    "0.6b B1": (16, 8, 1, 300),
    "14b B256": (40, 8, 256, 850),
    "14b B32": (40, 8, 32, 1400),
}
CACHE_BYTES = 200 << 20


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def graph_us(calls: list[Callable[[], Any]], replays: int = 15) -> float:
    """Microseconds per call, all calls in one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[len(times[3:]) // 2] * 1000 / len(calls)


def linear_settings(rows: int, n: int, k: int, gated: bool = False) -> Iterator[dict[str, Any]]:
    if rows == 1:
        for block_n, block_k, warps in itertools.product((2, 4, 8), (512, 1024), (2, 4, 8)):
            if block_k <= max(1024, k) and 512 <= block_n * block_k <= 16_384:
                yield {"gemv": True, "block_n": block_n, "block_k": block_k, "warps": warps}
        return
    tallest = min(256, 1 << max(4, (rows - 1).bit_length()))
    heights = {tallest, min(tallest, 128), min(tallest, 64)}
    for block_m, block_k, splits, early in itertools.product(heights, (128,), (1, 2, 4, 8), (0, 256)):
        tiles = -(-n // 64) * splits * -(-rows // block_m)
        if k % (splits * block_k) or not 48 <= tiles <= 264 or (splits > 1 and (gated or n > 40_000)) or k // splits < 256:
            continue
        warps = 8 if block_m >= 128 else 4
        for stages in (3, 4, 5, 6):
            room = stages * (block_m + 64) * block_k * 2
            if room > 220 << 10 or (room < 80 << 10 and stages < 6):
                continue
            yield {
                "splits": splits,
                "block_m": block_m,
                "block_n": 64,
                "block_k": block_k,
                "stages": stages,
                "prefetch_k": early,
                "warps": warps,
            }


def attention_settings(fp8: bool) -> Iterator[dict[str, Any]]:
    for block, warps, stages in itertools.product((32, 64, 128), (1, 2, 4), (2, 3, 4)):
        if block // 16 < warps or (block > 64 and warps < 2):
            continue
        if block * 512 * stages // (2 if fp8 else 1) > 200_000:
            continue
        yield {"block": block, "warps": warps, "stages": stages}


def run_linear(setting: dict[str, Any], x: torch.Tensor, w: torch.Tensor) -> Product:
    options = {k: v for k, v in setting.items() if k != "gemv"}
    return gemv(x, w, **options) if setting.get("gemv") else skinny(x, w, **options)


def attention_inputs(heads: int, kv: int, rows: int, context: int, *, fp8: bool, sets: int) -> list[tuple[Any, ...]]:
    size, dim = 16, 128
    table_width = -(-2 * context // size)
    torch.manual_seed(0)
    lens = torch.randint(int(context * 0.4), int(context * 1.6), (rows,), device="cuda").int().sort(descending=True).values
    if rows == 1:
        lens[:] = context
    pages = int(((lens + size - 1) // size).sum()) + 1
    table = torch.zeros(rows + 1, table_width, dtype=torch.int32, device="cuda")
    order, at = torch.randperm(pages, device="cuda").int(), 0
    for r in range(rows):
        need = -(-int(lens[r]) // size)
        table[r, :need] = order[at : at + need]
        at += need
    slots = torch.arange(rows, device="cuda").int()
    out = []
    for _ in range(sets):
        cache = torch.randn((pages, 2, kv, size, dim), device="cuda", dtype=torch.bfloat16)
        if fp8:
            cache = cache.to(torch.float8_e4m3fn)
        keys, values = cache[:, 0], cache[:, 1]
        q = torch.randn(rows, heads, dim, device="cuda", dtype=torch.bfloat16)
        out.append((q, keys, values, table, slots, lens, cache))
    return out


def splits_for(rows: int, kv: int) -> tuple[int, ...]:
    return (1,) if rows > 128 else (1, 2) if rows > 64 else (1, 2, 4) if rows > 32 else (2, 4, 8) if rows > 8 else (16, 32)


def compile_share(job: tuple[int, int, bool, bool]) -> None:
    index, jobs, attention, linear = job
    for at, (kind, args) in enumerate(work(attention, linear)):
        if at % jobs != index:
            continue
        try:
            if kind == "linear":
                _, rows, (n, k), setting = args
                run_linear(
                    setting,
                    torch.zeros(rows, k, device="cuda", dtype=torch.bfloat16),
                    torch.zeros(n, k, device="cuda", dtype=torch.bfloat16),
                )
            else:
                (heads, kv, _, _), fp8, splits, setting = args
                ((q, keys, values, table, slots, lens, _),) = attention_inputs(heads, kv, 2, 40, fp8=fp8, sets=1)
                ws = DecodeWorkspace(2, splits, heads, kv, 128, q.device)
                decode_attention(q, keys, values, table, slots, lens, ws, **setting)
        except Exception as e:  # a setting that does not fit is reported when it is timed
            print(kind, args, repr(e)[:200], file=sys.stderr)


def work(attention: bool, linear: bool) -> Iterator[tuple[str, Any]]:
    if attention:
        seen = set()
        for heads, kv, rows, context in ATTENTION.values():
            for fp8 in (False, True):
                for splits in splits_for(rows, kv):
                    for setting in attention_settings(fp8):
                        key = (heads, kv, fp8, splits > 1, splits, tuple(setting.values()))
                        if key not in seen:
                            seen.add(key)
                            yield "attention", ((heads, kv, rows, context), fp8, splits, setting)
    if linear:
        for model, shapes in LINEAR.items():
            for name, shape in shapes.items():
                for rows in ROWS[model]:
                    for setting in linear_settings(rows, *shape):
                        yield "linear", (f"{model} {name}", rows, shape, setting)


def attend(inputs: tuple[Any, ...], workspace: DecodeWorkspace, **setting: Any) -> torch.Tensor:
    q, keys, values, table, slots, lens, _ = inputs
    return decode_attention(q, keys, values, table, slots, lens, workspace, **setting)


def tune_attention() -> None:
    for name, (heads, kv, rows, context) in ATTENTION.items():
        for fp8 in (False, True):
            item = 1 if fp8 else 2
            sets = max(2, -(-CACHE_BYTES // (rows * context * kv * 128 * 2 * item)))
            inputs = attention_inputs(heads, kv, rows, context, fp8=fp8, sets=min(sets, 24))
            nbytes = int(inputs[0][5].sum()) * kv * 128 * 2 * item
            results = []
            for splits in splits_for(rows, kv):
                ws = DecodeWorkspace(rows, splits, heads, kv, 128, torch.device("cuda"))
                for setting in attention_settings(fp8):
                    try:
                        us = graph_us([partial(attend, i, ws, **setting) for i in inputs], 9)
                    except Exception as e:
                        print(name, setting, repr(e)[:120], file=sys.stderr)
                        continue
                    results.append((us, {"splits": splits, **setting}))
            results.sort(key=lambda r: r[0])
            for us, setting in results[:4]:
                say(attention=name, fp8=fp8, us=round(us, 1), tb_s=round(nbytes / us / 1e6, 2), **setting)
        flashinfer_decode(name, heads, kv, rows, context)


def flashinfer_decode(name: str, heads: int, kv: int, rows: int, context: int) -> None:
    try:
        import flashinfer
    except ImportError:
        return
    for fp8 in (False, True):
        for cores in (False, True):
            if not cores and heads // kv not in (1, 2, 4, 8):
                continue
            try:
                inputs = attention_inputs(heads, kv, rows, context, fp8=fp8, sets=2)
                lens, table = inputs[0][5].cpu(), inputs[0][3].cpu()
                counts = (lens + 15) // 16
                indptr = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
                indices = torch.cat([table[r, : int(c)] for r, c in enumerate(counts)]).cuda()
                space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
                wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=cores)
                dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
                wrapper.plan(
                    indptr,
                    indices,
                    (lens - (counts - 1) * 16).int(),
                    heads,
                    kv,
                    128,
                    16,
                    q_data_type=torch.bfloat16,
                    kv_data_type=dtype,
                )
                us = graph_us([partial(wrapper.run, i[0], (i[1], i[2])) for i in inputs])
                nbytes = int(lens.sum()) * kv * 128 * 2 * (1 if fp8 else 2)
                say(flashinfer=name, fp8=fp8, tensor_cores=cores, us=round(us, 1), tb_s=round(nbytes / us / 1e6, 2))
            except Exception as e:
                print("flashinfer", name, fp8, cores, repr(e)[:300], file=sys.stderr)


def tune_linear() -> None:
    for model, shapes in LINEAR.items():
        for name, (n, k) in shapes.items():
            sets = min(28, max(2, -(-CACHE_BYTES // (n * k * 2))))
            weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(sets)]
            for rows in ROWS[model]:
                x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
                library = graph_us([partial(torch.nn.functional.linear, x, w) for w in weights])
                results = []
                for setting in linear_settings(rows, n, k):
                    try:
                        got = run_linear(setting, x, weights[0]).float()
                        want = x.float() @ weights[0].float().T
                        error = float((got - want).norm() / want.norm())
                        us = graph_us([partial(run_linear, setting, x, w) for w in weights], 9)
                    except Exception as e:
                        print(name, rows, setting, repr(e)[:120], file=sys.stderr)
                        continue
                    results.append((us, error, setting))
                results.sort(key=lambda r: r[0])
                limit = max(n * k * 2 / 4.3e6, 2 * rows * n * k / 700e6)
                for us, error, setting in results[:3]:
                    say(
                        linear=f"{model} {name}",
                        rows=rows,
                        us=round(us, 2),
                        library_us=round(library, 2),
                        limit_us=round(limit, 2),
                        error=round(error, 5),
                        **setting,
                    )
                one = [r for r in results if r[2].get("splits", 2) == 1][:1]
                for us, error, setting in one:
                    say(linear=f"{model} {name}", rows=rows, one_part=True, us=round(us, 2), error=round(error, 5), **setting)
            del weights


def time_library() -> None:
    """cuBLAS over numbers of rows: bfloat16, float8 with scales of rows and channels, float8 with one scale."""
    for model, shapes in LINEAR.items():
        for name, (n, k) in shapes.items():
            sets = min(28, max(2, -(-CACHE_BYTES // (n * k))))
            weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(sets)]
            small = [w.to(torch.float8_e4m3fn) for w in weights]
            one, columns = torch.ones((), device="cuda"), torch.ones(1, n, device="cuda")
            for rows in (24, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256):
                x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
                q, each = x.to(torch.float8_e4m3fn), torch.ones(rows, 1, device="cuda")
                kinds: dict[str, list[Callable[[], Any]]] = {
                    "bf16": [partial(torch.nn.functional.linear, x, w) for w in weights],
                    "fp8 by rows": [partial(scaled_mm, q, w, each, columns) for w in small],
                    "fp8 whole": [partial(scaled_mm, q, w, one, one) for w in small],
                }
                us = {kind: round(graph_us(calls, 9), 1) for kind, calls in kinds.items()}
                say(library=f"{model} {name}", rows=rows, limit_bf16=round(n * k * 2 / 4.3e6, 1), **us)
            del weights, small


def scaled_mm(x: torch.Tensor, w: torch.Tensor, scale_x: torch.Tensor, scale_w: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(x, w.t(), scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16, use_fast_accum=True)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--library", action="store_true")
    parser.add_argument("--jobs", type=int, default=16)
    args = parser.parse_args()
    jobs = [(i, args.jobs, args.attention, args.linear) for i in range(args.jobs)]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(compile_share, jobs, chunksize=1)
    say(gpu=torch.cuda.get_device_name())
    if args.attention:
        tune_attention()
    if args.linear:
        tune_linear()
    if args.library:
        time_library()
    return 0


if __name__ == "__main__":
    sys.exit(main())
