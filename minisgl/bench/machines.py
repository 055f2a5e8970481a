"""The scheduler without one of its decisions, for ablations: subclasses that override as little as they can.

The fake engine shows that they compute the same answers.  Run in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from minisgl.actors.runtime.actor import Context
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.scheduler.interface import Output, SchedulerLimits
from minisgl.actors.scheduler.plan_builder import NO_SLOTS, PlanBuilder
from minisgl.actors.scheduler.step_cost import StepCosts
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.config import Config


class WholePrompts(StepMachine):
    """A prompt is computed in one step: where it does not fit into the rest of the budget it waits, and alone it may exceed it.

    Only where pages run out is it cut.  Steps have up to `step_tokens` plus the longest prompt.
    """

    def _cut_chunk(self, slot: int, budget: int, builder: PlanBuilder) -> int:
        rest = len(self._request(slot).ids) - int(self.table.planned[slot])
        if rest > budget and builder.chunks:
            return 0
        return super()._cut_chunk(slot, max(budget, rest), builder)


class SeparateSteps(StepMachine):
    """A step has prompts or decodes, never both; prompts come first, and the running requests wait for them."""

    def _plan(self, out: Output) -> None:
        if not self._prefilling and not len(self.waiting):
            self.fair.rest()
        first = self._make_way()
        builder, most = PlanBuilder(self.table, self._eos_ids), self.limits.slots
        if self.limits.itl_target is None:
            context = int(self.table.planned[self._decoding].sum())
            most = min(most, self.costs.rows_within_step(len(self._decoding), context))
        self._prefill(first, self._prefill_budget(0, 0), most, builder, out)
        decode = NO_SLOTS if builder.chunks else self._plan_decode()
        if builder.chunks or len(decode):
            self._publish(builder, decode, int(self.table.planned[decode].sum()), out)
        elif self._prefilling and not self.inflight and len(self.running) > 1:
            self._retract()
            self._plan(out)


class _NoSlack(StepCosts):
    def slack(self, *_: Any) -> float:
        return 0.0


class EarlyPlans(StepMachine):
    """A plan is published as soon as there is room for it in flight, not just in time."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self.costs = _NoSlack()


class Edit(NamedTuple):
    """What a scheduler does otherwise than its configuration says: the class of its machine, and fields of SchedulerLimits."""

    machine: type[StepMachine] = StepMachine
    limits: Mapping[str, Any] = MappingProxyType({})


class AblatedScheduler(SchedulerActor):
    """A SchedulerActor whose machine is edited."""

    def __init__(self, edit: Edit, ctx: Context, config: Config, arenas: Arenas, takes_over: int = 0) -> None:
        self._edit = edit  # first: a scheduler that takes over makes its machine at once
        super().__init__(ctx, config, arenas, takes_over)

    def _make_machine(self, num_pages: int) -> None:
        super()._make_machine(num_pages)
        self.machine = self._edit.machine(replace(self._machine().limits, **self._edit.limits))
        self.machine.counters.steps = self._first_step
