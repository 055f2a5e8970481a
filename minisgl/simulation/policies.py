"""The policies that `--compare` runs: each changes one of the given limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.cache.no_cache import NoCache
from minisgl.cache.radix import RadixCache

Policy = Callable[[SchedulerLimits], SchedulerLimits]


POLICIES: dict[str, Policy] = {
    "as given": lambda limits: limits,
    "order=prefix": partial(replace, order="prefix"),
    "order=arrival": partial(replace, order="arrival"),
    "cache=radix": partial(replace, cache=RadixCache),
    "cache=none": partial(replace, cache=NoCache),
    "share=off": partial(replace, wait_for_shared_prefix=False),
    "itl-target=0": partial(replace, itl_target=0.0),
    "itl-target=auto": partial(replace, itl_target=None),
    "itl-target=30ms": partial(replace, itl_target=0.030),
    "step-tokens/4": lambda limits: replace(limits, step_tokens=max(limits.slots + 1, limits.step_tokens // 4)),
    "step-tokens*2": lambda limits: replace(limits, step_tokens=2 * limits.step_tokens),
    "lag=1": partial(replace, max_steps_in_flight=1),
    "lag=2": partial(replace, max_steps_in_flight=2),
}
