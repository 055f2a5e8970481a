"""Drawing tokens on the GPU, in one pass over the logits and inside a CUDA graph.  Runs in the workers; needs triton.

Temperature sampling by the Gumbel-max trick: argmax of logits / T + g, where g = -log(-log(u)) and u comes from Philox4x32-10
with the request's seed as the key and (token id, position) as the counter (Salmon et al., SC 2011).  A row's token depends on
its own logits, seed and position alone.  T = 0 is the argmax of the logits themselves, the smallest token id winning ties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _gumbel_argmax(  # type: ignore[no-untyped-def]  # noqa: PLR0917  kernels are launched with positional arguments
    logits, stride, vocab, temperature, seed, position, best_value, best_index, splits, BLOCK: tl.constexpr
):
    """One program per (row, part of the vocabulary): the best token of the part."""
    row, part = tl.program_id(0), tl.program_id(1)
    t = tl.load(temperature + row)
    key = tl.load(seed + row)
    at = tl.load(position + row).to(tl.uint32)
    index = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row.to(tl.int64) * stride + index, mask=index < vocab, other=-float("inf")).to(tl.float32)
    if t > 0:
        zero = tl.zeros([BLOCK], tl.uint32)
        bits, _, _, _ = tl.philox(key, index.to(tl.uint32), zero + at, zero, zero)
        uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0) + (0.5 / 16777216.0)  # in (0, 1), never 0 or 1
        value = value / t - tl.log(-tl.log(uniform))
        value = tl.where(index < vocab, value, -float("inf"))
    best, where = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_value + row * splits + part, best)
    tl.store(best_index + row * splits + part, part * BLOCK + where)


def gumbel_sample(logits: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """i32[R] drawn from logits [R, V] (any float dtype).  temperature f32[R], seed i64[R], position i64[R]."""
    rows, vocab = logits.shape
    splits = -(-vocab // _BLOCK)
    value = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
    _gumbel_argmax[(rows, splits)](
        logits, logits.stride(0), vocab, temperature, seed, position, value, index, splits, BLOCK=_BLOCK
    )
    return index.gather(1, value.argmax(1, keepdim=True))[:, 0]


def filtered_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    *,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """As `gumbel_sample`, after top-k, top-p and min-p (in this order, after temperature).  For steps in which a row filters.

    top_k i32[R] (0: off), top_p and min_p f32[R].  Tokens as likely as the last one kept are kept too.
    """
    vocab = logits.shape[1]
    scaled = logits.float() / temperature.clamp(min=1e-6)[:, None]
    probs = torch.softmax(scaled, -1)
    ordered = probs.sort(-1, descending=True).values
    k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long()
    kth = ordered.gather(1, k[:, None] - 1)
    ordered = ordered.masked_fill(ordered < kth, 0)
    before = ordered.cumsum(-1) - ordered
    mass = ordered.sum(-1, keepdim=True) * top_p[:, None]
    kept = ((before < mass) | (top_p >= 1)[:, None]) & (ordered > 0)
    pth = ordered.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
    floor = torch.maximum(torch.maximum(kth, pth), probs.amax(-1, keepdim=True) * min_p[:, None])
    keep = (probs >= floor) | (temperature <= 0)[:, None]
    return gumbel_sample(logits.float().masked_fill(~keep, -float("inf")), temperature, seed, position)
