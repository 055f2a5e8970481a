"""Sampling extras: what a request needs from the sampler beyond the columns of plan.JOIN: penalties, biases, a grammar.

Most requests have none, and their plans say nothing about it.  Runs in the scheduler process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I32
from minisgl.plan import BIAS, NO_EXTRA
from minisgl.sampling_params import MAX_EOS_IDS


@dataclass(frozen=True, slots=True)
class Extra:
    """One row of plan.EXTRA without its slot, with the rows of BIAS and the history that belong to it."""

    row: tuple[float | int, ...]
    bias: npt.NDArray[np.void]
    history: I32


NOTHING = Extra(NO_EXTRA, np.zeros(0, BIAS), np.zeros(0, np.int32))


def extra_bytes(request: Request) -> int:
    """Upper bound on the bytes that extras and grammar of a request add to a plan, without their fixed rows."""
    p = request.params
    ends = MAX_EOS_IDS + len(p.stop_token_ids) if p.min_tokens else 0
    grammar = 4 * (len(p.grammar) + len(request.ids)) if p.grammar else 0
    return BIAS.itemsize * (len(p.logit_bias) + ends) + (4 * len(request.ids) if p.penalised else 0) + grammar


def grammar_of(request: Request) -> tuple[bytes, I32]:
    """The text of a request's grammar and its answer so far, both empty without a grammar."""
    text = request.params.grammar.encode()
    return text, request.ids[request.n_prompt :] if text else request.ids[:0]


def extra_of(request: Request, eos_ids: tuple[int, ...]) -> Extra:
    """The extras of a request that starts or resumes; NOTHING for most requests.

    The ids of a resumed request include its answer so far, so its penalties continue as if it had never stopped.
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
