"""Computes attention of decode rows, one query token each, over a paged KV cache.  Runs in the workers.

Bytes: every key and value once, 2 * kv_len * K * D * itemsize a row; nothing else of size.  The work is bound by memory, so
the kernel's one task is to keep many loads in flight: a program reads blocks of BLOCK tokens of one row and one KV head,
software-pipelined, and all query heads of the group share them.

A row is cut into `splits` even parts where there are fewer rows than processors ("flash decoding", Dao et al. 2023).  Each
part leaves its result with its softmax statistics in a workspace; the program that finishes last (a counter tells) adds the
parts up, in the order of the parts, so the result does not depend on timing.

No plan, no host: rows, page tables and lengths are read from device memory, so one CUDA graph serves every batch of its size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.float8 import halves
from minisgl.model.kernels.pdl import INTERPRETED, begin, launch_options

TOGETHER_FROM = (
    2  # rows from which the parts of all heads of a group are joined at once: measured by scripts/bench/row_counts.py
)
FLOAT32_PRECISION = "tf32x3"  # concerns float32 alone: three products of tf32 are as good as one of float32


@triton.jit(do_not_specialize=["slots", "kv_lens"])
def _decode(
    q, keys, values, page_table, slots, kv_lens, out, part_out, part_lse, counters, sinks, scale, v_scale, table_stride,
    page_stride, head_stride, token_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, FP8: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, part, row).  Scores are in base 2: `scale` includes log2(e) and the scale of the keys.

    sinks f32[H], or None; SPLITS: parts of a row, a power of two; WINDOW: the tokens that are seen, the last ones (0: all);
    SOFTCAP c: scores become c * tanh(score / c) (0: they do not).  HEADS: whose parts are joined at once, at least a group
    (CHUNK parts of each at a time), or 0: one after another.
    """
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0) * GROUP
    begin(PDL)
    n = tl.load(kv_lens + row)
    slot = tl.load(slots + row).to(tl.int64)
    if WINDOW:
        unseen = tl.maximum(n - WINDOW, 0)
        blocks = tl.cdiv(n - unseen, BLOCK)
    else:
        blocks = tl.cdiv(n, BLOCK)
    per_part = tl.cdiv(blocks, SPLITS)
    used = tl.cdiv(blocks, per_part)
    start = part * per_part * BLOCK
    if WINDOW:
        start += unseen
    end = tl.minimum(n, start + per_part * BLOCK)
    if start < end:
        g = tl.arange(0, GROUP_PAD)
        d = tl.arange(0, WIDTH_PAD)
        at_q = (row * heads + head * GROUP + g)[:, None] * DIM + d[None, :] * (DIM // WIDTH)
        in_q = (g < GROUP)[:, None] & (d < WIDTH)[None, :]
        query = tl.load(q + at_q, mask=in_q, other=0.0)
        query_odd = query
        if FP8:  # a unit of the cache is two dimensions: see `halves`
            query_odd = tl.load(q + at_q + 1, mask=in_q, other=0.0).to(tl.float16)
            query = query.to(tl.float16)
        best = tl.full([GROUP_PAD], -float("inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        if sinks is not None:  # a score without a value, in the first part
            sink = tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=0.0) * 1.4426950408889634
            best = tl.where(part == 0, sink, best)
            total = tl.where(part == 0, 1.0, total)
        acc = tl.zeros([GROUP_PAD, WIDTH_PAD], tl.float32)
        acc_odd = acc
        tokens = tl.arange(0, BLOCK)
        table = page_table + slot * table_stride
        first_key = keys + head.to(tl.int64) * head_stride
        first_value = values + head.to(tl.int64) * head_stride
        for at in range(start, end, BLOCK):
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
            score = tl.where((index < end)[None, :], scaled(score, scale, SOFTCAP), -float("inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
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
        acc, acc_odd = acc * share, acc_odd * share
        if SPLITS == 1 or used == 1:
            tl.store(out + at_q, acc.to(out.dtype.element_ty), mask=in_q)
            if FP8:
                tl.store(out + at_q + 1, acc_odd.to(out.dtype.element_ty), mask=in_q)
        else:
            # [row, head, part, DIM]
            at_part = (row * heads + head * GROUP + g) * SPLITS + part
            at_part_out = part_out + at_part[:, None] * DIM + d[None, :] * (DIM // WIDTH)
            tl.store(at_part_out, acc, mask=in_q)
            if FP8:
                tl.store(at_part_out + 1, acc_odd, mask=in_q)
            tl.store(part_lse + at_part, best + tl.log2(total), mask=g < GROUP)
            tl.debug_barrier()  # every thread's part is written before one thread says so
            ready = tl.atomic_add(counters + row * tl.num_programs(0) + head, 1, sem="acq_rel", scope="gpu")
            if ready == used - 1:
                tl.debug_barrier()
                tl.store(counters + row * tl.num_programs(0) + head, 0)  # for the next launch
                s = tl.arange(0, SPLITS)
                whole = tl.arange(0, DIM_PAD)
                if HEADS == 0:
                    for i in range(GROUP):
                        first = (row * heads + head * GROUP + i) * SPLITS
                        lse = tl.load(part_lse + first + s, mask=s < used, other=-float("inf"))
                        weight = tl.exp2(lse - tl.max(lse, 0))
                        weight = weight / tl.sum(weight, 0)
                        parts = tl.load(
                            part_out + (first + s)[:, None] * DIM + whole[None, :],
                            mask=(s < used)[:, None] & (whole < DIM)[None, :],
                            other=0.0,
                        )
                        merged = tl.sum(parts * weight[:, None], 0)
                        at_out = (row * heads + head * GROUP + i) * DIM + whole
                        tl.store(out + at_out, merged.to(out.dtype.element_ty), mask=whole < DIM)
                else:  # every load of a chunk is in flight at the same time
                    h, c = tl.arange(0, HEADS), tl.arange(0, CHUNK)
                    firsts = ((row * heads + head * GROUP + h) * SPLITS)[:, None]
                    in_heads = (h < GROUP)[:, None]
                    lses = tl.load(part_lse + firsts + s[None, :], mask=in_heads & (s < used)[None, :], other=-float("inf"))
                    top = tl.max(tl.where(in_heads, lses, 0.0), 1)[:, None]
                    weights = tl.where(in_heads, tl.sum(tl.exp2(lses - top), 1)[:, None], 1.0)
                    joined = tl.zeros([HEADS, DIM_PAD], tl.float32)
                    for at in range(0, used, CHUNK):
                        some = at + c[None, :]
                        inside = in_heads & (some < used)
                        share_of = tl.exp2(tl.load(part_lse + firsts + some, mask=inside, other=-float("inf")) - top)
                        chunk = tl.load(
                            part_out + (firsts + some)[:, :, None] * DIM + whole[None, None, :],
                            mask=inside[:, :, None] & (whole < DIM)[None, None, :],
                            other=0.0,
                        )
                        joined += tl.sum(chunk * share_of[:, :, None], 1)
                    at_outs = (row * heads + head * GROUP + h)[:, None] * DIM + whole[None, :]
                    joined = (joined / weights).to(out.dtype.element_ty)
                    tl.store(out + at_outs, joined, mask=in_heads & (whole < DIM)[None, :])


@triton.jit
def scaled(score, scale, CAP: tl.constexpr):
    """score * scale in base 2 (times log2(e)), and with a cap c * tanh(that / c), which is c - 2 c / (exp(2 that / c) + 1)."""
    score = score * scale
    if CAP > 0:
        bound: tl.constexpr = CAP * 1.4426950408889634
        score = bound - 2 * bound / (tl.exp2(score * (2.8853900817779268 / bound)) + 1)
    return score


class DecodeWorkspace:
    """Room for the parts of `rows` rows cut into `splits` parts (a power of two).

    Launches that run one after another may share it, as the layers of a step do: each leaves the counters at zero.
    """

    def __init__(
        self,
        rows: int,
        splits: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        *,
        within: DecodeWorkspace | None = None,
    ) -> None:
        """`within`: a workspace whose memory is used if it is large enough, and otherwise exceeded in every respect."""
        self.splits = splits
        parts, counters = rows * num_heads * splits if splits > 1 else 1, rows * num_kv_heads
        self.out: torch.Tensor
        self.lse: torch.Tensor
        self.counters: torch.Tensor
        if within is not None:
            if len(within.lse) >= parts and len(within.counters) >= counters:
                self.out, self.lse, self.counters = within.out, within.lse, within.counters
                return
            parts, counters = max(parts, len(within.lse)), max(counters, len(within.counters))
        self.out = torch.empty(parts * head_dim, dtype=torch.float32, device=device)
        self.lse = torch.empty(parts, dtype=torch.float32, device=device)
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    kv_lens: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    scale: float = 0.0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    block: int = 0,
    warps: int = 0,
    stages: int = 3,
) -> torch.Tensor:
    """softmax(q k^T * scale) v over the first kv_lens[r] tokens of each row -> [R, H, D], of q's dtype.

    q [R, H, D] contiguous; keys and values of one layer, equally strided views [pages, K, page_size, D] in any layout with D
    contiguous, of q's dtype or float8_e4m3fn; page_table i32 [slots, pages per slot]; slots i32[R]; kv_lens i32[R], at least 1.
    `scale` 0 is 1 / sqrt(D); `window`: the number of last tokens that are seen, 0 for all; `softcap` c: scores become
    c * tanh(score / c); `sinks` f32[H]: scores without values that take part in the softmax.
    `k_scale` and `v_scale` multiply what is stored.  Nothing but a row's own tokens is read, so no other request's NaN spreads.
    """
    rows, heads, dim = q.shape
    kv_heads, page_size = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    if not block:  # from scripts/bench/ablate_step.py --tries attention, on an H200
        block, warps = 64, 2
        if keys.dtype != q.dtype and rows > 4:
            block, warps = (64, 1) if rows > 192 else (64, 2) if rows > 128 else (64, 1) if 16 < rows <= 64 else (128, 4)
    if fp8 := keys.dtype == torch.float8_e4m3fn:
        keys, values = keys.view(torch.int16), values.view(torch.int16)
    out = torch.empty_like(q)
    together = triton.next_power_of_2(group) if rows >= TOGETHER_FROM else 0
    _decode[(kv_heads, workspace.splits, rows)](
        q, keys, values, page_table, slots, kv_lens, out, workspace.out, workspace.lse, workspace.counters, sinks,
        (scale or dim**-0.5) * 1.4426950408889634 * k_scale, v_scale, page_table.stride(0), keys.stride(0), keys.stride(1),
        keys.stride(2),
        GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), DIM=dim, DIM_PAD=triton.next_power_of_2(dim),
        WIDTH=keys.shape[-1], WIDTH_PAD=triton.next_power_of_2(keys.shape[-1]), PAGE=page_size, BLOCK=block,
        SPLITS=workspace.splits, FP8=fp8, WINDOW=window, SOFTCAP=softcap, PRECISION=FLOAT32_PRECISION, HEADS=together,
        CHUNK=max(1, min(workspace.splits, 64 // max(1, together))), INTERPRET=INTERPRETED,
        num_warps=warps, num_stages=stages, **launch_options(q),
    )  # fmt: skip
    return out


def splits_for(rows: int, kv_heads: int, max_len: int, processors: int, kv_bytes: int) -> int:
    """Parts to cut each decode row into, a power of two: programs for all processors, and no part much longer than the others.

    Several programs for each processor keep its loads in flight to the end; `kv_bytes` is 2, or 1 for a float8 cache, whose
    tokens are read in half the time.  `kv_heads` must be the same number on all ranks: the parts are part of a graph's key, and
    ranks that capture at different steps would mix up their collectives.
    """
    parts = max(1, 8 * kv_bytes * processors // (rows * kv_heads))
    return min(triton_parts(max_len), 1 << (parts.bit_length() - 1))


def triton_parts(max_len: int) -> int:
    """The most parts that make sense: at least 64 tokens in each, 64 parts at most."""
    return max(1, min(64, 1 << (max(1, max_len // 64)).bit_length() - 1))
