"""What a trace costs while it runs: CPU time of the same load without and with one, in turn.

    .venv/bin/python scripts/bench/tracing.py [--rows 64] [--tokens 100] [--rounds 20]

All actors run in this thread, around the fake engine, so that nothing but the work counts.  One JSON line: `step_us`, CPU
microseconds of a step over all processes, median of the rounds, without and with; `events` of a step; `event_us`, CPU of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from minisgl import LLM, SamplingParams
from minisgl.actors.messages import Trace, Traced
from minisgl.tracing.observe import observe
from minisgl.tracing.probe import unpacked
from scripts.lib.reference import provenance


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--rows", type=int, default=64, help="requests at the same time")
    p.add_argument("--tokens", type=int, default=100, help="of each answer")
    p.add_argument("--rounds", type=int, default=20)
    args = p.parse_args()
    llm = LLM("fake", processes=False, max_running=args.rows, step_tokens=8192)
    prompts = [[3 + (i * 7 + k) % 200 for k in range(100)] for i in range(args.rows)]
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    sent: list[Traced] = []
    probes = [observe(actor.ctx, actor, ship=sent.append) for actor in llm._system.actors.actors.values()]
    spent: dict[bool, list[float]] = {False: [], True: []}
    steps, n = 0, 0
    for i in range(2 * args.rounds + 2):
        on = i % 2 == 1
        if on:
            for probe in probes:
                probe(Trace(on=True))
        before = llm._system.gateway.stats.get("steps", 0)
        began = time.process_time_ns()
        llm.generate(prompts, params)
        for probe in probes:
            probe(Trace(on=False))
        took = time.process_time_ns() - began
        steps = llm._system.gateway.stats["steps"] - before
        n = sum(1 for m in sent for _ in unpacked(m.data)) if on else n
        sent.clear()
        if i > 1:
            spent[on].append(took / 1000 / steps)
    llm.close()
    off, on_ = (statistics.median(spent[on]) for on in (False, True))
    out = {"rows": args.rows, "step_us": [round(off, 1), round(on_, 1)], "more_us": round(on_ - off, 1)}
    out |= {"events": round(n / steps, 1), "event_us": round((on_ - off) / (n / steps), 2)}
    print(json.dumps(out | provenance()))


if __name__ == "__main__":
    main()
