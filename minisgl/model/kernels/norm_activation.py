"""Fuses the small operations between a decoder layer's matrix products: residual, RMSNorm, SiLU, quantisation.

A layer is: add_rms_norm, QKV product, prepare_heads (qk_norm_rope), attention, output product, add_rms_norm, gate-up product,
silu_mul (part of the product where that is ours: small_batch_matmul), down product.

Bytes: of 2-byte elements, add_rms_norm reads 2 T C and writes 2 T C; silu_mul reads 2 T I and writes T I.

add_rms_norm and prepare_heads also take their input as the f32 parts [parts, T, N] of a product with a split sum, and add them
up; every function also takes it as an FP8 product leaves it (see activations).  Quantised rows are the left side of such a
product: float8_e4m3fn values and one f32 scale a row, value = q * scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.common.activations import Product, Quantized, Scaled
from minisgl.model.kernels.activations import operand
from minisgl.model.kernels.pdl import begin, launch_options

FP8 = torch.float8_e4m3fn
SPARE_ROWS = 24  # rows of the smallest buffer of quantised rows: the library's products take longer with 16 rows and fewer


def empty_quantized(rows: int, width: int, device: torch.device) -> Quantized:
    """Room for `rows` quantised rows, at the start of buffers of at least SPARE_ROWS rows: see `with_spare_rows`."""
    room = max(rows, SPARE_ROWS)
    scales = torch.empty(room, 1, dtype=torch.float32, device=device)
    return Quantized(torch.empty(room, width, dtype=FP8, device=device)[:rows], scales[:rows])


def with_spare_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """A tensor of `empty_quantized` with arbitrary rows behind its own, if it has fewer than `rows` (at most SPARE_ROWS)."""
    return x if len(x) >= rows else x.as_strided((rows, x.shape[1]), x.stride())


@triton.jit
def sum_parts(at, PARTS: tl.constexpr, stride, mask):
    """The sum of PARTS tiles that lie `stride` apart, in their order; all loads are in flight at once."""
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(at + part * stride, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def product_row(first, stride, scale, columns, inside, PARTS: tl.constexpr, SCALED: tl.constexpr):
    """f32 values of a row of a product in any form: parts `stride` apart, or values times the row's scale and `columns`."""
    value = sum_parts(first, PARTS, stride, inside)
    if SCALED:
        value = value * tl.load(scale) * columns
    return value


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm(
    x, delta, weight, out, scales, delta_rows, delta_columns, eps, width, rows,
    BLOCK: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per row: x += delta (kept in x), out = x / rms(x) * weight."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    columns = 1.0
    if SCALED:
        columns = tl.load(delta_columns + at, mask=inside, other=0.0)
    begin(PDL)
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = product_row(delta + row * width + at, rows * width, delta_rows + row, columns, inside, PARTS, SCALED)
        value += added.to(x.dtype.element_ty).to(tl.float32)  # rounded as a plain product is
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
    x: torch.Tensor, delta: Product | None, weight: torch.Tensor, eps: float, *, quantize: bool = False
) -> torch.Tensor | Quantized:
    """x [T, C] += delta in place, if there is one; returns RMSNorm(x) [T, C], or with `quantize` in float8.

    All tensors are contiguous.
    """
    rows, width = x.shape
    quantized = empty_quantized(rows, width, x.device) if quantize else None
    out = torch.empty_like(x) if quantized is None else quantized.values
    added = operand(x if delta is None else delta)
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        x, added.values, weight, out, out if quantized is None else quantized.scales, added.rows, added.columns, eps, width,
        rows, BLOCK=block, ADD=delta is not None, PARTS=added.parts, SCALED=added.scaled, QUANTIZE=quantize,
        num_warps=min(16, max(4, block // 256)) if rows <= 512 else min(16, max(1, block // 512)), **launch_options(x),
    )  # fmt: skip
    return quantized or out


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
    row = gate_up + tl.program_id(0).to(tl.int64) * 2 * width
    first, second = tl.load(row + at, mask=at < width, other=0.0), tl.load(row + width + at, mask=at < width, other=0.0)
    value = gate(first, second, gate_up, GELU)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + at, value.to(out.dtype.element_ty), mask=at < width)


