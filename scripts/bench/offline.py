"""The offline benchmark of nano-vllm and mini-sglang through all processes, with random weights of published shapes.

    python scripts/bench/offline.py [--shape S ...] [--passes 2] [--latency] [--kernels] [--ablate [NAMES]] [engine flags]

256 requests, 100 to 1,024 tokens in and out each, seed 0 (142,827 tokens in, 133,966 out), temperature 0.6, EOS ignored,
prefill budget 16,384 tokens a step, no prefix cache.  One JSON line a measurement: tokens per second and their share of a
roofline (every operation at the larger of its bytes over --bandwidth and its flops over --flops, one after another, divided by
--tp); CPU time of a launch; the share of time in which the GPU waited for the host.  --latency adds batch 1 (ms per token) and
the time to the first token of a prompt of 128 tokens, --kernels the number of kernels in decode steps (see profile_step.py).
--ablate measures variants, too, one after the other (`minisgl bench --ablate` measures by turns, with intervals).  --sums, with
--tp: --latency again in another engine, whose ranks do not add up their parts, and the share of a decode step that goes into
sums.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

import numpy as np

from minisgl import LLM, SamplingParams
from minisgl.bench.ablations import Setup, variants
from minisgl.bench.provenance import provenance
from minisgl.bench.replay import engine_stats
from minisgl.config import ModelSpec, engine_config
from minisgl.errors import UserError
from minisgl.model.checkpoint.presets import random_shape
from scripts.lib import silent_worker


def requests(n: int = 256) -> tuple[list[list[int]], list[int]]:
    """(prompts, output lengths), drawn in the order in which the peers' script draws them."""
    random.seed(0)
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(n)]
    return prompts, [random.randint(100, 1024) for _ in range(n)]


class Roofline:
    """Seconds of forward passes on a machine that does nothing but the necessary bytes and flops, operation by operation."""

    def __init__(self, spec: ModelSpec, bandwidth: float, flops: float, weight_bytes: int, kv_bytes: int) -> None:
        self.spec, self.bandwidth, self.flops = spec, bandwidth, flops
        self.weight_bytes, self.kv_bytes = weight_bytes, kv_bytes

    def product(self, m: int, k: int, n: int, size: int | None = None) -> float:
        size = self.weight_bytes if size is None else size
        return max((k * n * size + 2 * m * (k + n)) / self.bandwidth, 2 * m * k * n / (self.flops * (2 if size == 1 else 1)))

    def experts(self, tokens: int) -> float:
        """Both products of a mixture of experts, with the weights of as many as even, independent choices would hit."""
        s, choices = self.spec, tokens * self.spec.experts_per_token
        hit = s.num_experts * (1 - (1 - s.experts_per_token / s.num_experts) ** tokens)
        weights, inner = s.hidden_size * s.expert_size, choices * s.expert_size
        first = (2 * hit * weights * self.weight_bytes + 2 * (tokens * s.hidden_size + inner)) / self.bandwidth
        second = (hit * weights * self.weight_bytes + 2 * (inner + choices * s.hidden_size)) / self.bandwidth
        return max(first, 4 * choices * weights / self.flops) + max(second, 2 * choices * weights / self.flops)

    def step(self, spans: list[tuple[int, int]], sampled: int) -> float:
        """`spans`: (new tokens, context after them) of every row."""
        s, tokens = self.spec, sum(n for n, _ in spans)
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        layer = self.product(tokens, s.hidden_size, q + 2 * kv) + self.product(tokens, q, s.hidden_size)
        if s.num_experts:
            layer += self.experts(tokens)
        else:
            layer += self.product(tokens, s.hidden_size, 2 * s.intermediate_size)
            layer += self.product(tokens, s.intermediate_size, s.hidden_size)
        moved = 2 * kv * s.num_layers * self.kv_bytes * (sum(c for _, c in spans) + tokens)
        pairs = sum(n * (c - n) + n * (n + 1) // 2 for n, c in spans)
        attention = max(moved / self.bandwidth, 4 * pairs * q * s.num_layers / self.flops)
        head = (
            self.product(sampled, s.hidden_size, s.vocab_size, self.weight_bytes) + 4 * sampled * s.vocab_size / self.bandwidth
        )
        return layer * s.num_layers + attention + (head if sampled else 0)

    def offline(self, ins: list[int], outs: list[int], budget: int) -> float:
        """Prefill in order, `budget` tokens a step, then all decodes in lock step."""
        seconds, at, done = 0.0, 0, 0
        while at < len(ins):
            left, spans, finished = budget, [], 0
            while at < len(ins) and left:
                n = min(left, ins[at] - done)
                spans.append((n, done + n))
                left, done = left - n, done + n
                if done == ins[at]:
                    at, done, finished = at + 1, 0, finished + 1
            seconds += self.step(spans, finished)
        for step in range(1, max(outs)):
            rows = [(1, i + step) for i, o in zip(ins, outs, strict=True) if o > step]
            seconds += self.step(rows, len(rows))
        return seconds


def offline(llm: LLM, spec: ModelSpec, passes: int, limit: float, **about: Any) -> None:
    prompts, outs = requests()
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in outs]
    for number in range(1, passes + 1):
        before = engine_stats(llm)
        start = time.perf_counter()
        answers = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        after = engine_stats(llm)
        delta = {k: after[k] - before.get(k, 0) for k in ("steps", "busy_us", "idle_us", "launch_us")}
        tokens = sum(len(a.token_ids) for a in answers)
        print(
            json.dumps(
                {
                    "bench": "offline",
                    "model": spec.name,
                    **about,
                    "pass": number,
                    "tok_s": round(tokens / seconds),
                    "seconds": round(seconds, 2),
                    "limit_s": round(limit, 2),
                    "share_of_limit": round(limit / seconds, 3),
                    "in": sum(map(len, prompts)),
                    "out": tokens,
                    "errors": sum(a.error is not None for a in answers),
                    "steps": delta["steps"],
                    "launch_ms_per_step": round(delta["launch_us"] / max(1, delta["steps"]) / 1000, 3),
                    "gpu_busy_s": round(delta["busy_us"] / 1e6, 2),
                    "gpu_idle_share": round(delta["idle_us"] / max(1, delta["idle_us"] + delta["busy_us"]), 4),
                }
            ),
            flush=True,
        )


