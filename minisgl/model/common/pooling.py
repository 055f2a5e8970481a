"""Vectors of prompts: the mean of their final hidden states, or the last one.  Runs in the workers, in steps that want them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from minisgl.model.common.slots import StepBatch
from minisgl.plan import POOL, SUM, StepPlan

States = Callable[[npt.NDArray[np.int64]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prefill row that wants something: its tokens among those of the step, and how long the prompt is with it."""

    slot: int
    flags: int
    first: int
    end: int
    starts: bool  # with the prompt's first token
    kv_len: int


def _chunks(plan: StepPlan, batch: StepBatch) -> list[_Chunk]:
    out, end = [], 0
    for row, (slot, flags, n) in enumerate(plan.prefill.tolist()):
        first, end = end, end + n
        if flags & (SUM | POOL):
            out.append(_Chunk(slot, flags, first, end, int(batch.positions[first]) == 0, int(batch.kv_lens[row])))
    return out


class Pooling:
    """The sums f32[C] of prompts that are half computed, by slot.  One that is left unfinished is forgotten with its slot."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    @staticmethod
    def wanted(plan: StepPlan) -> bool:
        """Whether `take` has anything to do for this plan."""
        return bool((plan.prefill["sample"] & (SUM | POOL)).any())

    def take(self, plan: StepPlan, batch: StepBatch, states: States) -> torch.Tensor | None:
        """The vectors f32[M, C] of the rows with POOL, None for none.  `states(tokens)`: final hidden states [n, C]."""
        vectors = []
        for c in _chunks(plan, batch):
            if not c.flags & SUM:
                vectors.append(states(np.array([c.end - 1]))[0].float())
                continue
            total = states(np.arange(c.first, c.end)).sum(0, dtype=torch.float32)
            before = self._sums.pop(c.slot, None)
            if before is not None and not c.starts:
                total = total + before
            if c.flags & POOL:
                vectors.append(total / c.kv_len)
            else:
                self._sums[c.slot] = total
        return torch.stack(vectors) if vectors else None
