"""Three fused kernels of a decoder layer, in Triton.  Runs in the workers.

Between the matrix products of a layer stand small operations that move little data, each a launch of a few microseconds.
Fused, a layer is: add_rms_norm, QKV product, rope_and_store, attention, output product, add_rms_norm, gate-up product,
silu_mul, down product.

Bytes moved by each, of 2-byte elements: add_rms_norm reads 2 T C and writes 2 T C; silu_mul reads 2 T I and writes T I;
rope_and_store reads and writes T (H + 2K) D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _add_rms_norm(x, delta, weight, out, eps, width, BLOCK: tl.constexpr, ADD: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """One program per row: x += delta (kept in x), out = x / rms(x) * weight."""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)  # the norm is of what is kept
        tl.store(x + row + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, (value * scale * w).to(out.dtype.element_ty), mask=inside)


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, C] += delta [T, C] in place, if there is one; returns RMSNorm(x) [T, C].  All contiguous."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _add_rms_norm[(len(x),)](
        x, x if delta is None else delta, weight, out, eps, width, BLOCK=block, ADD=delta is not None, num_warps=warps
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, (silu * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 I] (gate, up) -> silu(gate) * up, [T, I].  Contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _rope_and_store(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    qkv, cos, sin, q_out, cache, kv_index, HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr
):
    """One program per (token, head of q, k or v); the rotate-half layout."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = qkv + (token * (HEADS + 2 * KV) + head) * DIM
    if head < HEADS:
        target = q_out + (token * HEADS + head) * DIM
    else:  # keys, then values, side by side in the cache
        target = cache + (tl.load(kv_index + token) * 2 * KV + head - HEADS) * DIM
    at = tl.arange(0, HALF)
    inside = at < DIM // 2
    low = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + DIM // 2 + at, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV:
        c = tl.load(cos + token * DIM + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * DIM + DIM // 2 + at, mask=inside, other=0.0).to(tl.float32)
        low, high = low * c - high * s, high * c + low * s
    tl.store(target + at, low.to(q_out.dtype.element_ty), mask=inside)
    tl.store(target + DIM // 2 + at, high.to(q_out.dtype.element_ty), mask=inside)


def rope_and_store(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor, kv_index: torch.Tensor, *, num_heads: int
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to the cache; returns the queries [T, H, D].

    qkv [T, H + 2K, D]; cos and signed sin [T, 1, D] as made by Rope.at; cache [tokens, 2, K, D] of one layer; kv_index i64[T].
    """
    tokens, heads, dim = qkv.shape
    kv_heads = (heads - num_heads) // 2
    q_out = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    _rope_and_store[(tokens, heads)](
        qkv,
        cos,
        sin,
        q_out,
        cache,
        kv_index,
        HEADS=num_heads,
        KV=kv_heads,
        DIM=dim,
        HALF=triton.next_power_of_2(dim // 2),
        num_warps=1,
    )
    return q_out
