"""Fit the simulator's cost model to the engine on this machine, and see how well it predicts.

    python scripts/tune/fit_costs.py [--model M] [--requests 24] [--out costs.json]

Runs the real scheduler core and the real model in one process: StepMachine + Runner under the wall clock, with timed arrivals.
Two workloads, of half and twice the rate, give the coefficients (least squares over all their steps).  Between them a third,
with other lengths and arrivals, is measured, and then simulated with them: a machine that drifts does so for all.

Prints measured and predicted mean TTFT, mean gap and throughput with relative errors, then one JSON line.
`python -m minisgl simulate TRACE --cost-json costs.json` uses the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np

from minisgl.actors.scheduler.interface import Add, Event, SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.actors.spawn import make_runner
from minisgl.config import Config, EngineConfig
from minisgl.model.checkpoint.resolve import resolve
from minisgl.plan import DRAW, StepPlan
from minisgl.sampling_params import SamplingParams
from minisgl.simulation.fleet import simulate
from minisgl.simulation.gpu import Work, fit
from minisgl.simulation.replica import Log
from minisgl.simulation.report import Summary, summarise
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN, TraceRequest, load


class Engine:
    """The machine and the runner, `lag` plans apart."""

    def __init__(self, config: Config, run_dir: str) -> None:
        self.config = config
        self.runner = make_runner(config, 0, run_dir)
        self.pages = self.runner.max_pages()
        self.runner.allocate(self.pages)

    def limits(self, vocab_size: int) -> SchedulerLimits:
        e = self.config.engine
        return SchedulerLimits(
            e.max_running, self.pages, e.page_size, self.config.max_context, e.step_tokens, e.lag, vocab_size
        )

    def serve(self, requests: list[TraceRequest]) -> tuple[Log, list[Work], list[float]]:
        """Run a trace by the wall clock.  Returns what happened, and the work and the busy seconds of every step."""
        vocab = self.config.model.vocab_size
        machine, log = StepMachine(self.limits(vocab)), Log(len(requests))
        log.arrival[:] = [r.arrival for r in requests]
        params = SamplingParams(temperature=0, ignore_eos=True)
        coming = deque(
            Request(uid, (r.ids() - FIRST_PROMPT_TOKEN) % vocab, r.input + r.output, uid, params)
            for uid, r in enumerate(requests)
        )
        published: deque[tuple[StepPlan, Work]] = deque()
        works: list[Work] = []
        seconds: list[float] = []
        decode = np.zeros(0, np.int32)
        inbox: list[Event] = []
        start = time.perf_counter()
        while coming or not machine.idle:
            now = time.perf_counter() - start
            while coming and log.arrival[coming[0].uid] <= now:
                inbox.append(Add(coming.popleft()))
            out = machine.step(inbox, now)
            inbox = []
            for uid, cached in out.started:
                log.cached[uid] = cached
            for rows in out.outputs:
                log.enter(rows, now)
            if out.plan is not None:
                decode = decode if out.plan.decode is None else out.plan.decode
                published.append((out.plan, work_of(out.plan, decode, machine)))
                if len(machine.inflight) < machine.limits.max_steps_in_flight:
                    continue
            if published:
                plan, work = published.popleft()
                result = self.runner.launch(plan).result()
                works.append(work)
                seconds.append(result.busy_us * 1e-6)
                inbox.append(result)
            else:
                time.sleep(1e-4)
        machine.check()
        return log, works, seconds


def work_of(plan: StepPlan, decode: np.ndarray, machine: StepMachine) -> Work:
    """What a plan computes, read from the machine's table just after it was planned."""
    planned = machine.table.planned
    n = plan.prefill["n_ids"].astype(np.int64)
    context = planned[plan.prefill["slot"]].astype(np.int64)
    return Work(
        prefill_tokens=int(n.sum()),
        pairs=int((n * (context - n) + n * (n + 1) // 2).sum()),
        prefill_context=int(context.sum()),
        decode_rows=len(decode),
        decode_context=int(planned[decode].sum()),
        samples=int((plan.prefill["sample"] & DRAW).sum()) + len(decode),
    )


def measures(log: Log) -> dict[str, float]:
    """The same three numbers for a measured run as for a simulated one."""
    span = float(log.last.max() - log.arrival.min())
    return {
        "ttft_ms_mean": float((log.first - log.arrival).mean()) * 1e3,
        "itl_ms_mean": float(np.concatenate(log.gaps).mean()) * 1e3,
        "output_tok_s": float(log.tokens.sum()) / span,
    }


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second (%(default)s)")
    parser.add_argument("--input", default="16-256", help="prompt tokens (%(default)s), beside 64 that all share")
    parser.add_argument("--output", default="8-48", help="tokens to generate (%(default)s)")
    parser.add_argument("--kv-tokens", type=int, default=16_384)
    parser.add_argument("--max-running", type=int, default=16)
    parser.add_argument("--step-tokens", type=int, default=256)
    parser.add_argument("--lag", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="costs.json")
    args = parser.parse_args()
    engine_config = EngineConfig(
        dtype=args.dtype,
        threads=args.threads,
        kv_tokens=args.kv_tokens,
        max_running=args.max_running,
        step_tokens=args.step_tokens,
        lag=args.lag,
    )

    def workload(rate: float, seed: int) -> list[TraceRequest]:
        shape = f"input={args.input},output={args.output},shared=64,n={args.requests}"
        return load(f"synthetic:rate={rate},{shape},seed={seed}")

    with tempfile.TemporaryDirectory() as run_dir:
        engine = Engine(Config(resolve(args.model), engine_config), run_dir)
        engine.serve(load("synthetic:input=64,output=4,n=2"))  # warms everything up
        _, works, seconds = engine.serve(workload(args.rate / 2, args.seed))
        requests = workload(args.rate, args.seed + 1)
        log, again, busy = engine.serve(requests)
        _, more_works, more_seconds = engine.serve(workload(args.rate * 2, args.seed + 2))
        limits = engine.limits(FIRST_PROMPT_TOKEN)
        engine.runner.close()
    works, seconds = works + more_works, seconds + more_seconds
    costs = fit(works, seconds)
    Path(args.out).write_text(costs.to_json() + "\n")
    predicted: Summary = summarise(simulate(requests, limits, costs))
    error = float(np.mean([abs(costs.seconds(w) - s) for w, s in zip(again, busy, strict=True)]) / np.mean(busy))
    print(f"{len(works)} steps fitted, {args.out} written; mean error of a step of the third workload {error:.1%}")
    rows = {"steps": len(works), "step_error": error, "costs": json.loads(costs.to_json())}
    for name, value in measures(log).items():
        off = predicted[name] / value - 1
        rows[name] = {"measured": value, "predicted": predicted[name], "error": off}
        print(f"{name:<13} measured {value:9.2f}   predicted {predicted[name]:9.2f}   {off:+.1%}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