def silu_mul(gate_up: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """(gate, up) [T, 2 I] -> silu(gate) * up [T, I], or with the tanh approximation of gelu.  Contiguous."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = 256 if rows <= 16 else 1024
    _silu_mul[(rows, triton.cdiv(width, block))](
        gate_up, out, width, BLOCK=block, GELU=gelu, num_warps=4, **launch_options(gate_up)
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _silu_mul_largest(
    gate_up, out, largest, by_row, by_column, width, rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows and block of columns: the values, and the largest of each row's block, f32 [blocks, rows].

    Several rows, because the scales of the columns are twice as many bytes as a row.
    """
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows)[:, None] & (at < width)
    known = tl.minimum(row, rows - 1)[:, None]
    first = tl.load(gate_up + known * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(gate_up + known * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(by_row + known)
        first *= scale * tl.load(by_column + at, mask=at < width, other=0.0)
        second *= scale * tl.load(by_column + width + at, mask=at < width, other=0.0)
    value = gate(first, second, gate_up)
    tl.store(largest + tl.program_id(1) * rows + row, tl.max(tl.abs(value), 1), mask=row < rows)
    tl.store(out + known * width + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _quantize_blocks(
    x, largest, out, scales, width, blocks, rows,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The second half, by the same blocks."""
    begin(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows)[:, None] & (at < width)
    b = tl.arange(0, BLOCKS)
    value = tl.load(x + row[:, None] * width + at, mask=inside, other=0.0).to(tl.float32)
    found = tl.load(largest + b[None, :] * rows + row[:, None], mask=(row < rows)[:, None] & (b < blocks)[None, :], other=0.0)
    scale = tl.maximum(tl.max(found, 1), 1e-12) / 448.0
    if tl.program_id(1) == 0:
        tl.store(scales + row, scale, mask=row < rows)
    tl.store(out + row[:, None] * width + at, (value / scale[:, None]).to(out.dtype.element_ty), mask=inside)


def silu_mul_quantized(gate_up: torch.Tensor | Scaled) -> Quantized:
    """As `silu_mul`, into float8_e4m3fn.

    Two kernels, because one that holds a whole row, or walks over it twice, keeps too few bytes in flight: at 16,384 rows of
    17,408 it took 1.1 ms, twice what the bytes of the two do.
    """
    values, by_row, by_column, _, scaled = operand(gate_up)
    rows, width = len(values), values.shape[1] // 2
    tile, block = (4 if rows > 64 else 1), 1024
    grid = (triton.cdiv(rows, tile), triton.cdiv(width, block))
    gated = torch.empty(rows, width, dtype=values.dtype, device=values.device)
    largest = torch.empty(grid[1], rows, dtype=torch.float32, device=values.device)
    out = empty_quantized(rows, width, values.device)
    options = launch_options(values)
    _silu_mul_largest[grid](
        values, gated, largest, by_row, by_column, width, rows, ROWS=tile, BLOCK=block, SCALED=scaled,
        num_warps=4, **options,
    )  # fmt: skip
    _quantize_blocks[grid](
        gated, largest, out.values, out.scales, width, grid[1], rows, ROWS=tile, BLOCK=block,
        BLOCKS=triton.next_power_of_2(grid[1]), num_warps=4, **options,
    )  # fmt: skip
    return out


@triton.jit
def _quantize_rows(x, out, scales, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, (value / scale).to(out.dtype.element_ty), mask=at < width)


def quantize_rows(x: torch.Tensor) -> Quantized:
    """x [T, N] to float8_e4m3fn."""
    rows, width = x.shape
    out = empty_quantized(rows, width, x.device)
    block = triton.next_power_of_2(width)
    warps = min(16, max(4, block // 1024))
    _quantize_rows[(rows,)](x, out.values, out.scales, width, BLOCK=block, num_warps=warps, **launch_options(x))
    return out
