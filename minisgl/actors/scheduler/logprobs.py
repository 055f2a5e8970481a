"""Log probabilities in the scheduler: which of them a step computes, and which of its results are passed on.

Runs in the scheduler process, for the requests that report log probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minisgl.actors.messages import TokenLogprobs
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.arrays import I32, I64
from minisgl.plan import NOT_A_NUMBER, StepResult

_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class ExpectedLogprobs:
    """The M tokens of a step whose log probabilities are computed, in the order of plan.StepLogprobs, with their slots' owners.

    The first `drawn.size` are drawn by the rows `drawn` of the step; the others are `targets`, prompt tokens at `positions`.
    """

    drawn: I64
    slots: I32  # [M]
    epochs: I64  # [M]
    targets: I32
    positions: I32

    @classmethod
    def of(cls, rows: I32, targets: Sequence[tuple[int, int, I32]], table: SlotTable) -> ExpectedLogprobs | None:
        """For a plan whose rows draw for the slots `rows`, with the `targets` (slot, position of the first, tokens)."""
        drawn = np.flatnonzero(table.logprobs[rows] >= 0)
        if not len(drawn) and not targets:
            return None
        slots = np.concatenate([rows[drawn], *(np.full(len(tokens), slot, np.int32) for slot, _, tokens in targets)])
        tokens = np.concatenate([_NONE, *(tokens for *_, tokens in targets)])
        positions = [np.arange(first, first + len(tokens), dtype=np.int32) for _, first, tokens in targets]
        return cls(drawn, slots, table.epoch[slots], tokens, np.concatenate([_NONE, *positions]))

    def read(
        self, result: StepResult, table: SlotTable, running: Mapping[int, tuple[int, Request]]
    ) -> tuple[TokenLogprobs | None, dict[int, int]]:
        """The rows to pass on, prompt tokens first, None if there are none; and NOT_A_NUMBER for each slot with NaN among its.

        Requests that have ended are left out, and so are prompt tokens that were passed on before a retraction.  Raises
        RuntimeError if the result lacks log probabilities.
        """
        scores, n = result.scores, len(self.drawn)
        if scores is None or len(scores.logprobs) != len(self.slots):
            raise RuntimeError(f"result {result.step} lacks log probabilities of its plan")
        live = table.epoch[self.slots] == self.epochs
        live[:n] &= result.tokens[self.drawn] >= 0
        broken = np.unique(self.slots[live & np.isnan(scores.logprobs)])
        live &= ~np.isin(self.slots, broken)
        failed = dict.fromkeys(broken.tolist(), NOT_A_NUMBER)
        for i in (n + np.flatnonzero(live[n:])).tolist():
            request = running[int(table.uid[self.slots[i]])][1]
            live[i] = self.positions[i - n] == request.scored
            if live[i]:
                request.scored += 1
        at = np.flatnonzero(live)
        if not len(at):
            return None, failed
        at = np.concatenate((at[at >= n], at[at < n]))  # prompt tokens before the token drawn after them
        tokens = np.concatenate((result.tokens[self.drawn], self.targets)).astype(np.int32)
        slots = self.slots[at]
        drawn, widths = (at < n).astype(np.uint8), table.logprobs[slots].astype(np.uint8)
        inside = np.arange(scores.top_ids.shape[1]) < widths[:, None]  # the other alternatives are padding
        tops = scores.top_ids[at][inside], scores.top_logprobs[at][inside]
        return TokenLogprobs(table.uid[slots], drawn, tokens[at], scores.logprobs[at], widths, *tops), failed
