"""What a trace costs while it runs: CPU time of the same load without and with one, in turn.

    .venv/bin/python scripts/bench/tracing.py [--rows 64] [--tokens 100] [--rounds 20]

All actors run in this thread, around the fake engine, so that nothing but the work counts.  One JSON line: `step_us`, CPU
microseconds of a step over all processes without and with, tenth percentile of all steps, as others may use the machine, too;
`events` of a step; `event_us`, CPU of one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from minisgl import LLM, SamplingParams
from minisgl.actors.messages import Trace, Traced
from minisgl.actors.worker import Pending
from minisgl.plan import StepPlan
from minisgl.tracing.observe import observe
from minisgl.tracing.probe import unpacked
from scripts.lib.reference import provenance


def main() -> None:
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("--rows", type=int, default=64, help="requests at the same time")
    p.add_argument("--tokens", type=int, default=100, help="of each answer")
    p.add_argument("--rounds", type=int, default=20)
    args = p.parse_args()
    llm = LLM("fake", processes=False, max_running=args.rows, step_tokens=8192)
    prompts = [[3 + (i * 7 + k) % 200 for k in range(100)] for i in range(args.rows)]
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    sent: list[Traced] = []
    system: Any = llm.system  # all actors in this process
    actors = system.actors.actors
    worker = actors["worker0"]
    probes = [observe(actor.ctx, actor, ship=sent.append) for actor in actors.values()]
    llm.generate(prompts, params)
    gc.freeze()  # as every process does
    times: list[int] = []  # when a step was launched
    launch = worker._runner.launch

    def launching(plan: StepPlan) -> Pending:
        times.append(time.process_time_ns())
        pending: Pending = launch(plan)
        return pending

    worker._runner.launch = launching
    spent: dict[bool, list[float]] = {False: [], True: []}
    n = steps = 0
    for i in range(2 * args.rounds):
        on = i % 2 == 1
        for probe in probes:
            probe(Trace(on=on))
        times.clear()
        llm.generate(prompts, params)
        spent[on] += [(b - a) / 1000 for a, b in pairwise(times)]
        for probe in probes:
            probe(Trace(on=False))
        steps += len(times) * on
        n += sum(1 for m in sent for _ in unpacked(m.data))
        sent.clear()
    llm.close()
    off, on_ = (quantiles(spent[on], n=10)[0] for on in (False, True))
    out = {"rows": args.rows, "step_us": [round(off, 1), round(on_, 1)], "more_us": round(on_ - off, 1)}
    out |= {"events": round(n / steps, 1), "event_us": round((on_ - off) / (n / steps), 2)}
    print(json.dumps(out | provenance()))


if __name__ == "__main__":
    main()
