"""Normalises and rotates queries and keys and writes the KV cache, in one kernel between the QKV product and attention.

Bytes: of 2-byte elements, reads and writes T (H + 2K) D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.common.activations import Product
from minisgl.model.common.interfaces import QKNorm, Rotation
from minisgl.model.kernels.activations import operand
from minisgl.model.kernels.norm_activation import sum_parts
from minisgl.model.kernels.pdl import begin, launch_options


@triton.jit(do_not_specialize=["rows", "kv_index"])
def _prepare_heads(
    qkv, cos, sin, q_weight, k_weight, q_out, keys, values, kv_index, by_row, by_column, eps, k_inverse, v_inverse, rows,
    page_stride, head_stride, token_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (token, BLOCK heads of queries, keys and values); both halves of each head side by side.

    The first ROTARY of the DIM dimensions turn: `low` and `high` are their two halves, and then the two halves of the rest.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HALF)
    at, gap, gaps = d, DIM // 2, DIM // 2  # where the low dimensions are, and how far behind them the high ones
    if ROTARY < DIM:
        at = tl.where(d < ROTARY // 2, d, d + ROTARY // 2)
        gap = tl.where(d < ROTARY // 2, ROTARY // 2, DIM // 2 - ROTARY // 2)
        gaps = gap[None, :]
    is_q, is_v = head < HEADS, head >= HEADS + KV
    inside = (head < HEADS + 2 * KV)[:, None] & (d < DIM // 2)[None, :]
    if NORM:
        wq_low = tl.load(q_weight + at, mask=d < DIM // 2, other=0.0).to(tl.float32)
        wq_high = tl.load(q_weight + gap + at, mask=d < DIM // 2, other=0.0).to(tl.float32)
        wk_low = tl.load(k_weight + at, mask=d < DIM // 2, other=0.0).to(tl.float32)
        wk_high = tl.load(k_weight + gap + at, mask=d < DIM // 2, other=0.0).to(tl.float32)
    if SCALED:
        column = by_column + head[:, None] * DIM + at[None, :]
        column_low = tl.load(column, mask=inside, other=0.0)
        column_high = tl.load(column + gaps, mask=inside, other=0.0)
    begin(PDL)
    first = qkv + (token * (HEADS + 2 * KV) + head)[:, None] * DIM + at[None, :]
    if PARTS > 1:
        low = sum_parts(first, PARTS, rows * ((HEADS + 2 * KV) * DIM), inside).to(q_out.dtype.element_ty).to(tl.float32)
        high = sum_parts(first + gaps, PARTS, rows * ((HEADS + 2 * KV) * DIM), inside).to(q_out.dtype.element_ty).to(tl.float32)
    else:
        low = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(first + gaps, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(by_row + token)
        low = (low * scale * column_low).to(q_out.dtype.element_ty).to(tl.float32)
        high = (high * scale * column_high).to(q_out.dtype.element_ty).to(tl.float32)
    if NORM:
        rms = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)
        n_low = low * rms[:, None] * tl.where(is_q[:, None], wq_low[None, :], wk_low[None, :])
        n_high = high * rms[:, None] * tl.where(is_q[:, None], wq_high[None, :], wk_high[None, :])
        low = tl.where(is_v[:, None], low, n_low.to(q_out.dtype.element_ty).to(tl.float32))
        high = tl.where(is_v[:, None], high, n_high.to(q_out.dtype.element_ty).to(tl.float32))
    if ROTARY > 0:
        c = tl.load(cos + token * (ROTARY // 2) + d, mask=d < ROTARY // 2, other=1.0)[None, :]
        s = tl.load(sin + token * (ROTARY // 2) + d, mask=d < ROTARY // 2, other=0.0)[None, :]
        r_low = tl.where(is_v[:, None], low, low * c - high * s)
        r_high = tl.where(is_v[:, None], high, high * c + low * s)
    else:
        r_low, r_high = low, high
    at_q = q_out + (token * HEADS + head)[:, None] * DIM + at[None, :]
    tl.store(at_q, r_low.to(q_out.dtype.element_ty), mask=inside & is_q[:, None])
    tl.store(at_q + gaps, r_high.to(q_out.dtype.element_ty), mask=inside & is_q[:, None])
    index = tl.load(kv_index + token)
    where = (index // PAGE) * page_stride + (index % PAGE) * token_stride
    is_k = (head >= HEADS) & (head < HEADS + KV)
    at_k = keys + where + ((head - HEADS).to(tl.int64) * head_stride)[:, None] + at[None, :]
    at_v = values + where + ((head - HEADS - KV).to(tl.int64) * head_stride)[:, None] + at[None, :]
    tl.store(at_k, _stored(r_low * k_inverse, keys), mask=inside & is_k[:, None])
    tl.store(at_k + gaps, _stored(r_high * k_inverse, keys), mask=inside & is_k[:, None])
    tl.store(at_v, _stored(r_low * v_inverse, values), mask=inside & is_v[:, None])
    tl.store(at_v + gaps, _stored(r_high * v_inverse, values), mask=inside & is_v[:, None])


@triton.jit
def _stored(value, target):
    """Converted to the cache's dtype; float8 has no infinity, so what is too large becomes its largest value."""
    if target.dtype.element_ty == tl.float8e4nv:
        value = tl.clamp(value, -448.0, 448.0)
    return value.to(target.dtype.element_ty)


