"""Computes a mixture of experts: E small gated MLPs, and every token goes through a few of them.

Five launches and nothing on the host, so that a step with experts can be a CUDA graph: all sizes follow from the number of
tokens alone.

    route     softmax over the router's logits, and each token's likeliest experts: its TOP choices
    count     how many choices of each chunk of choices fall on each expert
    place     the choices sorted by expert, each expert's run padded to whole blocks of BLOCK_M; in a fixed order, no atomics
    first     a program per block of choices and of the expert's inner columns: silu(x gate) * (x up)
    second    the same for the down projection, times the choice's weight

The result is TOP parts [TOP, T, C], one for each rank of choice, which the next norm adds up as it does the parts of a product
with a split sum (see small_batch_matmul).

In float8 the rows before each product are quantised by a launch of its own, and both sides of the product are float8.

Bytes of a decode step: the weights of every expert that is chosen, once; few rows each, so the weights are the large side of
the tiles, as in small_batch_matmul.  Sorting into padded blocks is the idea of MegaBlocks (Gale et al., arXiv:2211.15841).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.norm_activation import gate, quantize_rows
from minisgl.model.kernels.pdl import begin, launch_options

SUB = 64  # choices that are compared with all experts at a time
MAX_CHUNKS = 64


@triton.jit
def _route(
    logits, experts, weights, E, TOP: tl.constexpr, TOP_PAD: tl.constexpr, PAD: tl.constexpr, NORMALISE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per token.  Of equal experts the first is taken."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    e, choice = tl.arange(0, PAD), tl.arange(0, TOP_PAD)
    logit = tl.load(logits + token * E + e, mask=e < E, other=-float("inf")).to(tl.float32)
    p = tl.exp(logit - tl.max(logit, 0))
    p = tl.where(e < E, p / tl.sum(p, 0), -1.0)
    chosen = tl.zeros([TOP_PAD], tl.float32)
    which = tl.zeros([TOP_PAD], tl.int32)
    for i in tl.static_range(TOP):
        best = tl.max(p, 0)
        at = tl.minimum(tl.min(tl.where(p == best, e, PAD), 0), E - 1)  # a row of NaN has no largest, but stays in bounds
        chosen = tl.where(choice == i, best, chosen)
        which = tl.where(choice == i, at, which)
        p = tl.where(e == at, -1.0, p)
    if NORMALISE:
        chosen = chosen / tl.sum(chosen, 0)
    tl.store(experts + token * TOP + choice, which, mask=choice < TOP)
    tl.store(weights + token * TOP + choice, chosen, mask=choice < TOP)


@triton.jit(do_not_specialize=["n"])
def _count(experts, counts, n, CHUNK, SUB: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr):
    """One program per chunk.  counts i32 [chunks, PAD]."""
    begin(PDL)
    first = tl.program_id(0) * CHUNK
    e = tl.arange(0, PAD)
    count = tl.zeros([PAD], tl.int32)
    for at in range(first, first + CHUNK, SUB):
        i = at + tl.arange(0, SUB)
        mine = tl.load(experts + i, mask=i < n, other=PAD)
        count += tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * PAD + e, count)


@triton.jit(do_not_specialize=["n", "n_blocks"])
def _place(
    experts, counts, order, blocks, n, n_blocks, CHUNK, CHUNKS: tl.constexpr, SUB: tl.constexpr, PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per chunk.  order i32[n_blocks * BLOCK_M]; blocks i32 [n_blocks, 2]: expert, end of its part of `order`."""
    begin(PDL)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    e, c = tl.arange(0, PAD), tl.arange(0, CHUNKS)
    count = tl.load(counts + c[:, None] * PAD + e[None, :], mask=(c < chunks)[:, None], other=0)
    total = tl.sum(count, 0)
    padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    ends = tl.cumsum(padded, 0)
    starts = ends - padded
    for at in range(chunk * SUB, n_blocks, chunks * SUB):  # each program describes some of the blocks
        b = at + tl.arange(0, SUB)
        expert = tl.sum((ends[None, :] <= (b * BLOCK_M)[:, None]).to(tl.int32), 1)  # PAD behind the last block
        end = tl.sum(tl.where(e[None, :] == expert[:, None], (starts + total)[None, :], 0), 1)
        tl.store(blocks + 2 * b, expert, mask=b < n_blocks)
        tl.store(blocks + 2 * b + 1, end, mask=b < n_blocks)
    free = starts + tl.sum(tl.where((c < chunk)[:, None], count, 0), 0)  # the next place of each expert
    for at in range(chunk * CHUNK, chunk * CHUNK + CHUNK, SUB):
        i = at + tl.arange(0, SUB)
        mine = tl.load(experts + i, mask=i < n, other=PAD)
        hit = (mine[:, None] == e[None, :]).to(tl.int32)
        place = tl.sum(hit * (free[None, :] + tl.cumsum(hit, 0) - 1), 1)
        tl.store(order + place, i, mask=i < n)
        free += tl.sum(hit, 0)


