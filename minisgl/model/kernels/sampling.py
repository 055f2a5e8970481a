"""Samples the next tokens on the GPU, inside the graph of a step: temperature, top-k, top-p, min-p.

A drawn token is where the cumulative distribution, in the order of the vocabulary, passes the row's random number, as on the
CPU and with the same number: 53 bits of Philox4x32-10 with the request's seed as the key and the position as the counter
(Salmon et al., SC 2011).  That needs one exponential a token and no noise: a first kernel weighs parts of the vocabulary, a
second one finds the part, and the token in it.  A row's token depends on its own logits, parameters, seed and position alone.
T = 0 is the largest logit, the smallest token id winning ties.  A row with NaN or +inf among its logits gets NOT_A_NUMBER.

top-k, top-p and min-p, in this order and after temperature, become one bound per row below which no logit may be drawn.
It is found by bisection over the *bits* of the logits (floats order as their bits do), which needs no sort, is exact, and keeps
ties as the CPU's sampler does: at most 32 passes over a row in the L2 cache, 16 for bfloat16, none for rows without filter.

Bytes: the logits once, R * V * itemsize, and once per pass for rows that filter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.common.memory import MAX_BIAS
from minisgl.model.kernels.pdl import begin, launch_options
from minisgl.plan import NOT_A_NUMBER

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
    logits, stride, vocab, slots, temperature, top_k, top_p, min_p, bounds,
    LOW_BIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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


@triton.jit(do_not_specialize=["slots"])
def _weigh(
    logits, stride, vocab, slots, temperature, bounds, best_value, best_index, weights,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (row, part of the vocabulary): its most likely token, and what the part weighs in the draw, as a sum of
    exp((logit - the part's largest) / T)."""
    begin(PDL)
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row)
    t, bound = tl.load(temperature + slot), tl.load(bounds + row)
    index = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row.to(tl.int64) * stride + index, mask=index < vocab, other=-float("inf")).to(tl.float32)
    finite = tl.min((value < float("inf")).to(tl.int32), 0) > 0  # NaN is not
    top = tl.where(finite, tl.max(value, 0), float("inf"))
    first = tl.min(tl.where(value == top, index, vocab - 1), 0)  # the smallest of equals; a token also if all are NaN
    tl.store(best_value + row * parts + part, top)
    tl.store(best_index + row * parts + part, first)
    if t > 0:
        tl.store(weights + row * parts + part, tl.sum(_weight(value, top, bound, t), 0))


@triton.jit
def _weight(value, top, bound, t):
    """Of a token in the draw, relative to one with the logit `top`."""
    shift = tl.where(top == -float("inf"), 0.0, top)  # nothing is left
    return tl.where(value >= bound, tl.exp((value - shift) / t), 0.0)