def prepare_heads(
    product: Product,
    rotation: Rotation | None,
    qk_norm: QKNorm | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_index: torch.Tensor,
    *,
    dtype: torch.dtype,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Normalise (if there are norms) and rotate queries and keys, write keys and values to the cache -> queries [T, H, D].

    product [T, (H + 2K) D] in any form; rotation: cos and sin f32 [T, R/2] (see `rope_tables`), which turn the first R
    dimensions, or None, where nothing turns; keys and values of one layer, views [pages, K, page_size, D] with D contiguous, of
    `dtype` or float8_e4m3fn (then value / scale is stored); kv_index i64[T]: page * page_size + offset.
    """
    qkv, by_row, by_column, parts, scaled = operand(product)
    tokens, (_, kv_heads, page_size, dim) = qkv.shape[-2], keys.shape
    heads = qkv.shape[-1] // dim - 2 * kv_heads
    q_out = torch.empty(tokens, heads, dim, dtype=dtype, device=qkv.device)
    block = 8 if tokens <= 64 else 16
    cos, sin = rotation or (qkv, qkv)
    q_weight, k_weight, eps = (qkv, qkv, 0.0) if qk_norm is None else (qk_norm.q, qk_norm.k, qk_norm.eps)
    _prepare_heads[(tokens, triton.cdiv(heads + 2 * kv_heads, block))](
        qkv, cos, sin, q_weight, k_weight, q_out, keys, values, kv_index, by_row, by_column, eps, 1.0 / k_scale, 1.0 / v_scale,
        tokens, keys.stride(0), keys.stride(1), keys.stride(2),
        HEADS=heads, KV=kv_heads, DIM=dim, ROTARY=2 * cos.shape[1] if rotation else 0, HALF=triton.next_power_of_2(dim // 2),
        BLOCK=block, PAGE=page_size, NORM=qk_norm is not None, PARTS=parts, SCALED=scaled, num_warps=4, **launch_options(qkv),
    )  # fmt: skip
    return q_out


@triton.jit(do_not_specialize=["positions"])
def _rope_tables(positions, freqs, cos, sin, amplitude, HALF: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PAD)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(freqs + d, mask=d < HALF, other=0.0)
    tl.store(cos + token * HALF + d, tl.cos(angle) * amplitude, mask=d < HALF)
    tl.store(sin + token * HALF + d, tl.sin(angle) * amplitude, mask=d < HALF)


def rope_tables(positions: torch.Tensor, freqs: torch.Tensor, amplitude: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`amplitude` times cos and sin f32 [T, R/2] of positions i64[T] times freqs f32[R/2]."""
    half = len(freqs)
    cos = torch.empty(len(positions), half, dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    _rope_tables[(len(positions),)](
        positions, freqs, cos, sin, amplitude, HALF=half, PAD=triton.next_power_of_2(half), num_warps=1,
        **launch_options(positions),
    )  # fmt: skip
    return cos, sin
