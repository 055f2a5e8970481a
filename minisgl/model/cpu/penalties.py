"""Biases and penalties: what requests add to the logits of a model before a token is drawn.  Runs in the CPU workers.

Per slot: penalties, a short list of biases, and `seen`, one int32 for each token of the vocabulary: 2 * (how often the answer
has it) + (1 if the prompt has it).  `seen` is kept by the worker, because only it knows the tokens of the steps in flight; a
slot that joins brings what was there before, so a request that was retracted goes on as if it had not been.
"""

from __future__ import annotations

import numpy as np
import torch

from minisgl.arrays import I32, I64
from minisgl.model.common.grammar import LAST_RESORT
from minisgl.plan import StepPlan


def restrict(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """f32 [R, V] of the logits [R, V]: what a grammar does not allow (bool [R, V]) is impossible.

    The grammar has the last word: what it allows stays possible even where `min_tokens` would forbid it, as a last resort.
    """
    return logits.float().clamp(min=LAST_RESORT).masked_fill(~allowed, -torch.inf)


class Adjustments:
    """The state of all slots.  What nobody uses takes no memory: `seen` is made for the first request with penalties."""

    def __init__(self, slots: int, vocab: int) -> None:
        self._vocab = vocab
        self._presence = torch.zeros(slots)
        self._frequency = torch.zeros(slots)
        self._repetition = torch.ones(slots)
        self._seen = torch.zeros(0, vocab, dtype=torch.int32)
        # Unused places of a slot's list of biases add 0 to token 0.
        self._tokens = torch.zeros(slots, 0, dtype=torch.int64)
        self._values = torch.zeros(slots, 0)
        self._until = torch.zeros(slots, 0, dtype=torch.int64)

    def join(self, plan: StepPlan) -> None:
        """Take in the extras of a plan."""
        bias_at = history_at = 0
        for extra in plan.extras:
            slot, n_bias, n_prompt, n_output = (int(extra[f]) for f in ("slot", "n_bias", "n_prompt", "n_output"))
            self._presence[slot] = float(extra["presence"])
            self._frequency[slot] = float(extra["frequency"])
            self._repetition[slot] = float(extra["repetition"])
            self._set_bias(slot, plan.bias[bias_at : bias_at + n_bias])
            if (extra["presence"], extra["frequency"], extra["repetition"]) != (0, 0, 1):
                history = plan.history[history_at : history_at + n_prompt + n_output]
                self._set_seen(slot, history[:n_prompt], history[n_prompt:])
            bias_at += n_bias
            history_at += n_prompt + n_output

    def _set_bias(self, slot: int, bias: np.ndarray) -> None:
        if (missing := len(bias) - self._tokens.shape[1]) > 0:
            self._tokens, self._values, self._until = (
                torch.nn.functional.pad(t, (0, missing)) for t in (self._tokens, self._values, self._until)
            )
        for column, name in ((self._tokens, "token"), (self._values, "value"), (self._until, "until")):
            column[slot].zero_()
            column[slot, : len(bias)] = torch.from_numpy(bias[name].copy()).to(column.dtype)

    def _set_seen(self, slot: int, prompt: I32, output: I32) -> None:
        if not len(self._seen):
            self._seen = torch.zeros(len(self._presence), self._vocab, dtype=torch.int32)
        counts = 2 * np.bincount(output, minlength=self._vocab).astype(np.int32)
        counts[prompt] |= 1
        self._seen[slot] = torch.from_numpy(counts)

    def apply(self, logits: torch.Tensor, slots: I64, positions: I64) -> torch.Tensor:
        """The logits [N, V] of N slots, of which some have biases or penalties, as f32 with these applied.

        `positions` i64[N]: of the tokens to be drawn.
        """
        at = torch.from_numpy(slots)
        value = self._values[at].masked_fill(torch.from_numpy(positions)[:, None] < self._until[at], -torch.inf)
        out = logits.float().scatter_add(1, self._tokens[at], value)
        if not len(self._seen):
            return out
        seen, count = self._seen[at], self._seen[at] >> 1
        repetition, frequency, presence = (p[at, None] for p in (self._repetition, self._frequency, self._presence))
        # A slot without penalties may hold the counts of a former owner, which its neutral factors leave without effect.
        repeated = torch.where(out > 0, out / repetition, out * repetition)
        return torch.where(seen > 0, repeated, out) - frequency * count - presence * (count > 0)

    def count(self, slots: I64, tokens: I32) -> None:
        """Enter the tokens that slots with penalties have drawn, each slot at most once."""
        self._seen[torch.from_numpy(slots), torch.from_numpy(tokens.astype(np.int64))] += 2
