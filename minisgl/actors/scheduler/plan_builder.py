"""The plan builder: puts the plan of one step together, and reads that step's result when it comes.

The step machine decides which requests join, where prompts are cut and what decodes; the builder turns that into arrays.  It
also takes care of what only few requests need: sampling extras, grammars, prompt tokens with log probabilities, and pooled
vectors (embeddings).  Page grants come from the slot table.  Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from minisgl.actors.messages import TokenLogprobs
from minisgl.actors.scheduler.logprobs import ExpectedLogprobs
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.sampling_extras import NOTHING, Extra, extra_bytes, extra_of, grammar_of
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.actors.scheduler.step_cost import features
from minisgl.arrays import F32, F64, I32, I64
from minisgl.plan import DRAW, EXTRA, GRAMMAR, JOIN, POOL, POOLED_ROWS, PREFILL, SCORE, SCORED_TOKENS, SUM, StepPlan, StepResult

EXTRA_BYTES = 1 << 20  # biases, histories and grammars of one plan; a single request may have more
NO_SLOTS = np.zeros(0, np.int32)


@dataclass(slots=True)
class ResultRows:
    """A result, matched to the requests that still run."""

    slots: I32  # rows that get a token
    tokens: I32
    wasted: int  # rows computed for requests that had ended
    failed: dict[int, int]  # slots without a token, and why: FAILED or NOT_A_NUMBER
    vectors: list[tuple[int, F32]]  # (slot, pooled vector)
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class InFlight:
    """The rows of a published plan.  Results are matched to these owners, never to whichever request has the slot by then."""

    step: int
    slots: I32
    epochs: I64
    cost: F64  # features for the cost model
    logprobs: ExpectedLogprobs | None
    pooled: I32  # rows whose result is a vector

    def read(self, result: StepResult, table: SlotTable, running: Mapping[int, tuple[int, Request]]) -> ResultRows:
        """Match `result` to its rows.  Raises RuntimeError if it is the result of another plan or lacks a part."""
        if self.step != result.step or len(self.slots) != len(result.tokens):
            raise RuntimeError(f"result {result.step} has {len(result.tokens)} rows, plan {self.step} has {len(self.slots)}")
        live = table.epoch[self.slots] == self.epochs
        failed: dict[int, int] = {}
        if result.tokens.min(initial=0) < 0:
            failures = live & (result.tokens < 0)
            failed = dict(zip(self.slots[failures].tolist(), result.tokens[failures].tolist(), strict=True))
            live &= ~failures
        vectors: list[tuple[int, F32]] = []
        if len(self.pooled):
            if result.vectors is None or len(result.vectors) != len(self.pooled):
                raise RuntimeError(f"result {result.step} lacks vectors of its plan")
            vectors = [(int(self.slots[i]), v) for i, v in zip(self.pooled, result.vectors, strict=True) if live[i]]
            live[self.pooled] = False
        logprobs = None
        if self.logprobs is not None:
            logprobs, broken = self.logprobs.read(result, table, running)
            failed |= broken
            live &= ~np.isin(self.slots, list(broken))
        slots = self.slots[live]
        wasted = len(self.slots) - len(slots) - len(vectors) - len(failed)
        return ResultRows(slots, result.tokens[live], wasted, failed, vectors, logprobs)


class PlanBuilder:
    """One plan while it is being put together."""

    def __init__(self, table: SlotTable, eos_ids: tuple[int, ...]) -> None:
        self.chunks: list[tuple[int, int, int]] = []  # prefill rows: (slot, flags, tokens)
        self._table = table
        self._eos_ids = eos_ids
        self._new_slots: list[tuple[int, int, float, int, float, float, int]] = []
        self._ids: list[I32] = []
        self._drawing: list[int] = []  # slots of the prefill rows that draw a token
        self._extras: list[tuple[int, Extra]] = []
        self._grammars: list[tuple[int, bytes, I32]] = []  # (slot, text, answer so far); no text: remove the former one
        self._targets: list[tuple[int, int, I32]] = []  # prompt tokens to score: (slot, position of the first, tokens)
        self._pooled: list[int] = []  # which of the drawing rows have a vector
        self._extra_room = EXTRA_BYTES
        self._score_room = SCORED_TOKENS

    def has_room_for(self, request: Request) -> bool:
        """Whether extras and grammar of a request fit into this plan.  The first request always fits."""
        return self._extra_room == EXTRA_BYTES or extra_bytes(request) <= self._extra_room

    def join(self, slot: int, request: Request) -> None:
        """Tell the workers about the new owner of `slot`: its cached prefix, sampling parameters, extras and grammar."""
        p, table = request.params, self._table
        self._new_slots.append((slot, int(table.planned[slot]), p.temperature, p.top_k, p.top_p, p.min_p, request.seed))
        self._extra_room -= extra_bytes(request)
        extra = extra_of(request, self._eos_ids)
        if extra is not NOTHING or table.sampling_extra[slot]:
            self._extras.append((slot, extra))
            table.sampling_extra[slot] = extra is not NOTHING
        if p.grammar or table.has_grammar[slot]:
            self._grammars.append((slot, *grammar_of(request)))
            table.has_grammar[slot] = bool(p.grammar)

    def longest_chunk(self, request: Request, start: int, n: int) -> int:
        """How many of the next `n` prompt tokens, from `start` on, the result of this step has room for."""
        if request.scores_prompt:
            n = min(n, self._score_room)
        if request.options.pooling and start + n == len(request.ids) and len(self._pooled) == POOLED_ROWS:
            n -= 1  # no room for another vector: the last token waits for the next step
        return n

    def chunk(self, slot: int, request: Request, start: int, n: int) -> None:
        """Prefill the `n` prompt tokens from `start` on.  The last chunk of a prompt draws a token."""
        end, pooling = start + n, request.options.pooling
        last = end == len(request.ids)
        flags = (DRAW if last else 0) | (SUM if pooling == "mean" else 0)
        if request.scores_prompt:
            flags |= SCORE
            self._targets.append((slot, start + 1, request.ids[start + 1 : end + 1]))
            self._score_room -= n
        if pooling and last:
            flags |= POOL
            self._pooled.append(len(self._drawing))
        if last:
            self._drawing.append(slot)
        self.chunks.append((slot, flags, n))
        self._ids.append(request.ids[start:end])

    def build(self, step: int, decode: I32, repeats: bool, context: int) -> tuple[StepPlan, InFlight]:
        """The plan, and what is needed to read its result.

        `decode`: the slots that decode, i32; `repeats`: they are those of the previous plan; `context`: sum of their lengths.
        """
        plan = StepPlan(
            step,
            new_slots=np.array(self._new_slots, JOIN),
            page_grants=self._table.take_grants(),
            prefill=np.array(self.chunks, PREFILL),
            decode=None if repeats else decode,
            ids=np.concatenate(self._ids) if self._ids else NO_SLOTS,
        )
        if self._extras:
            plan.extras = np.array([(slot, *extra.row) for slot, extra in self._extras], EXTRA)
            plan.bias = np.concatenate([extra.bias for _, extra in self._extras])
            plan.history = np.concatenate([extra.history for _, extra in self._extras])
        if self._grammars:
            plan.grammars = np.array([(slot, len(text), len(output)) for slot, text, output in self._grammars], GRAMMAR)
            plan.said = np.concatenate([output for _, _, output in self._grammars])
            plan.grammar_text = b"".join(text for _, text, _ in self._grammars)
        if self._targets:
            plan.targets = np.concatenate([tokens for _, _, tokens in self._targets])
        rows = np.concatenate([np.array(self._drawing, np.int32), decode])
        logprobs = ExpectedLogprobs.of(rows, self._targets, self._table) if self._table.with_logprobs else None
        cost = features(len(plan.ids), len(decode), context)
        pooled = np.array(self._pooled, np.int32) if self._pooled else NO_SLOTS
        return plan, InFlight(step, rows, self._table.epoch[rows], cost, logprobs, pooled)
