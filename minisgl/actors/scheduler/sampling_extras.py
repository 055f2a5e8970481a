"""What a request asks of sampling beyond the columns of plan.JOIN, as the plan's extras.  Runs in the scheduler process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I32
from minisgl.plan import BIAS, GRAMMAR, NO_EXTRA, StepPlan
from minisgl.sampling_params import MAX_EOS_IDS


@dataclass(frozen=True, slots=True)
class Extra:
    """One row of plan.EXTRA without its slot, with the rows of BIAS and the history that belong to it."""

    row: tuple[float | int, ...]
    bias: npt.NDArray[np.void]
    history: I32


NOTHING = Extra(NO_EXTRA, np.zeros(0, BIAS), np.zeros(0, np.int32))


def extra_bytes(request: Request) -> int:
    """At most so many bytes of a plan, beside the row itself."""
    p = request.params
    ends = MAX_EOS_IDS + len(p.stop_token_ids) if p.min_tokens else 0
    grammar = 4 * (len(p.grammar) + len(request.ids)) if p.grammar else 0
    return BIAS.itemsize * (len(p.logit_bias) + ends) + (4 * len(request.ids) if p.penalised else 0) + grammar


@dataclass(frozen=True, slots=True)
class GrammarRow:
    """One row of plan.GRAMMAR with what belongs to it; no text: the slot's owner has no grammar."""

    slot: int
    text: bytes
    output: I32

    @classmethod
    def of(cls, slot: int, request: Request) -> GrammarRow:
        output = request.ids[request.n_prompt :] if request.params.grammar else request.ids[:0]
        return cls(slot, request.params.grammar.encode(), output)


def enter_grammars(plan: StepPlan, rows: list[GrammarRow]) -> None:
    """Put the grammars of requests that start or resume into a plan."""
    plan.grammars = np.array([(b.slot, len(b.text), len(b.output)) for b in rows], GRAMMAR)
    plan.said = np.concatenate([b.output for b in rows])
    plan.grammar_text = b"".join(b.text for b in rows)


def extra_of(request: Request, eos_ids: tuple[int, ...]) -> Extra:
    """NOTHING for most requests.

    Called whenever a request starts or resumes: what it has said so far is in its ids, so a resumed request goes on as if it
    had never stopped.
    """
    p = request.params
    if not (p.penalised or p.logit_bias or p.min_tokens or p.logprobs is not None):
        return NOTHING
    until = request.n_prompt + p.min_tokens if len(request.ids) < request.n_prompt + p.min_tokens else 0
    ends = {*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)} if until else set()
    values = dict(p.logit_bias)
    bias = [(t, values.get(t, 0.0), until if t in ends else 0) for t in sorted({*values, *ends})]
    output = request.ids[request.n_prompt :] if p.penalised else request.ids[:0]
    prompt = request.ids[: request.n_prompt] if p.repetition_penalty != 1 else request.ids[:0]
    logprobs = -1 if p.logprobs is None else p.logprobs
    row = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty, logprobs, len(bias), len(prompt), len(output))
    return Extra(row, np.array(bias, BIAS), np.concatenate((prompt, output)))
