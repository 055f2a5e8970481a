"""What a Probe notes in a worker process: plans taken, launches, steps of the device, results posted; kernels where asked.

On a CPU the launch of a step is the step.  On a GPU a step has two CUDA events, whose times are those of the device.  One more
event, for which the host waits once when a trace begins, says what they are on the host's clock.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from minisgl.actors.worker import WorkerActor
from minisgl.model.common.finished import Finished
from minisgl.plan import PlanKind, StepPlan
from minisgl.tracing.probe import DEVICE, IN, OUT, Call, Probe

_MARK_NS = 1_000_000_000  # after which CUDA's float32 would be wrong by a tenth of a microsecond


class _Device:
    """When the steps of a GPU ran, on the clock of the probe."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._mark: Any = None  # a CUDA event at host time `_at`
        self._at = self._ended = 0

    def mark(self, event: Any) -> None:
        """Learn the time of the device, with an event of the same kind: the first time, when the step has ended."""
        if self._mark is None:
            event.synchronize()
            self._mark, before = type(event)(enable_timing=True), self._probe.now()
            self._mark.record()
            self._mark.synchronize()
            self._at = (before + self._probe.now()) // 2

    def ran(self, pending: Any, launched: int, seen: int) -> tuple[int, int]:
        """Begin and end of a step that was launched and seen to have ended then.

        The times cannot be outside of these, nor before the end of the step before.  CUDA counts in float32 milliseconds, so
        from time to time the end of a step is the next mark.
        """
        began, ended = launched, seen  # all that is known of a device without events
        if self._mark is not None:
            began = self._at + int(self._mark.elapsed_time(pending.start) * 1e6)
            ended = max(min(self._at + int(self._mark.elapsed_time(pending.end) * 1e6), seen), launched)
        began = min(max(began, launched, self._ended), ended)
        if self._mark is not None and ended - self._at > _MARK_NS:
            self._mark, self._at = pending.end, ended
        self._ended = ended
        return began, ended


def probe_worker(probe: Probe, actor: Any, kernels: bool) -> None:
    """Shadow what a worker does for each step."""
    assert isinstance(actor, WorkerActor)
    device = _Device(probe)
    # Step, time of its launch, and what was launched, as in actor._running; None where that was before the trace.
    launched: deque[tuple[int, int, Any] | None] = deque([None] * len(actor._running))

    def take(original: Call) -> Call:
        def call() -> StepPlan | None:
            began = probe.now()
            plan: StepPlan | None = original()
            if plan is not None and plan.kind == PlanKind.STEP:
                probe.add(began, probe.now(), "take plan", {"step": plan.step}, (IN, "plan", plan.step))
            return plan

        return call

    def launch(original: Call) -> Call:
        def call(plan: StepPlan) -> None:
            began = probe.now()
            original(plan)
            ended = probe.now()
            if plan.kind != PlanKind.STEP:
                return
            pending = actor._running[-1]
            if isinstance(pending, Finished):
                probe.add(began, ended, "step", {"step": plan.step}, track=DEVICE)
            elif hasattr(pending, "end"):
                device.mark(pending.end)
            launched.append((plan.step, began, pending))
            probe.add(began, ended, "launch", {"step": plan.step})

        return call

    def post(original: Call) -> Call:
        def call() -> bool:
            began = probe.now()
            posted: bool = original()
            entry = launched.popleft() if posted else None
            if entry is not None:
                step, at, pending = entry
                hop = (OUT, "result", step, ("scheduler",)) if actor.results is not None else None
                probe.add(began, probe.now(), "post result", {"step": step}, hop)
                if not isinstance(pending, Finished):
                    probe.add(*device.ran(pending, at, began), "step", {"step": step}, track=DEVICE)
            return posted

        return call

    probe.shadow(actor, "_take", take)
    probe.shadow(actor, "_launch", launch)
    probe.shadow(actor, "_post", post)
    if kernels:
        from minisgl.tracing.kernels import Kernels

        probe.at_end(Kernels(probe).stop)
