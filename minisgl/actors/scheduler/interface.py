"""The interface of the step machine: its limits, the events that go in, the outputs and counters that come out.  Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from minisgl.actors.messages import TokenLogprobs, Tokens
from minisgl.actors.scheduler.request import Request
from minisgl.arrays import F32
from minisgl.cache.radix import RadixCache
from minisgl.plan import StepPlan, StepResult

GPU_PROMPT_SECONDS = 0.008  # `prompt_seconds` on a GPU: with less, chunks are too short for its full speed


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The sizes that bound the machine.  `step_tokens` must exceed `slots`, or decodes could starve prefills.

    `cache`: the class of the cache, RadixCache or a subclass with another eviction policy.
    `itl_target` in seconds, 0 for none: prefill chunks shrink so that a step with decodes is expected to take no longer.  None:
    prompts get three quarters of the time that the decodes beside them take, and at least `prompt_seconds` a step.
    `order`: "prefix" starts the requests with the longest cached prefix first (among equal priorities of a client near the
    front), "arrival" does not look.
    `wait_for_shared_prefix`: a prompt waits for pages of its beginning that another request is computing.
    `grammar_waits_for_token`: a row with a grammar decodes only when none of its tokens is in flight, for workers that learn
    tokens after they have launched the next step.
    """

    slots: int
    num_pages: int
    page_size: int
    max_context: int
    step_tokens: int
    max_steps_in_flight: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    cache: type[RadixCache] = RadixCache
    itl_target: float | None = 0.0
    prompt_seconds: float = 0.0
    order: str = "prefix"
    wait_for_shared_prefix: bool = True
    grammar_waits_for_token: bool = False

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds; a longer request could never run."""
        return self.num_pages * self.page_size


# ---------------- what goes in
@dataclass(frozen=True, slots=True)
class Add:
    """A new request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Drop:
    """Request `uid` is cancelled.  Unknown uids are ignored."""

    uid: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Empty the cache, except for the pages of running requests."""


Event = Add | Drop | Flush | StepResult


# ---------------- who looks on
class Watcher(Protocol):
    """Sees every call of the machine, in the scheduler's thread.  It changes nothing, and raises nothing."""

    def saw(self, inbox: list[Event], now: float, output: Output) -> None:
        """After a call of `step`, whose cost is part of the step."""

    def rest(self, now: float) -> float:
        """The scheduler has nothing to do.  Returns when this should be called again, if nothing happens before."""

    def close(self) -> None:
        """The scheduler ends."""


# ---------------- what comes out
@dataclass(slots=True)
class Output:
    """What one call of `step` decided.

    `outputs` and `logprobs` are for the detokenizer.  `started`: (uid, cached prompt tokens) of the requests admitted for the
    first time; `evicted`: (uid, seconds ago) of those among them whose next pages had been evicted.  `vectors`: (uid, pooled
    vector); these requests end with their vector and have no row in `outputs`.  `again_in`: seconds after which a plan that is
    held back is due, 0 if the machine waits for events only.
    """

    plan: StepPlan | None = None
    again_in: float = 0.0
    outputs: list[Tokens] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    started: list[tuple[int, int]] = field(default_factory=list)
    evicted: list[tuple[int, float]] = field(default_factory=list)
    vectors: list[tuple[int, F32]] = field(default_factory=list)


@dataclass(slots=True)
class Counters:
    """Totals since the start.  Tokens are counted when they are planned."""

    steps: int = 0
    admitted: int = 0
    retractions: int = 0
    nan_requests: int = 0  # ended because their logits were no finite numbers
    wasted_rows: int = 0  # computed for requests that had already ended
    prompt_tokens: int = 0  # of requests when they were first admitted
    cached_tokens: int = 0  # of these, found in the cache
    prefill_tokens: int = 0  # computed
    decode_tokens: int = 0
    busy_us: int = 0  # as measured by the device, over all steps
    idle_us: int = 0
    launch_us: int = 0
    warmups: int = 0  # graphs captured and kernels compiled while a step waited for them: none in steady state
    misses: dict[str, int] = field(default_factory=dict)  # prompt tokens not found at first admission, by reason
