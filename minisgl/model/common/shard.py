"""Splits a model over the ranks of a tensor parallel group: the rows and columns of each weight that a rank owns.  No torch.

Tensor parallelism needs an all-reduce after attention and one after the MLP (architectures/llama.py), of outputs to which each
rank contributes its heads and its inner columns.  Query heads follow their KV head, so a rank owns complete groups; nothing has
to divide evenly (3 KV heads over 2 ranks are 2 + 1).  With more ranks than KV heads, several ranks keep the same KV head and
share its query heads.

Cuts through the inputs of a product lie between groups that share a scale where they can (`GROUP`), so that all numbers of
ranks round weights as one does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from minisgl.config import ModelSpec
from minisgl.errors import UserError

Range = tuple[int, int]  # [start, end)
GROUP = 32  # inputs that share a scale in quantised weights


def split(n: int, parts: int, unit: int = 1) -> list[Range]:
    """Ranges that cut 0..n into `parts` as evenly as possible; the first ones take the remainder.

    They begin at multiples of `unit`, unless that would leave a part without any.
    """
    if -(-n // unit) < parts:
        unit = 1
    base, extra = divmod(-(-n // unit), parts)
    starts = [min(unit * (r * base + min(r, extra)), n) for r in range(parts + 1)]
    return list(itertools.pairwise(starts))


def check_tp(spec: ModelSpec, tp: int) -> None:
    """Raise UserError when `tp` ranks cannot share this model.  Called by the root before anything is spawned."""
    if tp < 1:
        raise UserError(f"--tp {tp}: must be at least 1.")
    heads = spec.num_heads
    if tp > heads:
        raise UserError(
            f"--tp {tp}: {spec.name} has {heads} attention head{'s' if heads > 1 else ''}, so at most {heads} "
            f"rank{'s' if heads > 1 else ''} can share it. Use --tp {heads} or less."
        )


def _heads(spec: ModelSpec, rank: int, size: int) -> tuple[Range, Range]:
    """The KV heads and the query heads of one rank."""
    group = spec.num_heads // spec.num_kv_heads
    unit = GROUP // math.gcd(GROUP, spec.head_dim)  # query heads
    if size <= spec.num_kv_heads:
        start, end = split(spec.num_kv_heads, size, unit // math.gcd(unit, group))[rank]
        return (start, end), (start * group, end * group)
    ranks = split(size, spec.num_kv_heads)  # the ranks that share each KV head
    kv_head = next(i for i, (start, end) in enumerate(ranks) if start <= rank < end)
    first, last = ranks[kv_head]
    start, end = split(group, last - first, unit)[rank - first]
    return (kv_head, kv_head + 1), (kv_head * group + start, kv_head * group + end)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's ranges of heads, of the MLP's and every expert's inner columns, and of the vocabulary."""

    rank: int
    size: int
    kv_heads: Range
    heads: Range
    mlp: Range
    expert: Range
    vocab: Range
    head_dim: int

    @classmethod
    def of(cls, spec: ModelSpec, rank: int = 0, size: int = 1) -> Shard:
        kv_heads, heads = _heads(spec, rank, size)
        return cls(
            rank=rank,
            size=size,
            kv_heads=kv_heads,
            heads=heads,
            mlp=split(spec.intermediate_size, size, GROUP)[rank],
            expert=split(spec.expert_size, size)[rank],
            vocab=split(spec.vocab_size, size)[rank],
            head_dim=spec.head_dim,
        )

    @property
    def num_heads(self) -> int:
        return self.heads[1] - self.heads[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads[1] - self.kv_heads[0]

    @property
    def q_rows(self) -> Range:
        return (self.heads[0] * self.head_dim, self.heads[1] * self.head_dim)

    @property
    def kv_rows(self) -> Range:
        return (self.kv_heads[0] * self.head_dim, self.kv_heads[1] * self.head_dim)
