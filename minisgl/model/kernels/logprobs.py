"""Computes log probabilities on the GPU, of drawn tokens and of prompts' tokens, with the most likely alternatives.

One program per row reads the row's logits twice, and once more for each alternative: at most 22 passes over a row in the L2
cache, none for rows without them.  Equal logits come in the order of their ids, so nothing depends on other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from minisgl.arrays import I32
from minisgl.model.kernels.pdl import begin, launch_options
from minisgl.model.kernels.sampling import SamplingState
from minisgl.plan import StepLogprobs
from minisgl.sampling_params import MAX_LOGPROBS

_BLOCK = 4096
SCORE_WORDS = 1 + 2 * MAX_LOGPROBS  # of one row: its token's log probability, ids of alternatives, their log probabilities


@triton.jit(do_not_specialize=["slots", "tokens", "targets"])
def _score(
    logits, stride, vocab, slots, alternatives, tokens, targets, out,
    WORDS: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row: see `score`."""
    begin(PDL)
    row = tl.program_id(0)
    n = tl.load(alternatives + tl.load(slots + row))
    if n >= 0:
        target = tl.load(targets + row)
        source = logits + row.to(tl.int64) * stride
        at = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], -float("inf"), tl.float32)
        for first in range(0, vocab, BLOCK):
            top = tl.maximum(top, tl.load(source + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32))
        best = tl.max(top, 0)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab, BLOCK):
            x = tl.load(source + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32)
            total += tl.exp(x - best)
        log_total = tl.log(tl.sum(total, 0))
        own = tl.load(source + tl.maximum(tl.load(tokens + target), 0)).to(tl.float32) - best - log_total
        line = out + target * WORDS
        tl.store(line, own.to(tl.int32, bitcast=True))
        # Of the alternative before: those still to come are less likely, or as likely with a larger id.
        value, token = best + 1, tl.full([], -1, tl.int32)
        for i in range(0, n):
            top = tl.full([BLOCK], -float("inf"), tl.float32)
            where = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
            for first in range(0, vocab, BLOCK):
                x = tl.load(source + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32)
                left = (first + at < vocab) & ((x < value) | ((x == value) & (first + at > token)))
                better = left & ((x > top) | (where == 0x7FFFFFFF))
                where = tl.where(better, first + at, where)
                top = tl.where(better, x, top)
            value = tl.max(tl.where(where == 0x7FFFFFFF, -float("inf"), top), 0)
            token = tl.min(tl.where(top == value, where, 0x7FFFFFFF), 0)
            tl.store(line + 1 + i, tl.minimum(token, vocab - 1))
            tl.store(line + 1 + MOST + i, (value - best - log_total).to(tl.int32, bitcast=True))


def score(
    logits: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    state: SamplingState,
    out: torch.Tensor,
) -> None:
    """For each row of logits [R, V] whose slot returns log probabilities: score tokens[targets[r]] into out[targets[r]].

    slots, targets i32[R]; tokens i32; out i32[*, SCORE_WORDS], holding floats by their bits; other lines stay as they are.
    """
    rows, vocab = logits.shape
    _score[(rows,)](
        logits, logits.stride(0), vocab, slots, state.logprobs, tokens, targets, out, WORDS=SCORE_WORDS, MOST=MAX_LOGPROBS,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)), num_warps=16, **launch_options(logits),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """The lines of `Steps.scores` that a step has written: those of the `drawn` rows, then `targets` lines from `first` on, of
    tokens of prompts.  `width`: the largest number of alternatives of any row."""

    drawn: npt.NDArray[np.int64]
    first: int
    targets: int
    width: int

    def read(self, lines: I32) -> StepLogprobs:
        """The log probabilities in lines i32[first + targets, SCORE_WORDS] on the host."""
        mine = lines[np.concatenate((self.drawn, self.first + np.arange(self.targets)))]
        floats = mine.view(np.float32)
        end = 1 + MAX_LOGPROBS
        return StepLogprobs(floats[:, 0].copy(), mine[:, 1 : 1 + self.width].copy(), floats[:, end : end + self.width].copy())
