"""Samples the next token of every row, and computes log probabilities.  Runs in the CPU workers.

The same logits give the same tokens on all ranks.  A row's token depends on its logits, its parameters and (seed, position)
alone, never on the other rows of the batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from minisgl.arrays import I32, I64
from minisgl.model.common.slots import U64, SamplingRows
from minisgl.plan import NOT_A_NUMBER, StepLogprobs

CANDIDATES = 256  # most likely tokens that are tried before the full vocabulary is sorted

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # multipliers and key increments of Philox4x32
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(key: U64, counter: U64) -> tuple[U64, U64, U64, U64]:
    """Philox4x32-10: four random 32-bit words per (key, counter), elementwise; the counter's upper 64 bits are zero.

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    k0, k1 = key & _LOW, key >> _32
    zero = np.zeros_like(key)
    c0, c1, c2, c3 = counter & _LOW, counter >> _32, zero, zero
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def uniform(seed: U64, positions: I64) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row, with 53 random bits, from (seed, position)."""
    a, b, _, _ = philox(seed, positions.astype(np.uint64))
    high, low = a >> np.uint64(5), b >> np.uint64(6)
    u: npt.NDArray[np.float64] = (high * 2.0**26 + low) * 2.0**-53
    return u


def sample(logits: torch.Tensor, rows: SamplingRows) -> I32:
    """Sample one token per row of `logits` [R, V] -> i32[R].

    Temperature 0 takes the most likely token.  Otherwise temperature, top-k, top-p and min-p apply in this order, and the
    token is where the cumulative distribution, in the order of the vocabulary, passes the row's random number.  Tokens as
    likely as the last one that a filter keeps are also kept, so no order of sorting matters.  A row with NaN or infinity among
    its logits has NOT_A_NUMBER for a token.
    """
    tokens = np.empty(len(logits), np.int32)
    greedy = rows.temperature <= 0
    if greedy.any():
        picked = logits if greedy.all() else logits[torch.from_numpy(greedy)]
        best = picked.argmax(-1)  # of a NaN, if there is one
        finite = picked.gather(1, best[:, None])[:, 0] < torch.inf
        tokens[greedy] = best.where(finite, NOT_A_NUMBER).numpy()
    drawn = np.flatnonzero(~greedy)
    if len(drawn):
        tokens[drawn] = _draw(logits[torch.from_numpy(drawn)].float(), rows, drawn)
    return tokens


def _draw(logits: torch.Tensor, rows: SamplingRows, drawn: I64) -> npt.NDArray[np.int64]:
    """Inverse-CDF draws for the rows `drawn`, whose logits are f32[N, V]."""
    temperature = torch.from_numpy(rows.temperature[drawn])[:, None]
    # The maximum is subtracted first, so that no temperature overflows the exponent.
    top = logits.amax(-1, keepdim=True)
    probs = torch.softmax((logits - top) / temperature, -1)
    floor = _floor(probs, rows.top_k[drawn], rows.top_p[drawn], rows.min_p[drawn])
    if floor is not None:
        probs = probs.masked_fill_(probs < floor[:, None], 0)
    cdf = probs.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    u = torch.from_numpy(uniform(rows.seed[drawn], rows.positions[drawn]))[:, None]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cdf, target, right=True)[:, 0]  # the first token whose cumulative probability exceeds it
    index.clamp_(max=logits.shape[1] - 1)
    drawn_tokens: npt.NDArray[np.int64] = index.where(top[:, 0] < torch.inf, NOT_A_NUMBER).numpy()
    return drawn_tokens


def _floor(
    probs: torch.Tensor, top_k: I32, top_p: npt.NDArray[np.float32], min_p: npt.NDArray[np.float32]
) -> torch.Tensor | None:
    """The smallest probability that survives each row's filters, f32[N]; None if no row has any."""
    vocab = probs.shape[1]
    sorts = ((top_k > 0) & (top_k < vocab)) | (top_p < 1)
    if not sorts.any() and not (min_p > 0).any():
        return None
    floor = probs.amax(-1) * torch.from_numpy(min_p)
    todo = np.flatnonzero(sorts)
    for width in (min(CANDIDATES, vocab), vocab):  # the candidates nearly always decide; otherwise the row is sorted
        if len(todo) == 0:
            break
        at = torch.from_numpy(todo)
        best = torch.topk(probs[at], width).values if width < vocab else torch.sort(probs[at], descending=True).values
        kept, decided = _kept(best, top_k[todo], top_p[todo], vocab)
        done = at[decided]
        floor[done] = torch.maximum(floor[done], kept[decided])
        todo = todo[~decided.numpy()]
    return floor


def _kept(best: torch.Tensor, top_k: I32, top_p: npt.NDArray[np.float32], vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest probability that top-k and top-p keep, and whether `best` was enough to decide it; both [N].

    best: [N, width], each row's largest probabilities, descending.
    """
    width = best.shape[1]
    complete = width == vocab
    has_k = torch.from_numpy((top_k > 0) & (top_k < vocab))
    k = torch.from_numpy(np.clip(top_k, 1, width).astype(np.int64))
    kth = torch.where(has_k, best.gather(1, k[:, None] - 1)[:, 0], 0.0)
    # All ties with the k-th must be among the candidates, so the last candidate must be below it.
    decided = ~has_k | (best[:, -1] < kth) | complete
    best = best.masked_fill(best < kth[:, None], 0)
    cdf = best.cumsum(-1, dtype=torch.float64)
    p = torch.from_numpy(top_p.astype(np.float64))
    mass = torch.where(has_k, cdf[:, -1], 1.0) * p  # top-p is a share of what top-k kept
    # Token i is kept if those before it have not reached the mass.
    count = (cdf - best.double() < mass[:, None]).sum(-1)
    has_p = torch.from_numpy(top_p < 1)
    decided &= ~has_p | has_k | (cdf[:, -1] >= mass) | complete
    pth = torch.where(has_p, best.gather(1, (count - 1).clamp_(0, width - 1)[:, None])[:, 0], 0.0)
    return torch.maximum(kth, pth), decided


def score(logits: torch.Tensor, tokens: I32, widths: I32) -> StepLogprobs:
    """Log probabilities of one token for each row of `logits` [M, V], and of the row's most likely tokens.

    tokens, widths: i32[M].  Every row gets max(widths) alternatives, most likely first, the smaller id first among equals.
    The log probability of the token is NaN where the row's logits are.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    m, width = len(logprobs), min(int(widths.max(initial=0)), logits.shape[1])
    own = logprobs.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0].numpy()
    if width == 0:
        return StepLogprobs(own, np.zeros((m, 0), np.int32), np.zeros((m, 0), np.float32))
    logprobs.masked_fill_(logprobs.isnan(), -torch.inf)
    last = torch.topk(logprobs, width).values[:, -1:]
    row, token = (x.numpy() for x in torch.nonzero(logprobs >= last, as_tuple=True))  # including ties for the last place
    value = logprobs.numpy()[row, token]
    order = np.lexsort((token, -value, row))
    first = np.searchsorted(row, np.arange(m))  # nonzero gives the rows in order
    best = order[first[:, None] + np.arange(width)]
    return StepLogprobs(own, token[best].astype(np.int32), value[best])