def latency(llm: LLM, spec: ModelSpec, **about: Any) -> dict[str, float]:
    """Batch 1 and the first token, medians of several runs; GPU idle time in lock-step decoding of 256 rows.

    Returns GPU milliseconds of a step by the number of rows.
    """
    rng = random.Random(1)

    def prompt(n: int) -> list[int]:
        return [rng.randint(0, 10_000) for _ in range(n)]

    def seconds(prompts: list[list[int]], n: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, ignore_eos=True, max_tokens=n))
        return time.perf_counter() - start

    seconds([prompt(128)], 256)
    before = engine_stats(llm)
    one = [seconds([prompt(128)], 256) - seconds([prompt(128)], 1) for _ in range(5)]
    after = engine_stats(llm)
    alone = {k: after[k] - before[k] for k in ("idle_us", "busy_us", "launch_us", "steps")}
    for _ in range(5):
        seconds([prompt(128)], 1)
    first = [seconds([prompt(128)], 1) for _ in range(30)]
    many = [prompt(200) for _ in range(256)]
    seconds(many, 200)
    before = engine_stats(llm)
    seconds(many, 400)
    after = engine_stats(llm)
    idle, busy = (after[k] - before[k] for k in ("idle_us", "busy_us"))
    steps = {"1": alone["busy_us"] / alone["steps"] / 1e3, "256": busy / (after["steps"] - before["steps"]) / 1e3}
    print(
        json.dumps(
            {
                "bench": "latency",
                "model": spec.name,
                **about,
                "ms_per_token": round(float(np.median(one)) / 255 * 1e3, 3),
                "gpu_ms_per_step": round(steps["1"], 3),
                "gpu_ms_per_step_256": round(steps["256"], 3),
                "gpu_idle_ms_per_step": round(alone["idle_us"] / alone["steps"] / 1e3, 3),
                "launch_ms_per_step": round(alone["launch_us"] / alone["steps"] / 1e3, 3),
                "ttft_ms": round(float(np.median(first)) * 1e3, 2),
                "ttft_p90_ms": round(float(np.quantile(first, 0.9)) * 1e3, 2),
                "gpu_idle_share_256": round(idle / (idle + busy), 4),
            }
        ),
        flush=True,
    )
    return steps


