"""Requests that wait to run.  Pure data structure; runs in the scheduler process.

Order: higher priority first; among equals those that have run before (retracted) first, then by arrival.  Nothing here walks
the queue: its length appears in no cost.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams

I32 = npt.NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Request:
    """One generation request.

    `ids` i32: the prompt, of `n_prompt` tokens (0: all), and after a retraction or replay also what was generated so far.
    """

    uid: int
    ids: I32
    limit: int  # tokens in all, prompt included
    seed: int
    params: SamplingParams
    options: RequestOptions = DEFAULT_OPTIONS
    arrived: float = 0.0  # seconds on the machine's clock
    order: int = 0  # order of arrival
    need: int = 0  # pages it lacked when it was last looked at: with fewer it need not be tried
    passed: int = 0  # requests behind it in the queue (less important, or as important and younger) that were started first
    resumed: bool = False  # has run before
    n_prompt: int = 0
    scored: int = 1  # tokens of the prompt whose log probabilities are known or cannot be: nothing stands before the first

    def __post_init__(self) -> None:
        self.n_prompt = self.n_prompt or len(self.ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of prompt tokens are still to come: they must be computed, and are in no cache."""
        return self.params.echo and self.params.logprobs is not None and self.scored < self.n_prompt

    @property
    def computes_all(self) -> bool:
        """Whether every token of the prompt must be computed by this request itself, whatever the cache has of it."""
        return self.scores_prompt or self.options.pooling == "mean"


class WaitQueue:
    """Add, remove and look at the front, each in constant time (for a bounded number of distinct priorities)."""

    def __init__(self) -> None:
        self.tokens = 0  # prompt tokens of all waiting requests
        self._lanes: dict[int, OrderedDict[int, Request]] = {}  # priority -> uid -> request
        self._order: list[int] = []  # negated priorities, ascending: the most important lane first
        self._where: dict[int, int] = {}  # uid -> priority

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, uid: int) -> bool:
        return uid in self._where

    def add(self, request: Request, front: bool = False) -> None:
        """Append to the lane of its priority; `front`: before all others of it."""
        priority = request.options.priority
        lane = self._lanes.get(priority)
        if lane is None:
            lane = self._lanes[priority] = OrderedDict()
            insort(self._order, -priority)
        lane[request.uid] = request
        if front:
            lane.move_to_end(request.uid, last=False)
        self._where[request.uid] = priority
        self.tokens += len(request.ids)

    def remove(self, uid: int) -> Request | None:
        """Take a request out; None if it does not wait."""
        priority = self._where.pop(uid, None)
        if priority is None:
            return None
        lane = self._lanes[priority]
        request = lane.pop(uid)
        self.tokens -= len(request.ids)
        if not lane:
            del self._lanes[priority]
            self._order.remove(-priority)
        return request

    def front(self, n: int) -> list[Request]:
        """The first `n` requests, in order."""
        return list(islice(self._walk(), n))

    def _walk(self) -> Iterator[Request]:
        for negated in self._order:
            yield from self._lanes[-negated].values()
