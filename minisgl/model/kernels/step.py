"""What a step's plan changes on the device, and what a decode step reads from there.

The state of every slot stays on the device; a plan's joins, grants and decode rows arrive as the very bytes of the record, in
one copy, and `apply_plan` scatters them.  A decode step finds everything else by slot: `decode_inputs` looks up each row's last
token, its position and the place of its key and value, so in steady state the host uploads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.pdl import begin, launch_options
from minisgl.model.kernels.sampling import SamplingState

JOIN_WORDS, GRANT_WORDS = 8, 3  # 32-bit words of one row of plan.JOIN and plan.GRANT


@triton.jit  # type: ignore[untyped-decorator]
def _apply_plan(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    words,
    kv_len,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    page_table,
    table_stride,
    n_join,
    n_grant,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs of BLOCK rows, joins and grants alike.  words i32: 8 for each join, then 3 for each grant."""
    begin(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    joins = i < n_join
    at = words + i * 8
    slot = tl.load(at, mask=joins, other=0)
    tl.store(kv_len + slot, tl.load(at + 1, mask=joins, other=0), mask=joins)
    tl.store(temperature + slot, tl.load(at + 2, mask=joins, other=0).to(tl.float32, bitcast=True), mask=joins)
    tl.store(top_k + slot, tl.load(at + 3, mask=joins, other=0), mask=joins)
    tl.store(top_p + slot, tl.load(at + 4, mask=joins, other=0).to(tl.float32, bitcast=True), mask=joins)
    tl.store(min_p + slot, tl.load(at + 5, mask=joins, other=0).to(tl.float32, bitcast=True), mask=joins)
    low = tl.load(at + 6, mask=joins, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(at + 7, mask=joins, other=0).to(tl.int64)
    tl.store(seed + slot, low | (high << 32), mask=joins)
    grants = i < n_grant
    at = words + n_join * 8 + i * 3
    slot = tl.load(at, mask=grants, other=0).to(tl.int64)
    index = tl.load(at + 1, mask=grants, other=0)
    page = tl.load(at + 2, mask=grants, other=0)
    tl.store(page_table + slot * table_stride + index, page, mask=grants)


def apply_plan(words: torch.Tensor, n_join: int, n_grant: int, state: SamplingState, page_table: torch.Tensor) -> None:
    """Enter joins and grants, as laid out by minisgl.plan, from words i32[8 n_join + 3 n_grant]; a slot joins at most once."""
    if n_join == 0 and n_grant == 0:
        return
    s, block = state, 128
    _apply_plan[(triton.cdiv(max(n_join, n_grant), block),)](
        words, s.kv_len, s.temperature, s.top_k, s.top_p, s.min_p, s.seed, page_table, page_table.stride(0), n_join, n_grant,
        BLOCK=block, **launch_options(words),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _decode_inputs(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    slots, last_token, kv_len, page_table, table_stride, ids, positions, kv_index, kv_lens, rows, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots + row, mask=inside, other=0).to(tl.int64)
    at = tl.load(kv_len + slot, mask=inside, other=0)
    page = tl.load(page_table + slot * table_stride + at // PAGE, mask=inside, other=0).to(tl.int64)
    tl.store(ids + row, tl.load(last_token + slot, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(positions + row, at.to(tl.int64), mask=inside)
    tl.store(kv_index + row, page * PAGE + at % PAGE, mask=inside)
    tl.store(kv_lens + row, at + 1, mask=inside)


def decode_inputs(
    slots: torch.Tensor, state: SamplingState, page_table: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For decode rows i32[R] of slots: (token ids i64[R], positions i64[R], kv_index i64[R], KV lengths after it i32[R])."""
    rows = len(slots)
    ids = torch.empty(rows, dtype=torch.int64, device=slots.device)
    positions, kv_index = torch.empty_like(ids), torch.empty_like(ids)
    kv_lens = torch.empty(rows, dtype=torch.int32, device=slots.device)
    _decode_inputs[(triton.cdiv(rows, 128),)](
        slots, state.last_token, state.kv_len, page_table, page_table.stride(0), ids, positions, kv_index, kv_lens, rows,
        PAGE=page_size, BLOCK=128, **launch_options(slots),
    )  # fmt: skip
    return ids, positions, kv_index, kv_lens
