"""Applies a plan to the state of the slots on the device, and looks up there what a step needs.

The state of every slot stays on the device; a plan's new slots, page grants and decode rows arrive as the bytes of the record,
in one copy, and `apply_plan` scatters them.  A decode step finds everything else by slot: `decode_inputs` looks up each row's
last token, its position and the place of its key and value, so in steady state the host uploads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.pdl import begin, launch_options
from minisgl.model.kernels.sampling import SamplingState


@triton.jit(do_not_specialize=["words", "n_new_slots", "n_page_grants"])
def _apply_plan(
    words, kv_len, temperature, top_k, top_p, min_p, seed, page_table, table_stride, n_new_slots, n_page_grants,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs of BLOCK rows.  words i32: 8 for each new slot, then 3 for each page grant."""
    begin(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    new_slots = i < n_new_slots
    at = words + i * 8
    slot = tl.load(at, mask=new_slots, other=0)
    tl.store(kv_len + slot, tl.load(at + 1, mask=new_slots, other=0), mask=new_slots)
    tl.store(temperature + slot, tl.load(at + 2, mask=new_slots, other=0).to(tl.float32, bitcast=True), mask=new_slots)
    tl.store(top_k + slot, tl.load(at + 3, mask=new_slots, other=0), mask=new_slots)
    tl.store(top_p + slot, tl.load(at + 4, mask=new_slots, other=0).to(tl.float32, bitcast=True), mask=new_slots)
    tl.store(min_p + slot, tl.load(at + 5, mask=new_slots, other=0).to(tl.float32, bitcast=True), mask=new_slots)
    low = tl.load(at + 6, mask=new_slots, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(at + 7, mask=new_slots, other=0).to(tl.int64)
    tl.store(seed + slot, low | (high << 32), mask=new_slots)
    page_grants = i < n_page_grants
    at = words + n_new_slots * 8 + i * 3
    slot = tl.load(at, mask=page_grants, other=0).to(tl.int64)
    index = tl.load(at + 1, mask=page_grants, other=0)
    page = tl.load(at + 2, mask=page_grants, other=0)
    tl.store(page_table + slot * table_stride + index, page, mask=page_grants)


def apply_plan(
    words: torch.Tensor, n_new_slots: int, n_page_grants: int, state: SamplingState, page_table: torch.Tensor
) -> None:
    """Enter new slots and page grants as minisgl.plan lays them out; a slot is new at most once.

    words i32[8 n_new_slots + 3 n_page_grants].
    """
    if n_new_slots == 0 and n_page_grants == 0:
        return
    s, block = state, 128
    _apply_plan[(triton.cdiv(max(n_new_slots, n_page_grants), block),)](
        words, s.kv_len, s.temperature, s.top_k, s.top_p, s.min_p, s.seed, page_table, page_table.stride(0),
        n_new_slots, n_page_grants,
        BLOCK=block, **launch_options(words),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _decode_inputs(
    slots, last_token, kv_len, page_table, table_stride, ids, positions, kv_index, kv_lens, rows,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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


@triton.jit(
    do_not_specialize=[
        "raw_ids",
        "raw_positions",
        "raw_index",
        "ids",
        "positions",
        "kv_index",
        "tokens",
        "row_slots",
        "row_lens",
        "rows",
    ]
)
def _mixed_inputs(
    raw_ids, raw_positions, raw_index, last_token, ids, positions, kv_index, tokens, row_slots, row_lens, kv_len, rows,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    token = tl.load(raw_ids + at, mask=inside, other=0)
    newest = tl.load(last_token + tl.maximum(-1 - token, 0), mask=inside & (token < 0), other=0)
    tl.store(ids + at, tl.where(token < 0, newest, token).to(tl.int64), mask=inside)
    tl.store(positions + at, tl.load(raw_positions + at, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(kv_index + at, tl.load(raw_index + at, mask=inside, other=0).to(tl.int64), mask=inside)
    slot = tl.load(row_slots + at, mask=at < rows, other=0)
    tl.store(kv_len + slot, tl.load(row_lens + at, mask=at < rows, other=0), mask=at < rows)


def mixed_inputs(
    raw_ids: torch.Tensor,
    raw_positions: torch.Tensor,
    raw_index: torch.Tensor,
    row_slots: torch.Tensor,
    row_lens: torch.Tensor,
    state: SamplingState,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids, positions, kv_index), i64[T] each, of a step with prompt chunks; enters the rows' KV lengths.

    All inputs i32; an id of -1 - s stands for the last token of slot s.
    """
    tokens, rows = len(raw_ids), len(row_slots)
    out = torch.empty(3, tokens, dtype=torch.int64, device=raw_ids.device)
    _mixed_inputs[(triton.cdiv(max(tokens, rows), 256),)](
        raw_ids, raw_positions, raw_index, state.last_token, out[0], out[1], out[2], tokens, row_slots, row_lens,
        state.kv_len, rows, BLOCK=256, **launch_options(raw_ids),
    )  # fmt: skip
    return out[0], out[1], out[2]