ABLATIONS = (
    "overlap,lag=3,graphs,page_size=1,page_size=64,attention_backend=flashinfer,attention_backend=triton,kv_cache_dtype=fp8"
)


def measure(spec: ModelSpec, args: argparse.Namespace, setup: Setup, with_latency: bool, **about: Any) -> None:
    """A line for each pass, and more with `with_latency`; `about` goes into each."""
    engine, scheduler = setup.settings, setup.make_scheduler
    prompts, outs = requests()
    roof = Roofline(
        spec,
        args.bandwidth * args.tp,
        args.flops * args.tp,
        1 if engine["quantization"] == "fp8" else 2,
        1 if engine["kv_cache_dtype"] == "fp8" else 2,
    )
    limit = roof.offline(list(map(len, prompts)), outs, 16_384)
    start = time.perf_counter()
    with LLM(spec, make_scheduler=scheduler, **engine) as llm:
        time.sleep(args.settle)
        about |= {"tp": args.tp, "settings": setup.changed, "ready_s": round(time.perf_counter() - start, 1)}
        offline(llm, spec, args.passes, limit, **about)
        whole = latency(llm, spec, **about) if with_latency else {}
    if with_latency and args.sums:
        with LLM(spec, make_worker=silent_worker.make_worker, make_scheduler=scheduler, **engine) as llm:
            without = latency(llm, spec, **about, sums="left out")
        shares = {f"share_{rows}": round(1 - without[rows] / whole[rows], 3) for rows in whole}
        count = 2 * spec.num_layers + 1
        each = {f"us_each_{rows}": round((whole[rows] - without[rows]) / count * 1e3, 1) for rows in whole}
        print(json.dumps({"bench": "sums", "model": spec.name, "tp": args.tp, "count": count, **shares, **each}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["qwen3-0.6b"])
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument(
        "--ablate", nargs="?", const=ABLATIONS, metavar="NAMES", help=f"as in `minisgl bench`; alone: {ABLATIONS}"
    )
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--weight-format", default="auto", help="awq, gptq, q4_k or q8_0: packed weights")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks, each with its GPU")
    parser.add_argument("--sums", action="store_true", help="the share of sums in decode steps; implies --latency")
    parser.add_argument("--lag", type=int, default=2)
    parser.add_argument("--settle", type=float, default=5.0, help="seconds before the first pass, for graphs to be captured")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes/s of the roofline (an H200's measured copy)")
    parser.add_argument("--flops", type=float, default=790e12, help="bf16 flop/s of the roofline; float8 counts twice")
    args = parser.parse_args()
    if args.tp > 1 and args.kernels:
        parser.error("--kernels looks into one worker: use it without --tp")
    if args.tp == 1 and args.sums:
        parser.error("--sums needs --tp 2 or more: one rank has nothing to add up")
    print(json.dumps({"provenance": provenance()}), flush=True)
    base = {k: getattr(args, k) for k in ("quantization", "weight_format", "kv_cache_dtype", "attention_backend", "lag")}
    for name in args.shape:
        spec = random_shape(name)
        of_peers = {"device": "cuda", "tp": args.tp, "max_running": 256, "step_tokens": 16_384, "cache": "none"}
        try:
            setup = Setup(engine_config(of_peers | base), longest=2048)
            others = variants(args.ablate, setup)[0] if args.ablate else []
        except UserError as e:
            parser.error(str(e))
        measure(spec, args, setup, args.latency or args.sums)
        if args.kernels:
            from scripts.bench.ablate_step import Bench
            from scripts.bench.profile_step import report

            points = [(256, 600), (1, 300)]
            bench = Bench(name, points, 0, **{k: v for k, v in base.items() if k != "lag"})
            for rows, context in points:
                report(bench, bench.decode(rows, context), 0, model=name, decode_rows=rows, context=context)
        for variant in others:
            measure(spec, args, variant.setup, False, ablation=variant.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
