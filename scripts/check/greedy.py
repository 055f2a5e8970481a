"""Greedy answers of the whole engine against transformers, token for token.

    .venv/bin/python scripts/check/greedy.py [--model M] [--tokens 32] [--tp 1 2] [--lag 1 2]

For every tensor-parallel degree and lag, an engine answers 24 prompts of 5 to 1,500 tokens in float32, one at a time and 16
at once, each with a cold and then a warm prefix cache.  One JSON line per combination; exit code 1 if a single token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product

from minisgl import LLM, SamplingParams
from minisgl.llm import Completion
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.host import usable_cores
from scripts.lib.reference import greedy, load_transformers, prompts, provenance


def compare(want: list[list[int]], got: list[Completion]) -> list[str]:
    """One line for each answer that differs: which prompt, and the first position where it does."""
    lines = []
    for i, (w, g) in enumerate(zip(want, got, strict=True)):
        if g.error is not None:
            lines.append(f"prompt {i}: {g.error}")
        elif w != g.token_ids:
            at = next(
                (k for k, (a, b) in enumerate(zip(w, g.token_ids, strict=False)) if a != b), min(len(w), len(g.token_ids))
            )
            lines.append(f"prompt {i}: differs at token {at} of {len(w)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lag", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    spec = resolve(args.model)
    ids = prompts(spec)
    model = load_transformers(spec, threads=usable_cores())
    want = [greedy(model, [p], args.tokens)[0] for p in ids]
    del model
    params = SamplingParams(temperature=0, max_tokens=args.tokens)
    failed = 0
    for tp, lag in product(args.tp, args.lag):
        for way in ("one at a time", "16 at once"):
            # float32, as transformers: weights that --model has in more than 8 bits would be rounded.
            with LLM(spec, tp=tp, lag=lag, quantization="none", max_running=16) as llm:
                for cache in ("cold", "warm"):
                    alone = way == "one at a time"
                    got = [llm.generate([p], params)[0] for p in ids] if alone else llm.generate(ids, params)
                    wrong = compare(want, got)
                    failed += len(wrong)
                    line = {"check": "greedy", "tp": tp, "lag": lag, "way": way, "cache": cache, "prompts": len(ids)}
                    hits = sum(g.cached_tokens for g in got)
                    print(json.dumps({**line, "tokens": sum(map(len, want)), "cached": hits, "different": wrong}), flush=True)
    print(json.dumps({"check": "greedy", "ok": failed == 0, **provenance()}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
