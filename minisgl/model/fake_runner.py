"""Stands in for a model: a runner whose "KV cache" stores token ids, so that any mistake of the protocol changes the text.

Its "attention" reads the ids back through the page table, and the next token is a hash of everything that it read.  Aliased
pages, stale writes, a lost grant, a wrong length or a mixed-up slot give other tokens than `expected_tokens`.  It needs numpy
only, and runs wherever a real runner does: in a LocalSystem under a seed, or in the worker processes of the fake engine, which
is what `--model fake` starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from minisgl.arrays import I32
from minisgl.config import Config
from minisgl.model.common.finished import Finished
from minisgl.model.common.grammar import Grammars, unpack
from minisgl.plan import DRAW, FAILED, POOL, SCORE, SUM, StepLogprobs, StepPlan, StepResult

KV_TOKENS = 65_536  # size of the KV cache, where the configuration leaves it open
_POISON = -7


def next_token(context: I32, vocab_size: int, allowed: I32 | None = None) -> int:
    """A hash (FNV-1a, 64 bit) of all ids of the context, reduced to the vocabulary, or to the tokens that are `allowed`."""
    h = 0xCBF29CE484222325
    for t in context.tolist():
        h = ((h ^ (t + 1)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return (h >> 17) % vocab_size if allowed is None else int(allowed[(h >> 17) % len(allowed)])


def expected_tokens(prompt: list[int], max_tokens: int, vocab_size: int, eos_ids: tuple[int, ...]) -> list[int]:
    """The answer to a request, computed sequentially, without cache and batch."""
    out: list[int] = []
    while len(out) < max_tokens and (not out or out[-1] not in eos_ids):
        out.append(next_token(np.array(prompt + out, np.int32), vocab_size))
    return out


def logprob(context: I32, token: int) -> float:
    """Stands in for the log probability of a token: another hash, of the token and all before it; exact in float32."""
    return -next_token(np.append(context, np.int32(token)), 8191) / 64


def alternatives(token: int, n: int, vocab_size: int) -> list[int]:
    """Stands in for the most likely tokens in the place of `token`."""
    return [(token + i) % vocab_size for i in range(n)]


def state(context: I32) -> float:
    """Stands in for the hidden state of the last token of a context: a hash of all of it; exact in float32."""
    return logprob(context, 0)


_Scored = tuple[int, I32, int]  # slot, context, token: the token's log probability goes into the result


@dataclass(slots=True)
class _Step:
    """What one step has computed so far."""

    targets: Iterator[int]  # of the plan
    sampled: list[int] = field(default_factory=list)
    drawn: list[_Scored] = field(default_factory=list)
    followers: list[_Scored] = field(default_factory=list)  # tokens of prompts
    vectors: list[float] = field(default_factory=list)


class FakeRunner:
    """Has the interface and the resident state of a real runner; see the module's docstring."""

    def __init__(self, config: Config, num_pages: int = 0, grammars: Grammars | None = None) -> None:
        """`num_pages`: size of the KV cache; 0: that of the configuration, or KV_TOKENS."""
        self.grammars = grammars
        self._vocab = config.model.vocab_size
        self._size = config.engine.page_size
        self._pages = num_pages or -(-(config.engine.kv_tokens or KV_TOKENS) // self._size)
        slots = config.engine.max_running
        self.kv = np.zeros((0, self._size), np.int32)
        self.table = np.full((slots, -(-config.max_context // self._size)), -1, np.int32)
        self.kv_len = np.zeros(slots, np.int32)
        self.last = np.zeros(slots, np.int32)
        self.logprobs = np.full(slots, -1, np.int32)
        self.sums = np.zeros(slots, np.float32)
        self._batch = np.zeros(0, np.int32)

    def max_pages(self) -> int:
        return self._pages

    def allocate(self, num_pages: int) -> None:
        self.kv = np.full((num_pages, self._size), _POISON, np.int32)

    def capture_ahead(self) -> bool:
        """Nothing is left to be prepared."""
        return False

    def close(self) -> None:
        """Nothing to free."""

    def launch(self, plan: StepPlan) -> Finished:
        """Run the plan at once, row by row."""
        self.kv_len[plan.new_slots["slot"]] = plan.new_slots["kv_len"]
        self.logprobs[plan.extras["slot"]] = plan.extras["logprobs"]
        self.table[plan.page_grants["slot"], plan.page_grants["index"]] = plan.page_grants["page"]
        if self.grammars is not None and len(plan.grammars):
            self.grammars.join(plan)
        if plan.decode is not None:
            self._batch = plan.decode
        step = _Step(iter(plan.targets.tolist()))
        at = 0
        for slot, flags, n in plan.prefill.tolist():
            self._prefill(slot, flags, plan.ids[at : at + n].tolist(), step)
            at += n
        for slot in self._batch.tolist():
            self._append(slot, int(self.last[slot]))
            self._sample(slot, step)
        vectors = np.array(step.vectors, np.float32).reshape(-1, 1) if step.vectors else None
        scores = self._scores(step.drawn + step.followers)
        return Finished(StepResult(plan.step, np.array(step.sampled, np.int32), scores=scores, vectors=vectors))

    def _prefill(self, slot: int, flags: int, ids: list[int], step: _Step) -> None:
        self.sums[slot] *= self.kv_len[slot] > 0
        for i, token in enumerate(ids, 1):
            self._append(slot, token)
            if flags & SUM:
                self.sums[slot] += state(self._context(slot))
            if flags & SCORE and not (flags & DRAW and i == len(ids)):
                step.followers.append((slot, self._context(slot), next(step.targets)))
        if flags & POOL:
            step.vectors.append(self.sums[slot] / self.kv_len[slot] if flags & SUM else state(self._context(slot)))
        if flags & DRAW:
            self._sample(slot, step)

    def _scores(self, rows: list[_Scored]) -> StepLogprobs | None:
        if not rows:
            return None
        width = int(self.logprobs[[slot for slot, _, _ in rows]].max())
        tops = [alternatives(token, width, self._vocab) for _, _, token in rows]
        values = [[logprob(context, t) for t in top] for (_, context, _), top in zip(rows, tops, strict=True)]
        return StepLogprobs(
            np.array([logprob(context, token) for _, context, token in rows], np.float32),
            np.array(tops, np.int32).reshape(len(rows), width),
            np.array(values, np.float32).reshape(len(rows), width),
        )

    def _append(self, slot: int, token: int) -> None:
        page, offset = divmod(int(self.kv_len[slot]), self._size)
        self.kv[self.table[slot, page], offset] = token
        self.kv_len[slot] += 1

    def _context(self, slot: int) -> I32:
        """All tokens of a slot, read back through its page table."""
        n = int(self.kv_len[slot])
        return self.kv[self.table[slot, : -(-n // self._size)]].reshape(-1)[:n]

    def _sample(self, slot: int, step: _Step) -> None:
        context, here = self._context(slot), np.array([slot])
        failed = False
        if self.grammars is not None and len(self.grammars.rows(here)):
            masks, (failed,) = self.grammars.masks(here)
            token = next_token(context, self._vocab, np.flatnonzero(unpack(masks, self._vocab)[0]).astype(np.int32))
            self.grammars.advance(here, np.array([token], np.int32))
        else:
            token = next_token(context, self._vocab)
        if self.logprobs[slot] >= 0:
            step.drawn.append((slot, context, token))
        self.last[slot] = token
        step.sampled.append(FAILED if failed else token)
