"""Applies the biases and penalties of requests to the logits before a token is sampled.  Runs in the CPU workers.

Each slot has penalties, a short list of biases, and `seen`, one int32 for each token of the vocabulary: 2 * (its count in the
answer) + (1 if the prompt has it).  The worker keeps `seen`, because only it knows the tokens of the steps in flight.  A new
slot comes with the history of its request, so a request that was retracted continues as if it had not been.
"""

from __future__ import annotations

import numpy as np
import torch

from minisgl.arrays import I32, I64
from minisgl.model.common.grammar import LAST_RESORT
from minisgl.plan import StepPlan


def restrict(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> f32 [R, V], with -inf for every token that a grammar does not allow.  allowed: bool [R, V].

    The grammar has the last word: a token that it allows stays possible, as a last resort, even where `min_tokens` forbids it.
    """
    return logits.float().clamp(min=LAST_RESORT).masked_fill(~allowed, -torch.inf)


class Adjustments:
    """The state of all slots.  `seen` takes no memory before the first request with penalties."""

    def __init__(self, slots: int, vocab: int) -> None:
        self._vocab = vocab
        self._presence = torch.zeros(slots)
        self._frequency = torch.zeros(slots)
        self._repetition = torch.ones(slots)
        self._seen = torch.zeros(0, vocab, dtype=torch.int32)
        # Unused entries of a slot's list of biases add 0 to token 0.
        self._tokens = torch.zeros(slots, 0, dtype=torch.int64)
        self._values = torch.zeros(slots, 0)
        self._until = torch.zeros(slots, 0, dtype=torch.int64)

    def join(self, plan: StepPlan) -> None:
        """Set the biases and penalties of a plan's new slots."""
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
        """logits [N, V] of N slots -> f32 [N, V] with the biases and penalties that some of them have.

        positions: i64[N], of the tokens to be sampled.
        """
        at = torch.from_numpy(slots)
        value = self._values[at].masked_fill(torch.from_numpy(positions)[:, None] < self._until[at], -torch.inf)
        out = logits.float().scatter_add(1, self._tokens[at], value)
        if not len(self._seen):
            return out
        seen, count = self._seen[at], self._seen[at] >> 1
        repetition, frequency, presence = (p[at, None] for p in (self._repetition, self._frequency, self._presence))
        # A slot without penalties may hold the counts of a former owner; its neutral factors give them no effect.
        repeated = torch.where(out > 0, out / repetition, out * repetition)
        return torch.where(seen > 0, repeated, out) - frequency * count - presence * (count > 0)

    def count(self, slots: I64, tokens: I32) -> None:
        """Count the tokens that slots with penalties sampled, each slot at most once."""
        self._seen[torch.from_numpy(slots), torch.from_numpy(tokens.astype(np.int64))] += 2
