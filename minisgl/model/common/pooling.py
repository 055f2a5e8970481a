"""Pools final hidden states into one vector a prompt, for embeddings: their mean, or the last one.  Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from minisgl.arrays import I64
from minisgl.model.common.slots import StepBatch
from minisgl.plan import POOL, SUM, StepPlan


class Pooling:
    """The sums f32[C] of prompts that are half computed, by slot."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    @staticmethod
    def needed(plan: StepPlan) -> bool:
        """Whether `take` has anything to do for this plan."""
        return bool((plan.prefill["sample"] & (SUM | POOL)).any())

    def take(self, plan: StepPlan, batch: StepBatch, states: Callable[[I64], torch.Tensor]) -> torch.Tensor | None:
        """The vectors f32[M, C] of the rows with POOL, None for no rows.  states(tokens): their final hidden states [n, C]."""
        vectors, end = [], 0
        for row, (slot, flags, n) in enumerate(plan.prefill.tolist()):
            start, end = end, end + n
            if flags & SUM:
                total = states(np.arange(start, end)).sum(0, dtype=torch.float32)
                before = self._sums.pop(slot, None)
                if before is not None and batch.positions[start] > 0:  # otherwise it is the unfinished sum of a former owner
                    total = total + before
                if flags & POOL:
                    vectors.append(total / int(batch.kv_lens[row]))
                else:
                    self._sums[slot] = total
            elif flags & POOL:
                vectors.append(states(np.array([end - 1]))[0].float())
        return torch.stack(vectors) if vectors else None
