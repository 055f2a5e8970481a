"""Time to the first token of an idle engine, by the length of the prompt; through all processes; one JSON line each.

    python scripts/bench/ttft.py [--shape qwen3-0.6b] [--tokens 128 512 1024 2048 4096] [engine flags]

Random weights and random prompts, no prefix cache; median and 90 % of --repeats requests, one after the other.  `warmups`:
graphs captured and kernels compiled while one of these requests waited.  Only the public interface is used, so that older
commits can be measured, too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time

from minisgl import LLM, SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--settle", type=float, default=15.0, help="seconds before the first request, for graphs to be captured"
    )
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--graphs", default="on")
    parser.add_argument("--label", default="", help="copied into the lines")
    args = parser.parse_args()
    engine = {k: getattr(args, k) for k in ("quantization", "attention_backend", "graphs")}
    rng, one = random.Random(0), SamplingParams(temperature=0, ignore_eos=True, max_tokens=1)
    start = time.perf_counter()
    with LLM(f"random:{args.shape}", device="cuda", cache="none", step_tokens=16_384, **engine) as llm:
        ready = time.perf_counter() - start
        time.sleep(args.settle)
        for tokens in args.tokens:
            times, before = [], llm.system.gateway.stats.get("warmups")
            for _ in range(args.repeats):
                prompt = [rng.randint(0, 10_000) for _ in range(tokens)]
                start = time.perf_counter()
                (answer,) = llm.generate([prompt], one)
                times.append((time.perf_counter() - start) * 1e3)
                assert answer.error is None, answer.error
            llm.system.pump(1.1)  # the counters come once a second
            after = llm.system.gateway.stats.get("warmups")
            line = {
                "bench": "ttft",
                "label": args.label,
                "shape": args.shape,
                **engine,
                "ready_s": round(ready, 1),
                "tokens": tokens,
            }
            line |= {"ms": round(statistics.median(times), 2), "p90_ms": round(sorted(times)[int(0.9 * len(times))], 2)}
            line |= {"first_ms": round(times[0], 1), "warmups": None if after is None else after - (before or 0)}
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