@triton.jit(do_not_specialize=["tokens"])
def _experts(
    x, weight, bias, row_scales, scales, out, weights, order, blocks, tokens, N, K, E,
    TOP: tl.constexpr, FIRST: tl.constexpr, CLAMPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per (block of N outputs, block of choices).

    FIRST: x [T, K], weight [E, 2 N, K], out [T TOP, N] gated.  Otherwise: x [T TOP, K], weight [E, N, K], out [TOP, T, N],
    times the choice's weight.  bias [E, 2 N or N], or None.  In float8: scales [E, 2 N or N] of the weight, and of x's rows.
    """
    begin(PDL)
    block = tl.program_id(1)
    expert = tl.load(blocks + 2 * block)
    if expert < E:
        place = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = place < tl.load(blocks + 2 * block + 1)
        choice = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        row = choice // TOP if FIRST else choice
        at_x = x + row[:, None] * K + k[None, :]
        height = 2 * N if FIRST else N
        at_w = weight + (expert.to(tl.int64) * height + tl.minimum(n, N - 1))[:, None] * K + k[None, :]
        up = tl.cast(N, tl.int64) * K
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        acc_up = acc
        for first in range(0, K, BLOCK_K):
            if EVEN:
                xs = tl.load(at_x, mask=inside[:, None], other=0.0)
                w = tl.load(at_w)
            else:
                xs = tl.load(at_x, mask=inside[:, None] & (first + k < K)[None, :], other=0.0)
                w = tl.load(at_w, mask=(first + k < K)[None, :], other=0.0)
            acc = tl.dot(w, tl.trans(xs), acc, input_precision=PRECISION)
            if FIRST:
                w_up = tl.load(at_w + up) if EVEN else tl.load(at_w + up, mask=(first + k < K)[None, :], other=0.0)
                acc_up = tl.dot(w_up, tl.trans(xs), acc_up, input_precision=PRECISION)
            at_x += BLOCK_K
            at_w += BLOCK_K
        column = expert.to(tl.int64) * height + n
        if scales is not None:
            of_row = tl.load(row_scales + row, mask=inside, other=0.0)[None, :]
            acc *= tl.load(scales + column, mask=n < N, other=0.0)[:, None] * of_row
            if FIRST:
                acc_up *= tl.load(scales + column + N, mask=n < N, other=0.0)[:, None] * of_row
        if bias is not None:
            acc += tl.load(bias + column, mask=n < N, other=0.0).to(tl.float32)[:, None]
            if FIRST:
                acc_up += tl.load(bias + column + N, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if FIRST:
            value, to = clamped_gate(acc, acc_up, out) if CLAMPED else gate(acc, acc_up, out), choice
        else:
            value = acc * tl.load(weights + choice, mask=inside, other=0.0)[None, :]
            to = choice % TOP * tokens + choice // TOP
        tl.store(out + to[None, :] * N + n[:, None], value.to(out.dtype.element_ty), mask=inside[None, :] & (n < N)[:, None])


@triton.jit
def clamped_gate(gate, up, out):
    """The activation of gpt-oss: see minisgl.model.common.functional.act_mul."""
    gate = tl.minimum(gate.to(out.dtype.element_ty).to(tl.float32), 7.0)
    up = tl.clamp(up.to(out.dtype.element_ty).to(tl.float32), -7.0, 7.0)
    return (up + 1) * (gate * tl.sigmoid(1.702 * gate))


@dataclass(frozen=True, slots=True)
class Weights:
    """gate_up [E, 2 I, C] and down [E, C, I], with their biases [E, 2 I] and [E, C] if they have any; all contiguous.

    In float8 they have scales f32 [E, 2 I] and [E, C] (see `in_float8`), and the rows before both products are quantised.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """`top` choices of each token, with weights that add up to one if `normalise`; `clamped`: the activation of gpt-oss."""

    top: int
    normalise: bool
    clamped: bool = False


def route(logits: torch.Tensor, top: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (experts i32 [T, top], weights f32 [T, top]), the likeliest first."""
    tokens, e = logits.shape
    experts = torch.empty(tokens, top, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top, dtype=torch.float32, device=logits.device)
    _route[(tokens,)](
        logits, experts, weights, e, TOP=top, TOP_PAD=triton.next_power_of_2(top), PAD=triton.next_power_of_2(e),
        NORMALISE=normalise, num_warps=1, **launch_options(logits),
    )  # fmt: skip
    return experts, weights


def sort(experts: torch.Tensor, e: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices i32 [T, top] of e experts -> (order i32[blocks * block_m], blocks i32 [blocks, 2]).

    Block b serves the choices order[b * block_m : blocks[b, 1]] (at most block_m of them, as indices into the flattened
    choices), all of expert blocks[b, 0]; an expert of e or more marks a block that is not needed.
    """
    n, device = experts.numel(), experts.device
    pad = triton.next_power_of_2(e)
    chunk = SUB * triton.next_power_of_2(triton.cdiv(n, SUB * MAX_CHUNKS))
    chunks = triton.cdiv(n, chunk)
    n_blocks = n // block_m + min(n, e)
    counts = torch.empty(chunks, pad, dtype=torch.int32, device=device)
    order = torch.empty(n_blocks * block_m, dtype=torch.int32, device=device)
    blocks = torch.empty(n_blocks, 2, dtype=torch.int32, device=device)
    options = launch_options(experts)
    _count[(chunks,)](experts, counts, n, chunk, SUB=SUB, PAD=pad, num_warps=4, **options)
    _place[(chunks,)](
        experts, counts, order, blocks, n, n_blocks, chunk, CHUNKS=triton.next_power_of_2(chunks), SUB=SUB, PAD=pad,
        BLOCK_M=block_m, num_warps=8, **options,
    )  # fmt: skip
    return order, blocks


def in_float8(weights: Weights) -> Weights:
    """The same in float8, with a scale for each output channel of each expert."""
    gate_up, down = (quantize_rows(w.flatten(0, 1)) for w in (weights.gate_up, weights.down))
    return replace(
        weights,
        gate_up=gate_up.values.view(weights.gate_up.shape),
        down=down.values.view(weights.down.shape),
        gate_up_scales=gate_up.scales,
        down_scales=down.scales,
    )


def choose(tokens: int, top: int, e: int, *, fp8: bool = False) -> dict[str, int]:
    """The sizes of a program, by how many choices fall on an expert.  From scripts/tune/experts.py on an H200."""
    each = tokens * top / e
    block_m, block_k = (16, 128) if each <= 8 else (32, 64) if each <= 32 else (64, 64) if each <= 64 else (128, 64)
    return {"block_m": block_m, "block_n": 64, "block_k": 128 if fp8 else block_k, "warps": 4, "stages": 3}


def experts(
    x: torch.Tensor, logits: torch.Tensor, weights: Weights, settings: Settings, sizes: dict[str, int] | None = None
) -> torch.Tensor:
    """x [T, C] and router logits [T, E], contiguous -> parts [top, T, C] of x's dtype.  `sizes`: instead of `choose`'s."""
    tokens, (e, width, inner), top = len(x), weights.down.shape, settings.top
    sizes = sizes or choose(tokens, top, e, fp8=weights.down_scales is not None)
    chosen, shares = route(logits, top, settings.normalise)
    order, blocks = sort(chosen, e, sizes["block_m"])
    hidden = torch.empty(tokens * top, inner, dtype=x.dtype, device=x.device)
    parts = torch.empty(top, tokens, width, dtype=x.dtype, device=x.device)
    for source, weight, bias, scales, out, first in (
        (x, weights.gate_up, weights.gate_up_bias, weights.gate_up_scales, hidden, True),
        (hidden, weights.down, weights.down_bias, weights.down_scales, parts, False),
    ):
        n, k = out.shape[-1], source.shape[1]
        rows, row_scales = source, None
        if scales is not None:
            quantized = quantize_rows(source)
            rows, row_scales = quantized.values, quantized.scales
        block_k = min(sizes["block_k"], max(16 if scales is None else 32, triton.next_power_of_2(k)))
        _experts[(triton.cdiv(n, sizes["block_n"]), len(blocks))](
            rows, weight, bias, row_scales, scales, out, shares, order, blocks, tokens, n, k, e,
            TOP=top, FIRST=first, CLAMPED=settings.clamped, BLOCK_M=sizes["block_m"], BLOCK_N=sizes["block_n"],
            BLOCK_K=block_k, EVEN=k % block_k == 0, PRECISION="ieee", num_warps=sizes["warps"],
            num_stages=sizes["stages"], **launch_options(x),
        )  # fmt: skip
    return parts
