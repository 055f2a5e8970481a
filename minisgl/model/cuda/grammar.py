"""Keeps the grammars of a GPU worker: sampled tokens advance the matchers on the host, whose masks go to the device.

The scheduler plans a row with a grammar only when it knows all of its tokens (SchedulerLimits.grammar_waits_for_token).  The
tokens a mask depends on are therefore known before the plan is made, so masks never stall the GPU.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.model.common.grammar import Follower, Grammars
from minisgl.model.kernels.uploads import upload
from minisgl.plan import StepPlan


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Tokens of a step that matchers have not read yet."""

    step: int
    matchers: list[Follower]
    rows: npt.NDArray[np.int64]
    tokens: torch.Tensor  # i32 on the host, valid once `end` has passed
    end: torch.cuda.Event


class GrammarRows:
    """`has_grammar` i32[slots] and `masks` i32[slots, ceil(V / 32)] on the device, as kernels/grammar_mask.py reads them; empty
    before the first grammar."""

    def __init__(self, grammars: Grammars, slots: int, vocab: int, lag: int, device: torch.device) -> None:
        self.grammars = grammars
        self._slots, self._words, self._lag, self._device = slots, -(-vocab // 32), lag, device
        self._flags = np.zeros(slots, np.int32)
        self.has_grammar = self.masks = torch.zeros(0, dtype=torch.int32, device=device)
        self._unread: deque[_Drawn] = deque()
        self._step = 0
        self._now: tuple[list[Follower], npt.NDArray[np.int64]] | None = None  # rows with grammars of the step being launched
        self.failed: npt.NDArray[np.int64] | None = None  # rows of that step whose grammar allows no token

    def begin(self, plan: StepPlan) -> None:
        """A step begins: take in its grammars."""
        self._step += 1
        self._now = self.failed = None
        while self._unread and self._unread[0].step <= self._step - self._lag:  # before its buffer is used again
            self._read(self._unread.popleft())
        if not len(plan.grammars):
            return
        self.grammars.join(plan)
        self._flags[plan.grammars["slot"]] = plan.grammars["n_bytes"] > 0
        if not len(self.has_grammar):
            self.has_grammar = torch.zeros(self._slots, dtype=torch.int32, device=self._device)
            self.masks = torch.zeros(self._slots, self._words, dtype=torch.int32, device=self._device)
        self.has_grammar.copy_(upload(self._flags, self._device))

    def bind(self, slots: npt.NDArray[Any]) -> bool:
        """Send the masks of the rows with grammars among those that draw for `slots`; whether there are any."""
        rows = self.grammars.rows(slots) if self.grammars else np.zeros(0, np.int64)
        if not len(rows):
            return False
        mine = slots[rows]
        matchers = self.grammars.matchers(mine)
        due = {id(m) for m in matchers}
        for drawn in [d for d in self._unread if any(id(m) in due for m in d.matchers)]:
            self._unread.remove(drawn)
            self._read(drawn)
        masks, failed = self.grammars.masks(mine)
        self.masks.index_copy_(0, upload(mine, self._device).long(), upload(masks.view(np.int32), self._device))
        self._now = (matchers, rows)
        self.failed = rows[failed] if failed.any() else None
        return True

    def end(self, tokens: torch.Tensor, end: torch.cuda.Event) -> None:
        """The step was launched: its tokens will be in `tokens`, on the host, when `end` has passed."""
        if self._now is not None:
            self._unread.append(_Drawn(self._step, *self._now, tokens, end))

    def _read(self, drawn: _Drawn) -> None:
        drawn.end.synchronize()
        self.grammars.feed(drawn.matchers, np.maximum(drawn.tokens.numpy()[drawn.rows], 0))
