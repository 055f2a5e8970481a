"""Decode speed of the whole engine against transformers' generate, in one run, float32, same prompts, same threads.

    .venv/bin/python scripts/bench/against_transformers.py [--tokens 64] [--repeats 3]

Measures, alternating: minisgl (all its processes) and transformers at 1 stream; minisgl with 16 requests at once against
transformers answering the 16 one after the other, and against transformers with the 16 padded into one static batch.  Also:
seconds from the start of the program to ready, and memory of every process.  One JSON line per measure, then a table; ratios
are of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from minisgl import LLM, SamplingParams
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.host import usable_cores
from scripts.lib.reference import greedy, load_transformers, prompts, provenance


def rss_mb(pid: int) -> tuple[int, int]:
    """(resident, of it private) memory of a process in MB."""
    rows = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    private = sum(int(rows[k].split()[0]) for k in ("Private_Clean", "Private_Dirty"))
    return int(rows["Rss"].split()[0]) // 1000, private // 1000


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    args = parser.parse_args()
    spec, threads, n = resolve(None), usable_cores(), args.tokens
    ids = sorted(prompts(spec), key=len)[:16]
    how = {**provenance(), "tokens": n, "threads": threads, "prompt_tokens": [len(p) for p in ids], "tp": args.tp}
    print(json.dumps({"bench": "transformers", **how}), flush=True)

    start = time.perf_counter()
    llm = LLM(
        spec, dtype="float32", cache="none", tp=args.tp
    )  # no prefix cache: every run computes its prompts, as the peer does
    ready = time.perf_counter() - start
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    model = load_transformers(spec, threads)

    def timed(run: Callable[[], list[list[int]]], tokens: int) -> float:
        begin = time.perf_counter()
        answers = run()
        seconds = time.perf_counter() - begin
        assert sum(map(len, answers)) == tokens
        return tokens / seconds

    def ours(batch: list[list[int]]) -> list[list[int]]:
        return [c.token_ids for c in llm.generate(batch, params)]

    one = [ids[8]]
    ways = {
        "minisgl, 1 stream": (lambda: ours(one), n),
        "transformers, 1 stream": (lambda: greedy(model, one, n, False), n),
        "minisgl, 16 streams": (lambda: ours(ids), 16 * n),
        "transformers, 16 one after the other": (lambda: [greedy(model, [p], n, False)[0] for p in ids], 16 * n),
        "transformers, 16 in one padded batch": (lambda: greedy(model, ids, n, False), 16 * n),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):  # the first round warms everything up
        for name, (run, tokens) in ways.items():
            rate = timed(run, tokens)
            if repeat:
                rates[name].append(rate)
    memory = {name: rss_mb(pid) for name, pid in llm.system.supervisor.pids.items()}
    llm.close()

    median = {name: statistics.median(r) for name, r in rates.items()}
    for name, r in rates.items():
        print(
            json.dumps({"measure": name, "unit": "tok/s", "median": round(median[name], 1), "runs": [round(x, 1) for x in r]})
        )
    print(json.dumps({"measure": "start to ready", "unit": "s", "value": round(ready, 2)}))
    print(json.dumps({"measure": "memory", "unit": "MB (resident, private)", "value": memory}))
    print("\n| measure | tok/s | ratio |\n|---|---|---|")
    pairs = [("minisgl, 1 stream", "transformers, 1 stream")]
    pairs += [("minisgl, 16 streams", name) for name in ways if name.startswith("transformers, 16")]
    for mine, theirs in pairs:
        print(f"| {mine} / {theirs} | {median[mine]:.1f} / {median[theirs]:.1f} | {median[mine] / median[theirs]:.2f} |")


if __name__ == "__main__":
    main()
