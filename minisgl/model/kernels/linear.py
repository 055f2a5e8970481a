"""Matrix products with few rows (decode), which read far more weights than anything else.

Bytes: N * K weights once.  A library product treats the rows as the large side of a tile and wastes most of it; here the weights
are the large side, and the rows, at least 16 for the matrix unit, the small one.  Where N / BLOCK_N programs would not fill the
processors, the sum over K is cut into parts that the *next* kernel adds up (all of those are element-wise and read the product
once anyway), so no extra launch and no atomics: the sum's order is fixed.

The weights of a program are requested before it waits for its predecessor (see pdl).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.pdl import launch_options, prefetch, release, wait


@triton.jit  # type: ignore[untyped-decorator]
def _gemv(x, weight, y, width, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """One row: a program per BLOCK_N outputs.  The first tile of weights is loaded before the wait."""
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None]
    at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    tile = tl.load(at, mask=inside & (k < K)[None, :], other=0.0)
    wait(PDL)
    acc = tile.to(tl.float32) * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    for first in tl.static_range(BLOCK_K, K, BLOCK_K):
        more = first + k < K
        tile = tl.load(at + first, mask=inside & more[None, :], other=0.0)
        acc += tile.to(tl.float32) * tl.load(x + first + k, mask=more, other=0.0).to(tl.float32)[None, :]
    tl.store(y + n, tl.sum(acc, 1).to(y.dtype.element_ty), mask=n < N)


@triton.jit  # type: ignore[untyped-decorator]
def _skinny(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    x,
    weight,
    y,
    rows,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program per (block of outputs, part of K, block of rows); y [SPLITS, rows, N]."""
    release(PDL)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    at_y = y + ((part.to(tl.int64) * rows + m) * N)[None, :] + n[:, None]
    tl.store(at_y, acc.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < N)[:, None])


def gemv(x: torch.Tensor, weight: torch.Tensor, *, block_n: int = 4, block_k: int = 1024, warps: int = 4) -> torch.Tensor:
    """x [1, K] @ weight [N, K].T -> [1, N]."""
    n, k = weight.shape
    y = torch.empty(1, n, dtype=x.dtype, device=x.device)
    block_k = min(block_k, triton.next_power_of_2(k))
    _gemv[(triton.cdiv(n, block_n),)](
        x, weight, y, 0, N=n, K=k, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, **launch_options(x)
    )
    return y


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    splits: int = 1,
    block_m: int = 16,
    block_n: int = 64,
    block_k: int = 128,
    warps: int = 4,
    stages: int = 4,
    prefetch_k: int = 0,
) -> torch.Tensor:
    """x [R, K] @ weight [N, K].T -> [R, N] of x's dtype, or, with splits, f32 parts [splits, R, N] whose sum it is."""
    rows, k = x.shape
    n = len(weight)
    y = torch.empty(splits, rows, n, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    _skinny[(triton.cdiv(n, block_n), splits, triton.cdiv(rows, block_m))](
        x,
        weight,
        y,
        rows,
        n,
        K=k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SPLITS=splits,
        PREFETCH=prefetch_k,
        num_warps=warps,
        num_stages=stages,
        **launch_options(x),
    )
    return y[0] if splits == 1 else y