@triton.jit(do_not_specialize=["slots", "kv_lens", "targets", "tokens", "parts", "spare"])
def _draw(
    logits, stride, vocab, best_value, best_index, weights, parts, slots, temperature, seed, kv_lens, bounds, targets, tokens,
    last_token, kv_len, spare, seen, presence, frequency, repetition,
    ADVANCE: tl.constexpr, COUNTED: tl.constexpr, NONE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row: its token is drawn, from its parts and then within one, and becomes the slot's newest; it is counted
    if the slot has penalties."""
    begin(PDL)
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    value = tl.load(best_value + row * parts + part, mask=part < parts, other=-float("inf"))
    slot = tl.load(slots + row)
    t = tl.load(temperature + slot)
    top, best = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(best_index + row * parts + tl.minimum(best, parts - 1))
    if t > 0:
        zero = tl.zeros([1], tl.uint32)
        a, b, _, _ = tl.philox(tl.load(seed + slot), zero + tl.load(kv_lens + row).to(tl.uint32), zero, zero, zero)
        u = ((a >> 5).to(tl.float64) * 67108864.0 + (b >> 6).to(tl.float64)) * 1.1102230246251565e-16  # 53 bits
        weight = tl.load(weights + row * parts + part, mask=part < parts, other=0.0)
        weight = (weight * _weight(value, top, -float("inf"), t)).to(tl.float64)
        weight = tl.where(part < parts, weight, 0.0)
        passed = tl.cumsum(weight, 0)
        target = u * tl.sum(weight, 0)
        chosen = tl.sum((passed <= target).to(tl.int32), 0)
        chosen = tl.minimum(chosen, tl.max(tl.where(weight > 0, part, 0), 0))  # where rounding passes the end
        left = target - tl.max(tl.where(part < chosen, passed, 0.0), 0)
        at = tl.arange(0, BLOCK)
        index = chosen * BLOCK + at
        bound = tl.load(bounds + row)
        source = logits + row.to(tl.int64) * stride
        inside = tl.load(source + index, mask=index < vocab, other=-float("inf")).to(tl.float32)
        weight = _weight(inside, top, bound, t).to(tl.float64)
        place = tl.sum((tl.cumsum(weight, 0) <= left).to(tl.int32), 0)
        token = chosen * BLOCK + tl.minimum(place, tl.max(tl.where(weight > 0, at, 0), 0))
    token = tl.where(top == float("inf"), 0, token)
    tl.store(tokens + tl.load(targets + row), tl.where(top == float("inf"), NONE, token))
    tl.store(last_token + slot, token)
    if COUNTED:
        penalised = tl.load(presence + slot) != 0
        penalised |= (tl.load(frequency + slot) != 0) | (tl.load(repetition + slot) != 1)
        counter = seen + slot.to(tl.int64) * vocab + token
        tl.store(counter, tl.load(counter, mask=penalised, other=0) + 2, mask=penalised)
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
    counted: bool = False,
) -> None:
    """Draw a token for each row of logits [R, V] and write it to tokens[targets[r]] and to the row's slot.

    slots, kv_lens, targets i32[R]; kv_lens[r] is the position of the new token.  `advance` adds one to the slots' KV lengths;
    `counted` counts the tokens of slots with penalties.
    """
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, _BLOCK)
    device, options = logits.device, launch_options(logits)
    bounds = torch.empty(rows, dtype=torch.float32, device=device)
    value = torch.empty(rows, parts, dtype=torch.float32, device=device)
    weights = torch.empty_like(value)
    index = torch.empty(rows, parts, dtype=torch.int32, device=device)
    s = state
    low_bit = 16 if logits.dtype == torch.bfloat16 else 13 if logits.dtype == torch.float16 else 0
    _filter_bounds[(rows,)](
        logits, logits.stride(0), vocab, slots, s.temperature, s.top_k, s.top_p, s.min_p, bounds,
        LOW_BIT=low_bit, BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), num_warps=16, **options,
    )  # fmt: skip
    _weigh[(rows, parts)](
        logits, logits.stride(0), vocab, slots, s.temperature, bounds, value, index, weights, BLOCK=_BLOCK, **options,
    )  # fmt: skip
    seen = s.extras.seen if counted and s.extras is not None else tokens
    _draw[(rows,)](
        logits, logits.stride(0), vocab, value, index, weights, parts, slots, s.temperature, s.seed, kv_lens, bounds, targets,
        tokens, s.last_token, s.kv_len, len(s.kv_len) - 1, seen, s.presence, s.frequency, s.repetition,
        ADVANCE=advance, COUNTED=counted, NONE=NOT_A_NUMBER, PARTS=triton.next_power_of_2(parts), BLOCK=_BLOCK, **options,
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
        self.presence = torch.zeros(slots, dtype=torch.float32, device=device)
        self.frequency = torch.zeros(slots, dtype=torch.float32, device=device)
        self.repetition = torch.ones(slots, dtype=torch.float32, device=device)
        self.logprobs = torch.full((slots,), -1, dtype=torch.int32, device=device)  # alternatives to return
        self.n_bias = torch.zeros(slots, dtype=torch.int32, device=device)
        self.extras: Extras | None = None  # made when the first request has biases, penalties or log probabilities


class Extras:
    """Biases and counts of every slot.  Made once and kept: graphs hold the addresses."""

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self.vocab = vocab
        self.bias = torch.zeros(slots, 3 * MAX_BIAS, dtype=torch.int32, device=device)  # rows of plan.BIAS
        self.seen: torch.Tensor | None = None  # i32 [slots, vocab], see minisgl.model.cpu.penalties; for penalties

    def count(self) -> None:
        """Make `seen`, if it is missing."""
        if self.seen is None:
            self.seen = torch.zeros(len(self.bias), self.vocab, dtype=torch.int32, device=self.bias.device)
