"""The policies that `--compare` runs: each changes one of the given limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.cache.no_cache import NoCache
from minisgl.cache.radix import RadixCache

Policy = Callable[[SchedulerLimits], SchedulerLimits]


def _set(**changes: Any) -> Policy:
    return lambda limits: replace(limits, **changes)


POLICIES: dict[str, Policy] = {
    "as given": lambda limits: limits,
    "order=prefix": _set(order="prefix"),
    "order=arrival": _set(order="arrival"),
    "cache=radix": _set(cache=RadixCache),
    "cache=none": _set(cache=NoCache),
    "share=off": _set(wait_for_shared_prefix=False),
    "itl-target=0": _set(itl_target=0.0),
    "itl-target=30ms": _set(itl_target=0.030),
    "step-tokens/4": lambda limits: replace(limits, step_tokens=max(limits.slots + 1, limits.step_tokens // 4)),
    "step-tokens*2": lambda limits: replace(limits, step_tokens=2 * limits.step_tokens),
    "lag=1": _set(max_steps_in_flight=1),
    "lag=2": _set(max_steps_in_flight=2),
}
