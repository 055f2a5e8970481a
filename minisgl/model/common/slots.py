"""Keeps the state of every slot between steps and lays out the batch of a plan.  numpy only; one copy in every worker.

    new_slots    a slot's KV length and sampling parameters are set
    extras       slots with log probabilities, and slots whose logits are adjusted (cpu/penalties.py), are noted
    page_grants  page_table[slot, index] = page
    prefill      n prompt tokens are appended at the slot's KV length
    decode       the slot's last token is appended

A row of the page table is valid for the pages that hold the slot's first kv_len tokens.  The entries after them may name pages
of former owners, which are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minisgl.arrays import F32, I32, I64
from minisgl.plan import DRAW, SCORE, StepPlan

U64 = npt.NDArray[np.uint64]
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")  # columns of plan.JOIN, kept for each slot


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of the R rows that draw a token, and the position of each new token in its text."""

    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    seed: U64
    positions: I64


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All rows of one step, ready to compute: T tokens of P prompt chunks, then B decode rows.

    Decode rows are ordered by context, longest first, so that attention pads neighbours to one length cheaply; `sample_rows`
    undoes that order.
    """

    ids: I64  # [T]
    positions: I64  # [T]
    kv_index: I64  # [T] place of each token's key and value: page * page_size + offset
    chunk_lens: I32  # [P] tokens of each prompt chunk
    kv_lens: I32  # [P + B] tokens in the KV cache after this step
    pages: I32  # [P + B, pages of the longest row]; valid for the first kv_len tokens of each row
    sample_rows: I64  # [R] the tokens whose logits are sampled from, in the order of StepResult.tokens
    sample_slots: I64  # [R]
    decode_slots: I64  # [B] slot of each decode row
    sampling: SamplingRows
    score_rows: I64  # [M] the tokens of prompts whose successors get log probabilities
    score_slots: I64  # [M]
    targets: I32  # [M] these successors


class SlotState:
    """The resident state of `max_running` slots."""

    def __init__(self, max_running: int, max_context: int, page_size: int) -> None:
        self.page_size = page_size
        self.last_token: I32 = np.zeros(max_running, np.int32)
        self.kv_len: I32 = np.zeros(max_running, np.int32)
        self.page_table: I32 = np.zeros((max_running, -(-max_context // page_size)), np.int32)
        self.temperature: F32 = np.zeros(max_running, np.float32)
        self.top_k: I32 = np.zeros(max_running, np.int32)
        self.top_p: F32 = np.ones(max_running, np.float32)
        self.min_p: F32 = np.zeros(max_running, np.float32)
        self.seed: U64 = np.zeros(max_running, np.uint64)
        self.extras = False  # whether any slot has ever had an extra: otherwise the next three are unused
        self.logprobs: I32 = np.full(max_running, -1, np.int32)  # requested alternatives; -1: no log probabilities at all
        self.adjusted = np.zeros(max_running, np.bool_)  # has biases or penalties
        self.counted = np.zeros(max_running, np.bool_)  # has penalties
        self._decode: I64 = np.zeros(0, np.int64)  # decode slots of the latest plan

    def apply(self, plan: StepPlan) -> StepBatch:
        """Update the slots and lay out the rows of one plan.  Plans must come in order, each exactly once."""
        self._update(plan)
        return self._lay_out(plan)

    def advance_decode(self, plan: StepPlan) -> I32:
        """`apply` for a plan without prompts, which needs no layout; returns the slots that decode, in the plan's order."""
        self._update(plan)
        self.kv_len[self._decode] += 1
        return self._decode.astype(np.int32)

    def _update(self, plan: StepPlan) -> None:
        j = plan.new_slots
        self.kv_len[j["slot"]] = j["kv_len"]
        for name in _SAMPLING:
            getattr(self, name)[j["slot"]] = j[name]
        if len(plan.extras):
            self.extras = True
            e, slots = plan.extras, plan.extras["slot"]
            self.logprobs[slots] = e["logprobs"]
            self.counted[slots] = (e["presence"] != 0) | (e["frequency"] != 0) | (e["repetition"] != 1)
            self.adjusted[slots] = self.counted[slots] | (e["n_bias"] > 0)
        self.page_table[plan.page_grants["slot"], plan.page_grants["index"]] = plan.page_grants["page"]
        if plan.decode is not None:
            self._decode = plan.decode.astype(np.int64)

    def advance(self, batch: StepBatch, tokens: I32) -> None:
        """Keep the tokens that the rows of a batch sampled, for the next decode step."""
        self.last_token[batch.sample_slots] = tokens

    def _lay_out(self, plan: StepPlan) -> StepBatch:
        prompts, chunk_lens = plan.prefill["slot"].astype(np.int64), plan.prefill["n_ids"]
        order = np.argsort(-self.kv_len[self._decode], kind="stable")
        decode = self._decode[order]
        slots = np.concatenate((prompts, decode))
        lens = np.concatenate((chunk_lens, np.ones(len(decode), np.int32)))  # tokens that each row appends

        starts = np.cumsum(lens) - lens  # first token of each row within the step
        row = np.repeat(np.arange(len(slots)), lens)  # row of each token
        positions = self.kv_len[slots][row] + np.arange(len(row)) - starts[row]
        page = self.page_table[slots[row], positions // self.page_size]
        self.kv_len[slots] += lens
        kv_lens = self.kv_len[slots]
        longest = -(-int(kv_lens.max(initial=0)) // self.page_size)

        sampling_prompts = np.flatnonzero(plan.prefill["sample"] & DRAW)
        position_of = np.empty(len(decode), np.int64)  # place of the plan's i-th decode slot among the decode rows
        position_of[order] = np.arange(len(decode))
        sample_slots = np.concatenate((prompts[sampling_prompts], self._decode))
        n_prompt_ids = len(plan.ids)
        score_rows = _score_rows(plan) if len(plan.targets) else np.zeros(0, np.int64)
        return StepBatch(
            ids=np.concatenate((plan.ids, self.last_token[decode])).astype(np.int64),
            positions=positions.astype(np.int64),
            kv_index=page.astype(np.int64) * self.page_size + positions % self.page_size,
            chunk_lens=chunk_lens,
            kv_lens=kv_lens,
            pages=self.page_table[slots, :longest],
            sample_rows=np.concatenate(((starts + lens - 1)[sampling_prompts], n_prompt_ids + position_of)).astype(np.int64),
            sample_slots=sample_slots,
            decode_slots=decode,
            sampling=SamplingRows(
                **{name: getattr(self, name)[sample_slots] for name in _SAMPLING},
                positions=self.kv_len[sample_slots].astype(np.int64),
            ),
            score_rows=score_rows,
            score_slots=slots[row[score_rows]],
            targets=plan.targets,
        )


def _score_rows(plan: StepPlan) -> I64:
    """The tokens that the plan's `targets` follow: those of rows with SCORE, except the last one of a row that draws."""
    lens = plan.prefill["n_ids"]
    scored = np.repeat(plan.prefill["sample"] & SCORE, lens) > 0
    drawing = (plan.prefill["sample"] & DRAW) > 0
    scored[np.cumsum(lens)[drawing] - 1] = False
    return np.flatnonzero(scored)
