"""The small operations between the matrix products of a decoder layer, fused.

A layer is: add_rms_norm, QKV product, prepare_heads, attention, output product, add_rms_norm, gate-up product, silu_mul (part
of the product where that is ours: see linear), down product.  Bytes moved, of 2-byte elements: add_rms_norm reads 2 T C and
writes 2 T C; prepare_heads reads and writes T (H + 2K) D; silu_mul reads 2 T I and writes T I.

The first two take their input also as the f32 parts [parts, T, N] that a product with a split sum leaves (see linear), and add
them up.  What is quantised becomes the left side of an FP8 product: float8_e4m3fn values and one f32 scale a row,
value = q * scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.pdl import begin, launch_options

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@triton.jit
def _sum_parts(at, PARTS: tl.constexpr, stride, mask):
    """The sum of PARTS tiles that lie `stride` apart, in their order; all loads are in flight at once."""
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(at + part * stride, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm(
    x,
    delta,
    weight,
    out,
    scales,
    eps,
    width,
    rows,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row: x += delta (kept in x), out = x / rms(x) * weight."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    begin(PDL)
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        first = delta + row * width + at
        if PARTS > 1:
            added = _sum_parts(first, PARTS, rows * width, inside)
            value += added.to(x.dtype.element_ty).to(tl.float32)  # rounded as an unsplit product would be
        else:
            value += tl.load(first, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)  # the norm is of what is kept
        tl.store(x + row * width + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)) * w
    if QUANTIZE:
        scale = tl.maximum(tl.max(tl.abs(normed), 0), 1e-12) / 448.0
        tl.store(scales + row, scale)
        normed = normed / scale
    tl.store(out + row * width + at, normed.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, *, quantize: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, C] += delta in place, if there is one; returns RMSNorm(x) [T, C] and, with `quantize`, its scales f32[T, 1].

    delta [T, C] or f32 parts [parts, T, C].  All contiguous.
    """
    rows, width = x.shape
    out = torch.empty_like(x, dtype=FP8 if quantize else x.dtype)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device) if quantize else None
    split = delta is not None and delta.dim() == 3
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        x,
        x if delta is None else delta,
        weight,
        out,
        out if scales is None else scales,
        eps,
        width,
        rows,
        BLOCK=block,
        ADD=delta is not None,
        PARTS=len(delta) if delta is not None and split else 1,
        QUANTIZE=quantize,
        num_warps=min(16, max(4, block // 256)) if rows <= 512 else min(16, max(1, block // 512)),
        **launch_options(x),
    )
    return out, scales


@triton.jit
def gate(gate, up, out, GELU: tl.constexpr = False):
    """silu(gate) * up, rounded to the dtype of `out` at each step, as separate operations would be.

    GELU: its tanh approximation, x * (1 + tanh(u)) / 2, which is x * sigmoid(2 u) for u = sqrt(2 / pi) * (x + 0.044715 x^3).
    """
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    at = gate
    if GELU:
        at = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    act = (gate * tl.sigmoid(at)).to(out.dtype.element_ty).to(tl.float32)
    return act * up.to(out.dtype.element_ty).to(tl.float32)


@triton.jit
def _silu_mul(gate_up, out, width, BLOCK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr):
    """One program per (row, block of columns)."""
    begin(PDL)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _gated(gate_up + tl.program_id(0).to(tl.int64) * 2 * width, at, width, gate_up, GELU)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + at, value.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _gated(row, at, width, like, GELU: tl.constexpr = False):
    first = tl.load(row + at, mask=at < width, other=0.0).to(tl.float32)
    return gate(first, tl.load(row + width + at, mask=at < width, other=0.0).to(tl.float32), like, GELU)


@triton.jit
def _silu_mul_quantized(gate_up, out, scales, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    _store_quantized(_gated(gate_up + row * 2 * width, at, width, gate_up), row, at, out, scales, width)


@triton.jit
def _store_quantized(value, row, at, out, scales, width):
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, (value / scale).to(out.dtype.element_ty), mask=at < width)


def silu_mul(gate_up: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """(gate, up) [T, 2 I] -> silu(gate) * up [T, I], or with the tanh approximation of gelu.  Contiguous."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = 256 if rows <= 16 else 1024
    _silu_mul[(rows, triton.cdiv(width, block))](
        gate_up, out, width, BLOCK=block, GELU=gelu, num_warps=4, **launch_options(gate_up)
    )
    return out


def silu_mul_quantized(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `silu_mul`, into float8_e4m3fn [T, I] and scales f32 [T, 1]."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=FP8, device=gate_up.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=gate_up.device)
    block = triton.next_power_of_2(width)
    _silu_mul_quantized[(rows,)](gate_up, out, scales, width, BLOCK=block, num_warps=_warps(block), **launch_options(gate_up))
    return out, scales


@triton.jit(do_not_specialize=["rows", "kv_index"])
def _prepare_heads(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    q_out,
    keys,
    values,
    kv_index,
    eps,
    k_inverse,
    v_inverse,
    rows,
    page_stride,
    head_stride,
    token_stride,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
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
    begin(PDL)
    first = qkv + (token * (HEADS + 2 * KV) + head)[:, None] * DIM + at[None, :]
    if PARTS > 1:
        low = _sum_parts(first, PARTS, rows * ((HEADS + 2 * KV) * DIM), inside).to(q_out.dtype.element_ty).to(tl.float32)
        high = (
            _sum_parts(first + gaps, PARTS, rows * ((HEADS + 2 * KV) * DIM), inside).to(q_out.dtype.element_ty).to(tl.float32)
        )
    else:
        low = tl.load(first, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(first + gaps, mask=inside, other=0.0).to(tl.float32)
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
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_index: torch.Tensor,
    *,
    dtype: torch.dtype,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Normalise (if there are weights) and rotate queries and keys, write keys and values to the cache -> queries [T, H, D].

    qkv [T, (H + 2K) D] or f32 parts [parts, T, (H + 2K) D]; cos and sin f32 [T, R/2], which turn the first R dimensions, or
    None, where nothing turns; q_weight and k_weight [D]; keys and values of one layer, views [pages, K, page_size, D] with D
    contiguous, of `dtype` or float8_e4m3fn (then value / scale is stored); kv_index i64[T]: page * page_size + offset.
    """
    split = qkv.dim() == 3
    tokens, (_, kv_heads, page_size, dim) = qkv.shape[-2], keys.shape
    heads = qkv.shape[-1] // dim - 2 * kv_heads
    q_out = torch.empty(tokens, heads, dim, dtype=dtype, device=qkv.device)
    block = 8 if tokens <= 64 else 16
    _prepare_heads[(tokens, triton.cdiv(heads + 2 * kv_heads, block))](
        qkv,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        q_out,
        keys,
        values,
        kv_index,
        eps,
        1.0 / k_scale,
        1.0 / v_scale,
        tokens,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        HEADS=heads,
        KV=kv_heads,
        DIM=dim,
        ROTARY=0 if cos is None else 2 * cos.shape[1],
        HALF=triton.next_power_of_2(dim // 2),
        BLOCK=block,
        PAGE=page_size,
        NORM=q_weight is not None,
        PARTS=len(qkv) if split else 1,
        num_warps=4,
        **launch_options(qkv),
    )
    return q_out


@triton.jit
def _quantize_rows(x, out, scales, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    _store_quantized(value, row, at, out, scales, width)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, N] -> float8_e4m3fn [T, N] and scales f32 [T, 1], x = q * scale."""
    rows, width = x.shape
    out = torch.empty_like(x, dtype=FP8)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantize_rows[(rows,)](x, out, scales, width, BLOCK=block, num_warps=_warps(block), **launch_options(x))
    return out, scales


def _warps(block: int) -> int:
    """For a program that holds a whole row."""
    return min(16, max(4, block // 1024))


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
        positions,
        freqs,
        cos,
        sin,
        amplitude,
        HALF=half,
        PAD=triton.next_power_of_2(half),
        num_warps=1,
        **launch_options(positions),
    )  # fmt: skip
    return cos, sin
