"""One request as the scheduler keeps it.  Pure data; runs in the scheduler process."""

from __future__ import annotations

from dataclasses import dataclass

from minisgl.arrays import I32
from minisgl.sampling_params import DEFAULT_OPTIONS, RequestOptions, SamplingParams


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
    missing_pages: int = 0  # pages it lacked when it was last looked at: with fewer it need not be tried
    overtaken_by: int = 0  # later requests in the queue (less important, or as important and younger) that started first
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
