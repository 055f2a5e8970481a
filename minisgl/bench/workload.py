"""What a run is asked: the same requests, token for token, in every run.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, TraceRequest

FIRST_ID = 1000  # of the vocabulary: what lies below may be special
ON_CPU = "n=48,input=32-256,output=16-48,shared=128,groups=4"  # some ten seconds of the embedded model on two cores
ON_GPU = "n=256,input=100-1024,output=100-1024,shared=256,groups=8"


class Job(NamedTuple):
    """A request: seconds after the start, token ids, and how many tokens to answer."""

    arrival: float
    prompt: tuple[int, ...]
    output: int

    @property
    def total(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + self.output


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run.  `concurrency`: at most so many are open at a time, 0 for no bound.  `name`: for tables."""

    name: str
    jobs: tuple[Job, ...]
    concurrency: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(job.total for job in self.jobs)


def prompt_ids(request: TraceRequest, vocab: int, first: int = FIRST_ID) -> list[int]:
    """The prompt as token ids from `first` to `vocab`.  Equal blocks are equal, different ones differ from their first two
    tokens on, although a trace has more blocks than a vocabulary has tokens."""
    size = vocab - first
    high, low = np.divmod(request.tokens - FIRST_PROMPT_TOKEN, size)
    ids = np.repeat(low, request.counts)
    starts = np.cumsum(request.counts) - request.counts
    long = request.counts > 1
    ids[starts[long] + 1] = high[long] % size
    out: list[int] = (ids + first).tolist()
    return out


def jobs_of(requests: Sequence[TraceRequest], vocab: int, context: int) -> tuple[Job, ...]:
    """Those of the requests that fit into the context."""
    first = FIRST_ID if vocab > 2 * FIRST_ID else vocab // 8
    fitting = [r for r in requests if r.input + r.output <= context]
    return tuple(Job(r.arrival, tuple(prompt_ids(r, vocab, first)), r.output) for r in fitting)
