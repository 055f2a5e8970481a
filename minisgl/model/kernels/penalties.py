"""Applies biases and penalties to logits on the GPU; minisgl.model.cpu.penalties is the readable form of these kernels.

They run only in steps in which a row has any (another graph of the same step); rows without are copied as they are.  Adjusted
logits are float32, whatever the model's: half precision would round a small penalty away.

Bytes: R * V * (itemsize + 4), and R * V * 4 more for rows with penalties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.pdl import begin, launch_options
from minisgl.model.kernels.sampling import SamplingState

_BLOCK = 4096
_ENTRIES = 256


@triton.jit(do_not_specialize=["words", "n"])
def _forget_seen(words, n, seen, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Programs (extra, part of the vocabulary): a slot with penalties begins with nothing seen."""
    begin(PDL)
    extra = words + tl.program_id(0) * 8
    penalised = (tl.load(extra + 1) != 0) | (tl.load(extra + 2) != 0) | (tl.load(extra + 3) != 0x3F800000)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = seen + tl.load(extra).to(tl.int64) * vocab
    tl.store(row + token, tl.zeros([BLOCK], tl.int32), mask=(token < vocab) & penalised)


@triton.jit(do_not_specialize=["words", "n"])
def _enter_extras(
    words, n, presence, frequency, repetition, logprobs, n_bias, bias, bias_stride, seen, vocab,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per extra.  words i32: 8 for each extra, then for each where in `words` its biases and its history begin,
    then the biases, 3 each, and the histories."""
    begin(PDL)
    i = tl.program_id(0)
    extra = words + i * 8
    slot = tl.load(extra)
    tl.store(presence + slot, tl.load(extra + 1).to(tl.float32, bitcast=True))
    tl.store(frequency + slot, tl.load(extra + 2).to(tl.float32, bitcast=True))
    tl.store(repetition + slot, tl.load(extra + 3).to(tl.float32, bitcast=True))
    tl.store(logprobs + slot, tl.load(extra + 4))
    entries = tl.load(extra + 5)
    tl.store(n_bias + slot, entries)
    at = tl.arange(0, BLOCK)
    source = words + tl.load(words + n * 8 + 2 * i)
    target = bias + slot.to(tl.int64) * bias_stride
    for first in range(0, 3 * entries, BLOCK):
        inside = first + at < 3 * entries
        tl.store(target + first + at, tl.load(source + first + at, mask=inside, other=0), mask=inside)
    if COUNTED:
        prompt, output = tl.load(extra + 6), tl.load(extra + 7)
        history = words + tl.load(words + n * 8 + 2 * i + 1)
        row = seen + slot.to(tl.int64) * vocab
        for first in range(0, prompt, BLOCK):
            inside = first + at < prompt
            tl.atomic_or(row + tl.load(history + first + at, mask=inside, other=0), 1, mask=inside)
        for first in range(0, output, BLOCK):
            inside = first + at < output
            tl.atomic_add(row + tl.load(history + prompt + first + at, mask=inside, other=0), 2, mask=inside)


def enter_extras(words: torch.Tensor, n: int, state: SamplingState) -> None:
    """Enter `n` extras, laid out in words i32 as `_enter_extras` says; a slot at most once."""
    s, x = state, state.extras
    assert x is not None
    options = launch_options(words)
    seen = x.bias if x.seen is None else x.seen
    if x.seen is not None:
        block = min(_BLOCK, triton.next_power_of_2(x.vocab))
        _forget_seen[(n, triton.cdiv(x.vocab, block))](words, n, seen, x.vocab, BLOCK=block, **options)
    _enter_extras[(n,)](
        words, n, s.presence, s.frequency, s.repetition, s.logprobs, s.n_bias, x.bias, x.bias.stride(0), seen, x.vocab,
        COUNTED=x.seen is not None, BLOCK=_ENTRIES, **options,
    )  # fmt: skip


@triton.jit
def _penalised(x, seen, presence, frequency, repetition):
    x = tl.where(seen > 0, tl.where(x > 0, x / repetition, x * repetition), x)
    count = seen >> 1
    return x - frequency * count.to(tl.float32) - presence * (count > 0).to(tl.float32)


@triton.jit(do_not_specialize=["slots"])
def _copy_penalised(
    logits, stride, vocab, slots, presence, frequency, repetition, seen, out,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (row, part of the vocabulary)."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    x = tl.load(logits + row * stride + token, mask=inside, other=0).to(tl.float32)
    if COUNTED:
        slot = tl.load(slots + row).to(tl.int64)
        p, f, r = tl.load(presence + slot), tl.load(frequency + slot), tl.load(repetition + slot)
        if (p != 0) | (f != 0) | (r != 1):
            x = _penalised(x, tl.load(seen + slot * vocab + token, mask=inside, other=0), p, f, r)
    tl.store(out + row * vocab + token, x, mask=inside)


@triton.jit(do_not_specialize=["slots", "kv_lens"])
def _add_bias(
    logits, stride, vocab, slots, kv_lens, presence, frequency, repetition, n_bias, bias, bias_stride, seen, out,
    COUNTED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row: the few logits that have a bias, once more from the model's: the bias comes before the penalties."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(kv_lens + row)
    entries = tl.load(n_bias + slot)
    at = tl.arange(0, BLOCK)
    for first in range(0, entries, BLOCK):
        inside = first + at < entries
        entry = bias + slot * bias_stride + 3 * (first + at)
        token = tl.load(entry, mask=inside, other=0)
        value = tl.load(entry + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
        x = tl.load(logits + row * stride + token, mask=inside, other=0).to(tl.float32)
        x = tl.where(position < tl.load(entry + 2, mask=inside, other=0), -float("inf"), x + value)
        if COUNTED:
            p, f, r = tl.load(presence + slot), tl.load(frequency + slot), tl.load(repetition + slot)
            if (p != 0) | (f != 0) | (r != 1):
                x = _penalised(x, tl.load(seen + slot * vocab + token, mask=inside, other=0), p, f, r)
        tl.store(out + row * vocab + token, x, mask=inside)


def adjust(
    logits: torch.Tensor, slots: torch.Tensor, kv_lens: torch.Tensor, state: SamplingState, *, counted: bool
) -> torch.Tensor:
    """f32 [R, V]: the logits [R, V] of rows of `slots` i32[R] with the slots' biases and, if `counted`, penalties.

    kv_lens i32[R]: the positions of the tokens to be drawn.  Without `counted` no row has penalties.
    """
    s, x = state, state.extras
    assert x is not None
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    seen = x.seen if counted else x.bias
    assert seen is not None
    block, options = min(_BLOCK, triton.next_power_of_2(vocab)), launch_options(logits)
    _copy_penalised[(rows, triton.cdiv(vocab, block))](
        logits, logits.stride(0), vocab, slots, s.presence, s.frequency, s.repetition, seen, out,
        COUNTED=counted, BLOCK=block, **options,
    )  # fmt: skip
    _add_bias[(rows,)](
        logits, logits.stride(0), vocab, slots, kv_lens, s.presence, s.frequency, s.repetition, s.n_bias, x.bias,
        x.bias.stride(0), seen, out, COUNTED=counted, BLOCK=_ENTRIES, **options,
    )  # fmt: skip
    return out
