"""The policies that `--compare` runs: each changes one thing of the given Limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from minisgl.actors.scheduler.step_machine import SchedulerLimits


def as_given(limits: SchedulerLimits) -> SchedulerLimits:
    """The flags of the command line."""
    return limits


def order_prefix(limits: SchedulerLimits) -> SchedulerLimits:
    """The longest cached prefix starts first."""
    return replace(limits, order="prefix")


def order_arrival(limits: SchedulerLimits) -> SchedulerLimits:
    """First come, first started."""
    return replace(limits, order="arrival")


def cache_none(limits: SchedulerLimits) -> SchedulerLimits:
    """No prefix cache."""
    return replace(limits, cache="none")


def share_off(limits: SchedulerLimits) -> SchedulerLimits:
    """A prompt does not wait for pages that another is just computing."""
    return replace(limits, wait_for_shared_prefix=False)


def itl_off(limits: SchedulerLimits) -> SchedulerLimits:
    """Prefill chunks fill the step whatever that costs the decodes."""
    return replace(limits, itl_target=0.0)


def itl_30ms(limits: SchedulerLimits) -> SchedulerLimits:
    """Prefill chunks shrink so that a step with decodes takes 30 ms."""
    return replace(limits, itl_target=0.030)


def small_steps(limits: SchedulerLimits) -> SchedulerLimits:
    """A quarter of the token budget, but enough for all slots."""
    return replace(limits, step_tokens=max(limits.slots + 1, limits.step_tokens // 4))


def large_steps(limits: SchedulerLimits) -> SchedulerLimits:
    """Twice the token budget."""
    return replace(limits, step_tokens=2 * limits.step_tokens)


def lag_1(limits: SchedulerLimits) -> SchedulerLimits:
    """No overlap: a plan waits for the result of the one before."""
    return replace(limits, max_steps_in_flight=1)


def lag_2(limits: SchedulerLimits) -> SchedulerLimits:
    """One plan runs, the next is published."""
    return replace(limits, max_steps_in_flight=2)


POLICIES: dict[str, Callable[[SchedulerLimits], SchedulerLimits]] = {
    "as given": as_given,
    "order=prefix": order_prefix,
    "order=arrival": order_arrival,
    "cache=none": cache_none,
    "share=off": share_off,
    "itl-target=0": itl_off,
    "itl-target=30ms": itl_30ms,
    "step-tokens/4": small_steps,
    "step-tokens*2": large_steps,
    "lag=1": lag_1,
    "lag=2": lag_2,
}
