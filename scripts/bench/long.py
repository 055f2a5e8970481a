"""One very long prompt through all processes, with random weights of a published shape; one JSON line.

    python scripts/bench/long.py [--shape qwen3-14b] [--tokens 131072] [--step-tokens 8192] [--kv-cache-dtype fp8]

Time to the first token cold and with the prefix cached, ms per token of decoding behind it, and the roofline of the cold
prefill (see offline.py).  The shape's context is stretched to the prompt: random weights do not mind the positions.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace

from minisgl import LLM, SamplingParams
from minisgl.bench.provenance import provenance
from minisgl.bench.replay import engine_stats
from minisgl.model.checkpoint.presets import random_shape
from scripts.bench.offline import Roofline

ANSWER = 65


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-14b")
    parser.add_argument("--tokens", type=int, default=131_072, help="prompt and answer together")
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--bandwidth", type=float, default=4.3e12)
    parser.add_argument("--flops", type=float, default=790e12)
    args = parser.parse_args()
    spec = replace(random_shape(args.shape), max_context=args.tokens)
    length = args.tokens - ANSWER
    rng = random.Random(0)
    prompt = [rng.randint(0, 10_000) for _ in range(length)]
    with LLM(spec, device="cuda", step_tokens=args.step_tokens, max_running=64, kv_cache_dtype=args.kv_cache_dtype) as llm:

        def seconds(ids: list[int], n: int) -> float:
            start = time.perf_counter()
            (answer,) = llm.generate([ids], SamplingParams(temperature=0, ignore_eos=True, max_tokens=n))
            assert answer.error is None, answer.error
            assert len(answer.token_ids) == n
            return time.perf_counter() - start

        seconds(prompt[:2000], ANSWER)  # compiles
        first = seconds(prompt, 1)
        seconds(prompt, ANSWER)  # compiles and captures what only so long a context needs
        again = seconds(prompt, 1)
        decode = (seconds(prompt, ANSWER) - again) / (ANSWER - 1)
        stats = engine_stats(llm)
    roof = Roofline(spec, args.bandwidth, args.flops, 2, 1 if args.kv_cache_dtype == "fp8" else 2)
    limit, at = 0.0, 0
    while at < length:
        n = min(args.step_tokens, length - at)
        at += n
        limit += roof.step([(n, at)], int(at == length))
    line = {"bench": "long", "model": spec.name, "prompt": length, "step_tokens": args.step_tokens, **provenance()}
    line |= {"first_token_s": round(first, 2), "limit_s": round(limit, 2), "share_of_limit": round(limit / first, 3)}
    line |= {"cached_first_token_ms": round(again * 1e3, 1), "decode_ms": round(decode * 1e3, 2)}
    print(json.dumps({**line, "kv_tokens": stats.get("total_pages", 0) * 16}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
