"""Drawing the next tokens on the GPU, inside the graph of a step.

Temperature sampling by the Gumbel-max trick: argmax of logits / T + g, where g = -log(-log(u)) and u comes from Philox4x32-7
with the request's seed as the key and (token id, position) as the counter (Salmon et al., SC 2011: seven rounds pass BigCrush).
A row's token depends on its own logits, seed and position alone.  T = 0 is the argmax of the logits themselves, the smallest
token id winning ties.

top-k, top-p and min-p, in this order and after temperature, become one bound per row below which no logit may be drawn.
It is found by bisection over the *bits* of the logits (floats order as their bits do), which needs no sort, is exact, and keeps
ties as the CPU's sampler does: at most 32 passes over a row in the L2 cache, 16 for bfloat16, none for rows without filter.

Bytes: the logits once, R * V * itemsize, and once per pass for rows that filter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.pdl import INTERPRETED, begin, launch_options

_BLOCK = 4096


@triton.jit
def _key(value):
    """Order-preserving integer of a float: u32, larger for larger values."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _value(key):
    """The inverse of `_key`."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["slots"])
def _filter_bounds(
    logits,
    stride,
    vocab,
    slots,
    temperature,
    top_k,
    top_p,
    min_p,
    bounds,
    LOW_BIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row: the smallest logit that the row's filters keep, -inf without filters."""
    begin(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    t = tl.load(temperature + slot)
    k = tl.load(top_k + slot)
    p = tl.load(top_p + slot)
    floor = tl.load(min_p + slot)
    by_k = (k > 0) & (k < vocab)
    bound = tl.full([], -float("inf"), tl.float32)
    if (t > 0) & (by_k | (p < 1) | (floor > 0)):
        at = tl.arange(0, BLOCK)
        source = logits + row.to(tl.int64) * stride
        top = tl.full([BLOCK], -float("inf"), tl.float32)
        for first in range(0, vocab, BLOCK):
            top = tl.maximum(top, tl.load(source + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32))
        best = tl.max(top, 0)
        if floor > 0:
            bound = best + t * tl.log(floor)
        least = _value(tl.full([], 0x00800000, tl.uint32))  # the smallest finite value
        if by_k:
            found = tl.full([], 0, tl.uint32)
            for i in range(0, 32 - LOW_BIT):
                trial = found | (tl.full([], 0x80000000, tl.uint32) >> i)
                count = tl.zeros([BLOCK], tl.int32)
                for first in range(0, vocab, BLOCK):
                    value = tl.load(source + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32)
                    count += ((_key(value) >= trial) & (first + at < vocab)).to(tl.int32)
                if tl.sum(count, 0) >= k:
                    found = trial
            least = _value(found)
            bound = tl.maximum(bound, least)
        if p < 1:  # a share of what top-k left
            total = tl.zeros([BLOCK], tl.float32)
            for first in range(0, vocab, BLOCK):
                value = tl.load(source + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32)
                total += tl.where(value >= least, tl.exp((value - best) / t), 0.0)
            mass = tl.sum(total, 0) * p
            nucleus = tl.full([], 0, tl.uint32)
            for i in range(0, 32 - LOW_BIT):
                trial = nucleus | (tl.full([], 0x80000000, tl.uint32) >> i)
                above = tl.zeros([BLOCK], tl.float32)
                for first in range(0, vocab, BLOCK):
                    value = tl.load(source + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32)
                    above += tl.where((_key(value) >= trial) & (value >= least), tl.exp((value - best) / t), 0.0)
                if tl.sum(above, 0) >= mass:
                    nucleus = trial
            bound = tl.maximum(bound, tl.minimum(_value(nucleus), best))
    tl.store(bounds + row, bound)


@triton.jit
def gumbel_noise(bits, INTERPRET: tl.constexpr):
    """Standard Gumbel noise from 32 random bits.

    Of a hundred thousand tokens the largest noise wins, so its tail must be right: there -log(u), an exponential variable, is
    tiny and u rounds to 1.  With x = 1 - u taken from the bits, small values keep all their digits.
    """
    x = tl.minimum((bits.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 0.99999994)
    exponential = tl.where(x < 0.01, x * (1.0 + x * (0.5 + x * (1.0 / 3.0))), -_log(1.0 - x, INTERPRET))
    return -_log(exponential, INTERPRET)


@triton.jit
def _log(x, INTERPRET: tl.constexpr):
    """The processor's own logarithm, one instruction: its error of 2^-22 is harmless here."""
    if INTERPRET:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y * 0.6931471805599453


@triton.jit
def _noisy(source, index, vocab, t, bound, bits, INTERPRET: tl.constexpr):
    """Logits over temperature with Gumbel noise, plain logits where t is 0; -inf outside and below the bound."""
    value = tl.load(source + index, mask=index < vocab, other=-float("inf")).to(tl.float32)
    if t > 0:
        noisy = value * (1.0 / tl.maximum(t, 1e-6)) + gumbel_noise(bits, INTERPRET)
        value = tl.where((index < vocab) & (value >= bound), noisy, -float("inf"))
    return value


@triton.jit(do_not_specialize=["slots", "kv_lens"])
def _gumbel_argmax(
    logits,
    stride,
    vocab,
    slots,
    temperature,
    seed,
    kv_lens,
    bounds,
    best_value,
    best_index,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (row, part of the vocabulary): the best token of the part."""
    begin(PDL)
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    t = tl.load(temperature + slot)
    key, position, bound = tl.load(seed + slot), tl.load(kv_lens + row).to(tl.uint32), tl.load(bounds + row)
    # A call of Philox makes four words: quarter j of the part takes word j.
    lane = tl.arange(0, BLOCK // 4)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    a, b, c, d = zero, zero, zero, zero
    if t > 0:
        a, b, c, d = tl.philox(key, (part * (BLOCK // 4) + lane).to(tl.uint32), zero + position, zero, zero, n_rounds=7)
    source = logits + row.to(tl.int64) * stride
    index = part * BLOCK + lane
    best = _noisy(source, index, vocab, t, bound, a, INTERPRET)
    where = index
    for j in tl.static_range(1, 4):
        index += BLOCK // 4
        value = _noisy(source, index, vocab, t, bound, b if j == 1 else c if j == 2 else d, INTERPRET)
        where = tl.where(value > best, index, where)
        best = tl.maximum(best, value)
    top = tl.max(best, 0)
    first = tl.min(tl.where(best == top, where, vocab - 1), 0)  # the smallest of equals; a token also if all are NaN
    tl.store(best_value + row * parts + part, top)
    tl.store(best_index + row * parts + part, first)


@triton.jit(do_not_specialize=["slots", "targets", "tokens", "parts", "spare"])
def _commit(
    best_value,
    best_index,
    parts,
    slots,
    targets,
    tokens,
    last_token,
    kv_len,
    spare,
    ADVANCE: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row: the best of its parts becomes the slot's newest token."""
    begin(PDL)
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    value = tl.load(best_value + row * parts + part, mask=part < parts, other=-float("inf"))
    _, where = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(best_index + row * parts + tl.minimum(where, parts - 1))
    slot = tl.load(slots + row)
    tl.store(tokens + tl.load(targets + row), token)
    tl.store(last_token + slot, token)
    if ADVANCE:
        tl.store(kv_len + slot, tl.load(kv_len + slot) + 1, mask=slot != spare)  # the spare one stays where it is


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    kv_lens: torch.Tensor,
    targets: torch.Tensor,
    state: SamplingState,
    tokens: torch.Tensor,
    *,
    advance: bool,
) -> None:
    """Draw a token for each row of logits [R, V] and write it to tokens[targets[r]] and to the row's slot.

    slots, kv_lens, targets i32[R]; kv_lens[r] is the position of the new token.  `advance` adds one to the slots' KV lengths.
    """
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, _BLOCK)
    device, options = logits.device, launch_options(logits)
    bounds = torch.empty(rows, dtype=torch.float32, device=device)
    value = torch.empty(rows, parts, dtype=torch.float32, device=device)
    index = torch.empty(rows, parts, dtype=torch.int32, device=device)
    s = state
    low_bit = 16 if logits.dtype == torch.bfloat16 else 13 if logits.dtype == torch.float16 else 0
    _filter_bounds[(rows,)](
        logits, logits.stride(0), vocab, slots, s.temperature, s.top_k, s.top_p, s.min_p, bounds,
        LOW_BIT=low_bit, BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), num_warps=16, **options,
    )  # fmt: skip
    _gumbel_argmax[(rows, parts)](
        logits,
        logits.stride(0),
        vocab,
        slots,
        s.temperature,
        s.seed,
        kv_lens,
        bounds,
        value,
        index,
        BLOCK=_BLOCK,
        INTERPRET=INTERPRETED,
        **options,
    )
    _commit[(rows,)](
        value, index, parts, slots, targets, tokens, s.last_token, s.kv_len, len(s.kv_len) - 1,
        ADVANCE=advance, PARTS=triton.next_power_of_2(parts), num_warps=1, **options,
    )  # fmt: skip


class SamplingState:
    """What sampling needs of every slot, on the device; the last slot is a spare one, for the padding rows of graphs."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device)
        self.kv_len = torch.zeros(slots, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(slots, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(slots, dtype=torch.int32, device=device)
        self.top_p = torch.ones(slots, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(slots, dtype=torch.float32, device=device)
        self.seed = torch.zeros(slots, dtype=torch.int64, device=device)
