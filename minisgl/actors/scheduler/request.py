"""One request as the scheduler keeps it.  Pure data; runs in the scheduler process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from minisgl.arrays import I32
from minisgl.cache.kept import SALT_BYTES
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One generation request.

    `ids` i32: the `n_prompt` tokens of the prompt (0: all of `ids`).  After a retraction or a replay, the tokens generated so
    far follow them and are prefilled, too.
    """

    uid: int
    ids: I32
    limit: int  # maximum number of tokens, prompt included
    seed: int
    params: SamplingParams
    options: RequestOptions = DEFAULT_OPTIONS
    arrived: float = 0.0  # seconds on the machine's clock
    order: int = 0  # order of arrival
    finish: float = 0.0  # when a fair server would have computed its prompt, in virtual time (fair_queue.py)
    missing_pages: int = 0  # pages needed at the last attempt: skip this request while fewer than this are free
    overtaken_by: int = 0  # requests whose turn came later and that started first
    resumed: bool = False  # has run before
    borrows: bool = False  # reads pages that another request has computed
    retried: bool = False  # had no finite logits while it did
    n_prompt: int = 0
    salt: str = ""  # of the cache: a digest of that of the options
    scored: int = 1  # prompt tokens whose log probabilities are sent already; the first token has none

    def __post_init__(self) -> None:
        self.n_prompt = self.n_prompt or len(self.ids)
        if given := self.options.cache_salt:  # of any length
            self.salt = hashlib.blake2b(given.encode(), digest_size=SALT_BYTES // 2).hexdigest()

    @property
    def turn(self) -> tuple[int, float, int]:
        """Smaller is served first: by priority, then in the fair order."""
        return -self.options.priority, self.finish, self.order

    @property
    def scores_prompt(self) -> bool:
        """Log probabilities of prompt tokens are still to come, so these tokens must be computed, not read from the cache."""
        return self.params.echo and self.params.logprobs is not None and self.scored < self.n_prompt

    @property
    def computes_all(self) -> bool:
        """This request must compute every token of its prompt, whatever the cache has."""
        return self.scores_prompt or self.options.pooling == "mean" or self.retried
