"""Masks logits on the GPU with what grammars allow, inside the graph of a step.

minisgl.model.cpu.penalties.restrict is its readable form.  It runs only in steps where a row has a grammar (another graph of
the same step).
Bytes: R * V * (itemsize + 4), and R * V / 8 of masks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.common.grammar import LAST_RESORT
from minisgl.model.kernels.pdl import begin, launch_options

_BLOCK = 4096


@triton.jit(do_not_specialize=["slots"])
def _restrict(
    logits, stride, vocab, slots, has_grammar, masks, words, out, LEAST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Programs (row, part of the vocabulary)."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    slot = tl.load(slots + row).to(tl.int64)
    x = tl.load(logits + row * stride + token, mask=inside, other=0).to(tl.float32)
    if tl.load(has_grammar + slot) != 0:
        word = tl.load(masks + slot * words + token // 32, mask=inside, other=0)
        x = tl.where(((word >> (token % 32)) & 1) != 0, tl.maximum(x, LEAST), -float("inf"))
    tl.store(out + row * vocab + token, x, mask=inside)


def restrict(logits: torch.Tensor, slots: torch.Tensor, has_grammar: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """f32 [R, V]: the logits [R, V] of rows of `slots` i32[R], -inf where the row's grammar forbids the token.

    has_grammar i32[slots]: not 0 for a slot with a grammar; masks i32[slots, ceil(V / 32)]: a bit for each allowed token.
    """
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    _restrict[(rows, triton.cdiv(vocab, block))](
        logits, logits.stride(0), vocab, slots, has_grammar, masks, masks.shape[1], out,
        LEAST=LAST_RESORT, BLOCK=block, **launch_options(logits),
    )  # fmt: skip
    return out
