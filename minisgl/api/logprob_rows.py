"""Unpacks the columns of a Logprobs message into the log probabilities of single tokens.  Runs in the api process."""

from __future__ import annotations

import math
from collections.abc import Iterator

from minisgl.actors.messages import Logprobs
from minisgl.api.engine import TokenLogprob

IMPOSSIBLE = -9999.0  # for minus infinity, which JSON lacks; OpenAI and vLLM write the same number


def logprob_rows(m: Logprobs) -> Iterator[tuple[int, TokenLogprob]]:
    """The rows of a message, one for each token: the name of its request, and what is known of it.

    The texts of a row's token and of its `width` alternatives lie one behind the other in `pieces`.
    """
    top = at = start = 0
    sizes, ids, values = m.sizes.tolist(), m.top_ids.tolist(), m.top_logprobs.tolist()
    rows = (m.uids.tolist(), m.tokens.tolist(), m.offsets.tolist(), m.logprobs.tolist(), m.widths.tolist())
    for uid, token, offset, logprob, width in zip(*rows, strict=True):
        pieces = []
        for size in sizes[at : at + 1 + width]:
            pieces.append(m.pieces[start : start + size])
            start += size
        alternatives = zip(ids[top : top + width], pieces[1:], map(_finite, values[top : top + width]), strict=True)
        at, top = at + 1 + width, top + width
        known = None if math.isnan(logprob) else _finite(logprob)  # the first token of a prompt has none
        yield uid, TokenLogprob(token, pieces[0], known, offset, tuple(alternatives))


def _finite(logprob: float) -> float:
    """A log probability that JSON can write."""
    return max(logprob, IMPOSSIBLE)
