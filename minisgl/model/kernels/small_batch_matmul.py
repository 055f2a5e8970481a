"""Multiplies few rows by weights, as decode steps do: such products read far more weights than anything else.

Bytes: N * K weights once.  A library product treats the rows as the large side of a tile and wastes most of it; here the
weights are the large side, and the rows, at least 16 for the matrix unit, the small one.  Where N / BLOCK_N programs would not
fill the processors, the sum over K is cut into parts that the *next* kernel adds up (all of those are element-wise and read
the product once anyway), so no extra launch and no atomics: the sum's order is fixed.

The weights of a program are requested before it waits for its predecessor (see pdl).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from minisgl.model.common.activations import PartialSums
from minisgl.model.kernels.norm_activation import gate
from minisgl.model.kernels.pdl import launch_options, prefetch, release, wait


@triton.jit
def _gemv(
    x, weight, y,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: a program per BLOCK_N of the N outputs.  The first tiles of weights are loaded before the wait.

    GATED: the weights have 2 N rows, gate and up, and the outputs are silu(gate) * up.
    """
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None]
    at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    tile = tl.load(at, mask=inside & (k < K)[None, :], other=0.0)
    if GATED:
        tile_up = tl.load(at + N * K, mask=inside & (k < K)[None, :], other=0.0)
    wait(PDL)
    xs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    acc = tile.to(tl.float32) * xs
    if GATED:
        acc_up = tile_up.to(tl.float32) * xs
    for first in tl.static_range(BLOCK_K, K, BLOCK_K):
        more = first + k < K
        xs = tl.load(x + first + k, mask=more, other=0.0).to(tl.float32)[None, :]
        acc += tl.load(at + first, mask=inside & more[None, :], other=0.0).to(tl.float32) * xs
        if GATED:
            acc_up += tl.load(at + N * K + first, mask=inside & more[None, :], other=0.0).to(tl.float32) * xs
    total = tl.sum(acc, 1)
    if GATED:
        total = gate(total, tl.sum(acc_up, 1), y)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x, weight, y, row_scales, scales, rows, N,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    PREFETCH: tl.constexpr, SCALED: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per (block of outputs, part of K, block of rows); y [SPLITS, rows, N], or [rows, N / 2] if GATED.

    GATED: rows of the weights alternate by eights between the upper half (gate) and the lower one (up), so that the two that
    belong together end in the same thread.
    """
    release(PDL)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        n = (n // 16) * 8 + n % 8 + ((n // 8) % 2) * (N // 2)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    WIDTH: tl.constexpr = K // SPLITS
    at_w = weight + (tl.minimum(n, N - 1).to(tl.int64) * K + part * WIDTH)[:, None] + k[None, :]
    if PDL and PREFETCH > 0:
        line = tl.arange(0, PREFETCH // 64)  # 64 two-byte weights are one line of 128 bytes
        prefetch((weight + (tl.minimum(n, N - 1).to(tl.int64) * K + part * WIDTH)[:, None] + line[None, :] * 64).to(tl.int64))
    wait(PDL)
    at_x = x + (m.to(tl.int64) * K + part * WIDTH)[:, None] + k[None, :]
    in_x = (m < rows)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(0, WIDTH, BLOCK_K):
        w = tl.load(at_w)
        xs = tl.load(at_x, mask=in_x, other=0.0)
        acc = tl.dot(w, tl.trans(xs), acc)
        at_w += BLOCK_K
        at_x += BLOCK_K
    if SCALED:
        acc *= tl.load(scales + n, mask=n < N, other=0.0)[:, None]
        acc *= tl.load(row_scales + m, mask=m < rows, other=0.0)[None, :]
    if GATED:
        both = tl.reshape(acc, [BLOCK_N // 16, 2, 8, BLOCK_M]).permute(0, 2, 3, 1)
        first, second = tl.split(tl.reshape(both, [BLOCK_N // 2, BLOCK_M, 2]))
        value = gate(first, second, y)
        n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        at_y = y + m.to(tl.int64)[None, :] * (N // 2) + n[:, None]
        tl.store(at_y, value.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N // 2)[:, None])
    else:
        at_y = y + ((part.to(tl.int64) * rows + m) * N)[None, :] + n[:, None]
        tl.store(at_y, acc.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


GEMV_WEIGHTS = 1 << 29  # elements; a product that reads a gigabyte gains nothing over the library
SMALL_WEIGHTS, NARROW = 1 << 23, 2048
PROCESSORS = 132  # of an H100 or H200


def choose(rows: int, n: int, k: int, *, no_partial_sums: bool = False, gated: bool = False) -> dict[str, Any] | None:
    """The settings of `gemv` (one row) or `skinny` for x [rows, K] @ weight [N, K].T, or None where the library is faster.

    From scripts/bench/ablate_step.py on an H200: up to 16 rows ours, except for very large weights; up to 128 where the weights
    are small; up to 256 where the output is narrow, so that only parts of K make enough programs.  `no_partial_sums` forbids
    parts, as `gated` does.
    """
    if rows == 1:
        return settings(rows, n, k, gated=gated) if n * k <= GEMV_WEIGHTS else None
    most = GEMV_WEIGHTS if rows <= 16 else SMALL_WEIGHTS if rows <= 128 else 0
    fast = n * k <= most or (is_narrow(n, k) and rows <= 256)
    return settings(rows, n, k, no_partial_sums=no_partial_sums, gated=gated) if fast and k % 128 == 0 else None


def is_narrow(n: int, k: int) -> bool:
    return n <= NARROW and k <= 2 * NARROW


def settings(
    rows: int, n: int, k: int, *, no_partial_sums: bool = False, fp8: bool = False, gated: bool = False
) -> dict[str, Any]:
    """The best settings known for a product, whether or not the library is faster.

    One program for each processor, whose shared memory holds as many loads in flight as fit.
    """
    if rows == 1:
        return {
            "block_n": (4 if k <= 1024 else 2) // (2 if gated else 1),
            "block_k": 1024,
            "warps": 2 if k <= 1024 or n > 4096 else 4,
        }
    block_k = 256 if fp8 and k % 256 == 0 else 128 if k % 128 == 0 else 64 if k % 64 == 0 else 16
    block_m, warps = min(64, max(16, triton.next_power_of_2(rows))), 4
    tiles = triton.cdiv(n, 64) * triton.cdiv(rows, block_m)
    if rows > 64 and tiles > PROCESSORS:
        block_m, warps, tiles = 128, 8, triton.cdiv(n, 64) * triton.cdiv(rows, 128)
    splits = 1
    splittable = not no_partial_sums and not gated and (is_narrow(n, k) or rows <= 64)
    while (
        splittable and splits < 8 and 2 * splits * tiles <= PROCESSORS and k % (2 * splits * block_k) == 0 and k // splits > 256
    ):
        splits *= 2
    stages = 6 if rows <= 16 or (gated and rows <= 64) else 5 if rows <= 32 else 4
    early = 256 if k <= 4096 and k // splits >= 256 and not fp8 else 0
    shape = {"block_m": block_m, "block_n": 64, "block_k": block_k, "warps": warps, "stages": stages}
    return {"splits": splits, **shape, "prefetch_k": early}


def gemv(
    x: torch.Tensor, weight: torch.Tensor, *, block_n: int = 4, block_k: int = 1024, warps: int = 4, gated: bool = False
) -> torch.Tensor:
    """x [1, K] @ weight [N, K].T -> [1, N], in x's dtype.

    `gated`: weight is [gate, up], and the result silu(gate) * up [1, N / 2].
    """
    n, k = weight.shape
    n = n // 2 if gated else n
    y = torch.empty(1, n, dtype=x.dtype, device=x.device)
    block_k = min(block_k, triton.next_power_of_2(k))
    _gemv[(triton.cdiv(n, block_n),)](
        x, weight, y, N=n, K=k, BLOCK_N=block_n, BLOCK_K=block_k, GATED=gated, num_warps=warps, **launch_options(x),
    )  # fmt: skip
    return y


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    splits: int = 1,
    block_m: int = 16,
    block_n: int = 64,
    block_k: int = 128,
    warps: int = 4,
    stages: int = 4,
    prefetch_k: int = 0,
    gated: bool = False,
) -> torch.Tensor | PartialSums:
    """x [R, K] @ weight [N, K].T -> [R, N] of x's dtype, or, with splits, f32 partial sums.

    `gated`: weight is [gate, up], and the result silu(gate) * up [R, N / 2]; N / 2 a multiple of 8, no splits.
    K a multiple of splits * block_k.  `scales` f32 [R, 1] of the rows and f32 [N] of the outputs: x and weight are float8, and
    the result is bfloat16.
    """
    rows, k = x.shape
    n = len(weight)
    width = n // 2 if gated else n
    dtype = torch.float32 if splits > 1 else x.dtype if scales is None else torch.bfloat16
    y = torch.empty(splits, rows, width, dtype=dtype, device=x.device)
    _skinny[(triton.cdiv(n, block_n), splits, triton.cdiv(rows, block_m))](
        x, weight, y, *(scales or (y, y)), rows, n,
        K=k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SPLITS=splits, PREFETCH=prefetch_k, SCALED=scales is not None,
        GATED=gated, num_warps=warps, num_stages=stages, **launch_options(x),
    )  # fmt: skip
    return y[0] if splits == 1 else PartialSums(y)


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, settings: dict[str, Any], *, gated: bool = False
) -> torch.Tensor | PartialSums:
    """`gemv` or `skinny`, with the settings that `choose` has for x."""
    return (gemv if len(x) == 1 else skinny)(x, weight, gated=gated, **settings)
