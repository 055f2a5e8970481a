"""Tensor parallelism, the arithmetic of it: which rows and columns of each weight a rank owns.  No torch.

Queries follow their KV head, so a rank owns whole groups; nothing has to divide evenly (3 KV heads over 2 ranks are 2 + 1).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from minisgl.config import ModelSpec
from minisgl.errors import UserError

Range = tuple[int, int]  # [start, end)


def split(n: int, parts: int) -> list[Range]:
    """`n` things over `parts` ranks, as evenly as possible; the first ranks take the remainder."""
    base, extra = divmod(n, parts)
    starts = [r * base + min(r, extra) for r in range(parts + 1)]
    return list(itertools.pairwise(starts))


def check_tp(spec: ModelSpec, tp: int) -> None:
    """Raise UserError when `tp` ranks cannot share this model.  Called by the root before anything is spawned."""
    if tp < 1:
        raise UserError(f"--tp {tp}: must be at least 1.")
    if tp > spec.num_kv_heads:
        heads = spec.num_kv_heads
        raise UserError(
            f"--tp {tp}: {spec.name} has {heads} KV head{'s' if heads > 1 else ''}, so at most {heads} "
            f"rank{'s' if heads > 1 else ''} can share it. Use --tp {heads} or less."
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank owns.  Ranges count heads, MLP columns and vocabulary entries; the properties turn heads into rows."""

    rank: int
    size: int
    kv_heads: Range
    heads: Range
    mlp: Range
    vocab: Range
    head_dim: int

    @classmethod
    def of(cls, spec: ModelSpec, rank: int = 0, size: int = 1) -> Shard:
        group = spec.num_heads // spec.num_kv_heads
        start, end = split(spec.num_kv_heads, size)[rank]
        return cls(
            rank=rank,
            size=size,
            kv_heads=(start, end),
            heads=(start * group, end * group),
            mlp=split(spec.intermediate_size, size)[rank],
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
