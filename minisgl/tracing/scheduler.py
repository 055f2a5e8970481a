"""What a Probe notes in the scheduler process: the phases of each step, and what happens to requests."""

from __future__ import annotations

from typing import Any

from minisgl.actors.scheduler.actor import SchedulerActor
from minisgl.actors.scheduler.interface import Output
from minisgl.plan import PlanKind, StepResult
from minisgl.tracing.probe import IN, OUT, REQUESTS, Call, Probe


def probe_scheduler(probe: Probe, actor: Any, steps: int) -> None:
    """Shadow the phases of a step.  `steps`: after the results of so many, say so; 0: never."""
    assert isinstance(actor, SchedulerActor)
    machine = actor._machine()
    workers = [f"worker{rank}" for rank in range(actor.config.engine.tp)]
    last = machine.counters.steps + steps - 1

    def idle(original: Call) -> Call:
        def call() -> bool:
            began, before = probe.now(), probe.count
            worked: bool = original()
            if probe.count != before:
                probe.add(began, probe.now(), "step")
            return worked

        return call

    def take_result(original: Call) -> Call:
        def call(result: StepResult, out: Output) -> None:
            began = probe.now()
            original(result, out)
            newest[0] = result.step
            args = {"step": result.step, "busy_us": result.busy_us, "idle_us": result.idle_us, "launch_us": result.launch_us}
            probe.add(began, probe.now(), "take result", args, (IN, "result", result.step))

        return call

    def plan(original: Call) -> Call:
        def call(out: Output) -> None:
            began = probe.now()
            original(out)
            if (made := out.plan) is not None:
                args = {
                    "step": made.step,
                    "decode_rows": len(machine._last_decode) if machine._last_decode is not None else 0,
                    "prompt_tokens": len(made.ids),
                    "running": len(machine.running),
                    "waiting": len(machine.waiting),
                    "free_pages": machine.pool.free,
                }
                probe.add(began, probe.now(), "admission and plan", args)

        return call

    def flush(original: Call) -> Call:
        def call() -> bool:
            unsent, began = actor._unsent, probe.now()
            sent: bool = original()
            if sent and unsent is not None and unsent.kind == PlanKind.STEP:
                probe.add(began, probe.now(), "publish", {"step": unsent.step}, (OUT, "plan", unsent.step, workers))
            return sent

        return call

    def send(original: Call) -> Call:
        def call(output: Output, now: float) -> None:
            began, before = probe.now(), probe.count
            original(output, now)
            ended = probe.now()
            if probe.count != before:
                probe.add(began, ended, "send output")
            note(output, began)

        return call

    def note(output: Output, at: int) -> None:
        """For the tracks of requests."""
        chunks, step = [], -1
        if output.plan is not None and len(output.plan.prefill):
            step = output.plan.step
            rows = zip(output.plan.prefill["slot"].tolist(), output.plan.prefill["n_ids"].tolist(), strict=True)
            chunks = [(int(machine.table.uid[slot]), n) for slot, n in rows]
        tokens = [(r.uids.tobytes(), r.counts.tobytes(), r.finish.tobytes()) for r in output.outputs]
        vectors = [uid for uid, _ in output.vectors]
        if chunks or tokens or output.started or vectors:
            probe.add(at, at, "", (step, output.started, chunks, tokens, vectors), track=REQUESTS)
        if steps and newest[0] >= last:
            probe.enough()

    newest = [-1]  # step whose result has come
    probe.shadow(actor, "idle", idle)
    probe.shadow(actor, "_flush", flush)
    probe.shadow(actor, "_send", send)
    probe.shadow(machine, "_take_result", take_result)
    probe.shadow(machine, "_plan", plan)
