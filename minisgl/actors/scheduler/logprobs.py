"""Log probabilities on their way through the scheduler: what a plan's result will bring, and what of it is told.

Runs in the scheduler process, for requests that want them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.arrays import F32, I32, I64, U8
from minisgl.plan import StepResult

_NONE = np.zeros(0, np.int32)


@dataclass(slots=True)
class LogprobOutputs:
    """Log probabilities for the detokenizer, of M tokens: each is the next token of the prompt of uids[i], or the token `drawn`
    that the news of the same step bring.  The first widths[i] of the row's alternatives are meant.
    """

    uids: I64
    drawn: U8
    tokens: I32
    logprobs: F32
    widths: U8
    top_ids: I32  # [M, W]
    top_logprobs: F32  # [M, W]


@dataclass(frozen=True, slots=True)
class ExpectedLogprobs:
    """The M tokens of a step whose log probabilities are computed, in the order of plan.Scores, with the owners of their slots.

    The first `drawn.size` are drawn by the rows `drawn` of the step; the others are `targets`, of prompts, at `positions`.
    """

    drawn: I64
    slots: I32  # [M]
    epochs: I64  # [M]
    targets: I32
    positions: I32

    @classmethod
    def of(cls, rows: I32, targets: Sequence[tuple[int, int, I32]], table: SlotTable) -> ExpectedLogprobs | None:
        """Of a plan whose rows draw for the slots `rows`, with the `targets` (slot, position of the first, tokens)."""
        drawn = np.flatnonzero(table.logprobs[rows] >= 0)
        if not len(drawn) and not targets:
            return None
        slots = np.concatenate([rows[drawn], *(np.full(len(tokens), slot, np.int32) for slot, _, tokens in targets)])
        tokens = np.concatenate([_NONE, *(tokens for *_, tokens in targets)])
        positions = [np.arange(first, first + len(tokens), dtype=np.int32) for _, first, tokens in targets]
        return cls(drawn, slots, table.epoch[slots], tokens, np.concatenate([_NONE, *positions]))

    def news(self, result: StepResult, table: SlotTable, running: Mapping[int, tuple[int, Request]]) -> LogprobOutputs | None:
        """What is to be told of a result: of requests that are still there, and of a prompt that was computed again, after a
        retraction, what had not been told.  None for nothing.  Raises RuntimeError if the result does not have it."""
        scores, n = result.scores, len(self.drawn)
        if scores is None or len(scores.logprobs) != len(self.slots):
            raise RuntimeError(f"result {result.step} lacks log probabilities that its plan asked for")
        live = table.epoch[self.slots] == self.epochs
        for i in (n + np.flatnonzero(live[n:])).tolist():
            request = running[int(table.uid[self.slots[i]])][1]
            live[i] = self.positions[i - n] == request.scored
            request.scored += int(live[i])
        at = np.flatnonzero(live)
        if not len(at):
            return None
        at = np.concatenate((at[at >= n], at[at < n]))  # a prompt before what was drawn after it
        tokens = np.concatenate((result.tokens[self.drawn], self.targets)).astype(np.int32)
        slots = self.slots[at]
        return LogprobOutputs(
            table.uid[slots],
            (at < n).astype(np.uint8),
            tokens[at],
            scores.logprobs[at],
            table.logprobs[slots].astype(np.uint8),
            scores.top_ids[at],
            scores.top_logprobs[at],
        )
