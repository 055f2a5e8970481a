"""Computes causal attention of prompt chunks over a paged KV cache, cached prefix included.  Runs in the workers.

Flops: 4 * T * S * H * D for a chunk of T tokens that sees S (half of it where the chunk is its own context).  A program holds
BLOCK_Q query tokens of all heads of one group, BLOCK_Q * GROUP rows of the matrix unit, and walks over the keys with an online
softmax (Dao et al., FlashAttention, 2022).  Which chunk and which tokens a program serves is a table made on the host
(`tiles`), padded with empty entries where a CUDA graph fixes the number of programs.

It serves short prompts inside graphs, head sizes and dtypes that FlashInfer has no kernel for, and machines without it.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from minisgl.arrays import I32
from minisgl.model.kernels.decode_attention import FLOAT32_PRECISION, scaled
from minisgl.model.kernels.float8 import halves
from minisgl.model.kernels.pdl import INTERPRETED, begin, launch_options

TILE_ROWS = 64  # rows of the matrix unit that a program fills


@triton.jit(do_not_specialize=["tiles"])
def _prefill(
    q, keys, values, page_table, tiles, out, sinks, scale, v_scale, table_stride, page_stride, head_stride, token_stride,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, tile).  tiles i32 [n, 4]: first token, tokens, slot, position of the first token.

    WINDOW: tokens that a query sees, its own included (0: all before it); `sinks` and SOFTCAP as for decode attention.
    """
    head, tile = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0) * GROUP
    begin(PDL)
    first = tl.load(tiles + tile * 4).to(tl.int64)
    count = tl.load(tiles + tile * 4 + 1)
    slot = tl.load(tiles + tile * 4 + 2).to(tl.int64)
    position = tl.load(tiles + tile * 4 + 3)
    if count > 0:
        r = tl.arange(0, ROWS)
        token, g = r // GROUP, r % GROUP
        d = tl.arange(0, WIDTH_PAD)
        in_rows = (token < count) & (token < BLOCK_Q)
        at_q = ((first + token) * heads + head * GROUP + g)[:, None] * DIM + d[None, :] * (DIM // WIDTH)
        in_q = in_rows[:, None] & (d < WIDTH)[None, :]
        query = tl.load(q + at_q, mask=in_q, other=0.0)
        query_odd = query
        if FP8:
            query_odd = tl.load(q + at_q + 1, mask=in_q, other=0.0).to(tl.float16)
            query = query.to(tl.float16)
        best = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if sinks is not None:
            best = tl.load(sinks + head * GROUP + g) * 1.4426950408889634
            total += 1.0
        acc = tl.zeros([ROWS, WIDTH_PAD], tl.float32)
        acc_odd = acc
        tokens = tl.arange(0, BLOCK)
        end = position + count
        table = page_table + slot * table_stride
        first_key = keys + head.to(tl.int64) * head_stride
        first_value = values + head.to(tl.int64) * head_stride
        first_block = 0
        if WINDOW:
            first_block = tl.maximum(position - WINDOW + 1, 0) // BLOCK * BLOCK
        for at in range(first_block, end, BLOCK):
            index = at + tokens
            own = tl.minimum(index, end - 1)  # what is masked out below reads the row's own last token, never others' pages
            page = tl.load(table + own // PAGE).to(tl.int64)
            where = (page * page_stride + (own % PAGE) * token_stride)[:, None] + d[None, :]
            if WIDTH == WIDTH_PAD:
                k = tl.load(first_key + where)
                v = tl.load(first_value + where)
            else:
                k = tl.load(first_key + where, mask=(d < WIDTH)[None, :], other=0)
                v = tl.load(first_value + where, mask=(d < WIDTH)[None, :], other=0)
            if FP8:
                k_even, k_odd = halves(k, INTERPRET)
                score = tl.dot(query, tl.trans(k_even)) + tl.dot(query_odd, tl.trans(k_odd))
            else:
                score = tl.dot(query, tl.trans(k), input_precision=PRECISION)
            score = tl.where(index[None, :] <= position + token[:, None], scaled(score, scale, SOFTCAP), -float("inf"))
            if WINDOW:
                score = tl.where(index[None, :] > position + token[:, None] - WINDOW, score, -float("inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
            if WINDOW:  # a block may lie before all that a row sees: infinity less infinity is no number
                new_best = tl.maximum(new_best, -1e30)
            shrink = tl.exp2(best - new_best)
            p = tl.exp2(score - new_best[:, None])
            total = total * shrink + tl.sum(p, 1)
            if FP8:
                v_even, v_odd = halves(v, INTERPRET)
                acc = tl.dot(p.to(tl.float16), v_even, acc * shrink[:, None])
                acc_odd = tl.dot(p.to(tl.float16), v_odd, acc_odd * shrink[:, None])
            else:
                acc = tl.dot(p.to(query.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            best = new_best
        share = (v_scale / total)[:, None]
        tl.store(out + at_q, (acc * share).to(out.dtype.element_ty), mask=in_q)
        if FP8:
            tl.store(out + at_q + 1, (acc_odd * share).to(out.dtype.element_ty), mask=in_q)


def block_q(group: int) -> int:
    """Query tokens of one tile, for `group` query heads per KV head."""
    return max(1, TILE_ROWS // group)


def tiles_of(chunk_lens: I32, slots: I32, kv_lens: I32, group: int, pad_to: int = 0) -> I32:
    """The tiles i32 [n, 4] of chunks of chunk_lens[i] tokens of slots[i] that end at kv_lens[i]; longest contexts first."""
    size = block_q(group)
    counts = -(-chunk_lens // size)
    chunk = np.repeat(np.arange(len(chunk_lens)), counts)
    offset = (np.arange(len(chunk)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    starts = np.cumsum(chunk_lens) - chunk_lens
    tiles = np.zeros((max(pad_to, len(chunk)), 4), np.int32)
    filled = tiles[: len(chunk)]
    filled[:, 0] = starts[chunk] + offset
    filled[:, 1] = np.minimum(size, chunk_lens[chunk] - offset)
    filled[:, 2] = slots[chunk]
    filled[:, 3] = (kv_lens - chunk_lens)[chunk] + offset
    filled[:] = filled[np.argsort(-filled[:, 3], kind="stable")]
    return tiles


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    tiles: torch.Tensor,
    *,
    scale: float = 0.0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Each token attends to the keys of its slot up to its own position -> [T, H, D].  The chunk's keys are in the cache.

    q [T, H, D] contiguous; keys, values, page_table, scales, soft cap and sinks as for decode_attention; `window`: tokens that
    a query sees, its own included, 0 for all; tiles: see `tiles_of`.
    """
    _, heads, dim = q.shape
    kv_heads, page_size = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    if fp8 := keys.dtype == torch.float8_e4m3fn:
        keys, values = keys.view(torch.int16), values.view(torch.int16)
    rows = max(TILE_ROWS, triton.next_power_of_2(group))
    line = triton.next_power_of_2(keys.shape[-1]) * keys.element_size()
    block = 64 if line <= 256 else 32 if line <= 512 else 16  # so that keys and values fit into shared memory
    out = torch.empty_like(q)
    _prefill[(kv_heads, len(tiles))](
        q, keys, values, page_table, tiles, out, sinks, (scale or dim**-0.5) * 1.4426950408889634 * k_scale, v_scale,
        page_table.stride(0), keys.stride(0), keys.stride(1), keys.stride(2),
        GROUP=group, BLOCK_Q=block_q(group), ROWS=rows, DIM=dim, WIDTH=keys.shape[-1],
        WIDTH_PAD=triton.next_power_of_2(keys.shape[-1]), PAGE=page_size,
        BLOCK=block, FP8=fp8, WINDOW=window, SOFTCAP=softcap, PRECISION=FLOAT32_PRECISION,
        INTERPRET=INTERPRETED, num_warps=4, num_stages=2, **launch_options(q),
    )  # fmt: skip
    return out
