"""The oracle: a runner whose "KV cache" stores token ids, so that any mistake of the protocol changes the text.

Its "attention" reads the ids back through the page table, and the next token is a hash of everything it read.  Aliased pages,
stale writes, a lost grant, a wrong length or a slot mixed up give other tokens than `reference`.  It needs numpy only and
runs wherever the real runner does: in LocalSystem under a seed, or in real processes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from minisgl.config import Config
from minisgl.plan import StepPlan, StepResult

I32 = npt.NDArray[np.int32]
_POISON = -7


def next_token(context: I32, vocab_size: int) -> int:
    """A hash (FNV-1a, 64 bit) of all ids of the context, reduced to the vocabulary."""
    h = 0xCBF29CE484222325
    for t in context.tolist():
        h = ((h ^ (t + 1)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return (h >> 17) % vocab_size


def reference(prompt: list[int], max_tokens: int, vocab_size: int, eos_ids: tuple[int, ...]) -> list[int]:
    """What a request must answer: sequential, no cache, no batch."""
    out: list[int] = []
    while len(out) < max_tokens and (not out or out[-1] not in eos_ids):
        out.append(next_token(np.array(prompt + out, np.int32), vocab_size))
    return out


class Done:
    """A step that has finished by the time it is launched."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self._result


class OracleRunner:
    """Same interface and same resident state as the real runner; see the module's first paragraph."""

    def __init__(self, config: Config, num_pages: int) -> None:
        self._vocab = config.model.vocab_size
        self._size = config.engine.page_size
        self._pages = num_pages
        slots = config.engine.max_running
        self.kv = np.zeros((0, self._size), np.int32)
        self.table = np.full((slots, -(-config.max_context // self._size)), -1, np.int32)
        self.kv_len = np.zeros(slots, np.int32)
        self.last = np.zeros(slots, np.int32)
        self._batch = np.zeros(0, np.int32)

    def max_pages(self) -> int:
        return self._pages

    def allocate(self, num_pages: int) -> None:
        self.kv = np.full((num_pages, self._size), _POISON, np.int32)

    def prepare(self) -> bool:
        """Nothing is left to be prepared."""
        return False

    def close(self) -> None:
        """Nothing to free."""

    def launch(self, plan: StepPlan) -> Done:
        """Run the plan at once, row by row."""
        self.kv_len[plan.joins["slot"]] = plan.joins["kv_len"]
        self.table[plan.grants["slot"], plan.grants["index"]] = plan.grants["page"]
        if plan.decode is not None:
            self._batch = plan.decode
        sampled: list[int] = []
        at = 0
        for slot, sample, n in plan.prefill.tolist():
            for token in plan.ids[at : at + n].tolist():
                self._append(slot, token)
            at += n
            if sample:
                sampled.append(self._sample(slot))
        for slot in self._batch.tolist():
            self._append(slot, int(self.last[slot]))
            sampled.append(self._sample(slot))
        return Done(StepResult(plan.step, np.array(sampled, np.int32)))

    def _append(self, slot: int, token: int) -> None:
        page, offset = divmod(int(self.kv_len[slot]), self._size)
        self.kv[self.table[slot, page], offset] = token
        self.kv_len[slot] += 1

    def _sample(self, slot: int) -> int:
        n = int(self.kv_len[slot])
        context = self.kv[self.table[slot, : -(-n // self._size)]].reshape(-1)[:n]
        self.last[slot] = next_token(context, self._vocab)
        return int(self.last[slot])
