"""What each part of a step costs: the step without it.  One worker, no other processes; one JSON line a measurement.

    python scripts/bench/ablate_step.py [--shape S] [--points 256x600 1x300 ...] [--prefill 16384] [--tries products|attention]

A part is replaced by nothing (its result is a buffer that stands ready), the step is captured again and timed, two in flight;
"costs" is the difference to the whole step, so it includes the borders between kernels, which no profile of single kernels
shows.  --tries replaces settings instead of removing parts.  Points are decode steps, rows x context.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from minisgl.actors.spawn import make_runner
from minisgl.config import Config, EngineConfig
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.common.activations import PartialSums, Product, Quantized, Scaled, Summand, plain
from minisgl.model.cuda.layers import Linear
from minisgl.model.kernels import small_batch_matmul
from minisgl.model.kernels.decode_attention import decode_attention
from minisgl.model.kernels.norm_activation import silu_mul
from minisgl.model.kernels.small_batch_matmul import skinny
from minisgl.plan import GRANT, JOIN, PREFILL, StepPlan
from scripts.lib.reference import provenance
from scripts.tune.kernels import linear_settings

PAGE = 16


class Ready:
    """Stands in for a part: gives out a buffer of the right shape."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._made: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, x: Product | Quantized, *_: Any, **__: Any) -> torch.Tensor:
        x = x.part if isinstance(x, Summand) else x
        rows = x.values if isinstance(x, Quantized | Scaled) else x.parts if isinstance(x, PartialSums) else x
        shape = (rows.shape[-2], self._width)
        if shape not in self._made:
            self._made[shape] = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        return self._made[shape]


class Bench:
    def __init__(
        self, shape: str, points: list[tuple[int, int]], tokens: int, *, rank: int = 0, run_dir: str = "", **engine: Any
    ) -> None:
        """`run_dir` is a new directory if there are several ranks (`tp`), which all make the same calls."""
        self.spec = random_shape(shape)
        self.most = max([rows for rows, _ in points] + [-(-tokens // 558)])
        self.each = -(-max([c for _, c in points] + [558]) // PAGE) + 40
        settings = EngineConfig(
            device="cuda", max_running=self.most, step_tokens=max(8192, tokens), kv_tokens=self.most * self.each * PAGE,
            page_size=PAGE, memory_fraction=0.95, **engine,
        )  # fmt: skip
        self.runner = make_runner(Config(self.spec, settings), rank, run_dir)
        self.runner.allocate(self.runner.max_pages())
        assert self.runner._steps._attention is not None
        for layer in self.runner._steps._attention.cache._cache:
            layer.copy_(torch.randn(layer.shape, device="cuda", dtype=torch.bfloat16))
        self.order = np.random.default_rng(0).permutation(self.most * self.each)
        self.step = 0

    def grants(self, slots: range) -> np.ndarray:
        return np.array([(s, i, self.order[s * self.each + i]) for s in slots for i in range(self.each)], GRANT)

    def decode(self, rows: int, context: int) -> float:
        """Microseconds of a decode step, captured anew."""
        self.runner._graphs.clear()
        self.runner._graphs._pool = None
        lens = np.linspace(0.6 * context, 1.4 * context, rows).astype(int) if rows > 1 else [context]
        new_slots = np.array([(s, min(lens[s], self.each * PAGE - 200), 0.6, 0, 1.0, 0.0, s) for s in range(rows)], JOIN)
        plan = StepPlan(
            self.step, new_slots=new_slots, page_grants=self.grants(range(rows)), decode=np.arange(rows, dtype=np.int32)
        )
        return self._time(lambda i: plan if i == 0 else StepPlan(self.step, decode=None), 50)

    def prefill(self, tokens: int, chunk: int = 558) -> float:
        """Microseconds of a prefill step of chunks of `chunk` tokens."""
        lens = [chunk] * (tokens // chunk) + ([tokens % chunk] if tokens % chunk else [])

        def plan(_: int) -> StepPlan:
            return StepPlan(
                self.step,
                new_slots=np.array([(s, 0, 0.6, 0, 1.0, 0.0, s) for s in range(len(lens))], JOIN),
                page_grants=self.grants(range(len(lens))),
                prefill=np.array([(s, 1, n) for s, n in enumerate(lens)], PREFILL),
                decode=np.zeros(0, np.int32),
                ids=np.random.default_rng(1).integers(0, 9000, tokens).astype(np.int32),
            )

        return self._time(plan, 12)

    def again(self, steps: int) -> None:
        """Run the step that was timed last, one at a time."""
        for _ in range(steps):
            pending = self.runner.launch(self._plan(1))
            self.step += 1
            self._finish(pending)

    def _time(self, plan: Callable[[int], StepPlan], steps: int) -> float:
        self._plan = plan
        busy: list[int] = []
        running: deque[Any] = deque()
        for i in range(steps):
            running.append(self.runner.launch(plan(i)))
            self.step += 1
            if len(running) > 2:
                busy.append(self._finish(running.popleft()))
        while running:
            busy.append(self._finish(running.popleft()))
        return float(np.median(busy[len(busy) // 4 :]))

    @staticmethod
    def _finish(pending: Any) -> int:
        while not pending.done():
            pass
        return int(pending.result().busy_us)


def parts(bench: Bench, _: int) -> Iterator[tuple[str, list[Any]]]:
    """(name, patches that take it out)."""
    spec, model = bench.spec, bench.runner._model
    attention = bench.runner._steps._attention
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layers = model.layers
    assert attention is not None

    def same(q: torch.Tensor, *_: Any) -> torch.Tensor:
        return q

    def heads(qkv: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return Ready(q)(qkv).view(-1, spec.num_heads, spec.head_dim)

    yield (
        "attention",
        [mock.patch.object(b, n, same) for b, n in ((attention.decode, "decode"), (attention.prefill, "prefill"))],
    )
    yield "prepare_heads", [mock.patch("minisgl.model.cuda.attention.paged.prepare_heads", heads)]
    ready = Ready(spec.hidden_size)
    yield "norms", [mock.patch.object(la, n, ready) for la in layers for n in ("attn_norm", "mlp_norm")]
    yield "qkv", [mock.patch.object(la.attn, "qkv", Ready(q + 2 * kv)) for la in layers]
    yield "o", [mock.patch.object(la.attn, "o", ready) for la in layers]
    yield "gate, up, silu", [mock.patch.object(la.mlp, "gated", Ready(spec.intermediate_size)) for la in layers]
    yield "down", [mock.patch.object(la.mlp, "down", ready) for la in layers]
    yield "head", [mock.patch.object(model, "head", Ready(spec.vocab_size))]

    def advance(_: Any, slots: torch.Tensor, *args: Any, **__: Any) -> None:  # contexts grow as ever
        args[2].kv_len.index_add_(0, slots, torch.ones_like(slots))

    yield "sampling", [mock.patch("minisgl.model.cuda.step.sample", advance)]


def attention_tries(_: Bench, rows: int) -> Iterator[tuple[str, list[Any]]]:
    """(name, patches) of other settings for decode attention."""
    for splits in (1, 2, 4, 8, 16, 32):
        if not 700 <= splits * rows * 8 <= 2600:
            continue
        for block, warps, stages in itertools.product((32, 64, 128), (1, 2, 4), (3, 4)):
            if block // warps not in (16, 32, 64) or stages * block > 256 + 128:
                continue
            setting: dict[str, Any] = {"block": block, "warps": warps, "stages": stages}
            yield (
                json.dumps({"splits": splits, **setting}),
                [
                    mock.patch("minisgl.model.cuda.attention.triton.decode_attention", partial(decode_attention, **setting)),
                    mock.patch("minisgl.model.cuda.step.splits_for", partial(_constant, splits)),
                ],
            )


def _constant(value: int, *_: Any) -> int:
    return value


def product_tries(bench: Bench, rows: int) -> Iterator[tuple[str, list[Any]]]:
    """(name, patches) of other settings for the products."""

    def apart(gated: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        product = Linear(gated.weight, True)
        return lambda x: silu_mul(plain(product(x)))

    def with_settings(change: Callable[..., dict[str, Any] | None]) -> list[Any]:
        inner = small_batch_matmul.choose

        def choose(rows: int, n: int, k: int, **options: Any) -> dict[str, Any] | None:
            return change(inner(rows, n, k, **options), rows, n, k, **options)

        return [mock.patch("minisgl.model.cuda.layers.choose", choose)]

    def only(shape: tuple[int, int], gated: bool, setting: dict[str, Any] | None) -> Callable[..., dict[str, Any] | None]:
        def change(found: dict[str, Any] | None, _: int, n: int, k: int, **options: Any) -> dict[str, Any] | None:
            return setting if (n, k) == shape and options.get("gated", False) == gated else found

        return change

    mlps: list[Any] = [la.mlp for la in bench.runner._model.layers]
    yield "no silu in the product", [mock.patch.object(m, "gated", apart(m.gated)) for m in mlps]
    yield "library everywhere", with_settings(lambda *_, **__: None)
    for name, (n, k, gated) in products(bench.spec).items():
        yield f"{name}: library", with_settings(only((n, k), gated, None))
        for setting in linear_settings(rows, n, k, gated=gated):
            if "gemv" not in setting:
                yield f"{name}: {json.dumps(setting)}", with_settings(only((n, k), gated, setting))


def products(spec: Any) -> dict[str, tuple[int, int, bool]]:
    """name -> (N, K, gated)."""
    q, kv, c, inner = (
        spec.num_heads * spec.head_dim,
        spec.num_kv_heads * spec.head_dim,
        spec.hidden_size,
        spec.intermediate_size,
    )
    return {"qkv": (q + 2 * kv, c, False), "o": (c, q, False), "gate_up": (2 * inner, c, True), "down": (c, inner, False)}


def compile_share(job: tuple[str, list[int], int, int]) -> None:
    """One process's share of the kernels that `tries` will want."""
    shape, row_counts, index, jobs = job
    wanted = {
        (rows, n, k, gated, tuple(setting.items()))
        for rows in row_counts
        for n, k, gated in products(random_shape(shape)).values()
        for setting in linear_settings(rows, n, k, gated=gated)
    }
    unique = {(n, k, gated, setting): rows for rows, n, k, gated, setting in sorted(wanted)}
    for at, ((n, k, gated, setting), rows) in enumerate(sorted(unique.items())):
        if at % jobs == index and "gemv" not in dict(setting):
            x, w = (torch.zeros(size, k, device="cuda", dtype=torch.bfloat16) for size in (rows, n))
            try:
                skinny(x, w, gated=gated, **dict(setting))
            except Exception as e:  # a setting that does not fit is reported when it is timed
                print(n, k, setting, repr(e)[:100], file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--points", nargs="*", default=["256x600", "140x1010", "54x1340", "1x300"], metavar="ROWSxCONTEXT")
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--tries", choices=("products", "attention"))
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--weight-format", default="auto", help="awq, gptq, q4_k or q8_0: packed weights")
    parser.add_argument("--attention-backend", default="auto")
    args = parser.parse_args()
    points = [(int(rows), int(context)) for rows, context in (p.split("x") for p in args.points)]
    engine = {k: getattr(args, k) for k in ("kv_cache_dtype", "quantization", "weight_format", "attention_backend")}
    if args.tries == "products":
        jobs = [(args.shape, [rows for rows, _ in points], i, 16) for i in range(16)]
        with multiprocessing.get_context("spawn").Pool(16) as pool:
            pool.map(compile_share, jobs, chunksize=1)
    bench = Bench(args.shape, points, args.prefill, **engine)
    print(json.dumps({"shape": args.shape, **engine, "gpu": torch.cuda.get_device_name(), **provenance()}), flush=True)
    runs = [(f"decode {r} rows, context {c}", r, partial(bench.decode, r, c)) for r, c in points]
    if args.prefill:
        runs.append((f"prefill {args.prefill}", args.prefill, partial(bench.prefill, args.prefill)))
    variants = {None: parts, "products": product_tries, "attention": attention_tries}[args.tries]
    for name, rows, run in runs:
        run()
        no_partial_sums = run()
        print(json.dumps({"step": name, "us": no_partial_sums}), flush=True)
        for part, patches in variants(bench, rows):
            with ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                try:
                    us = run()
                except Exception as e:
                    print(json.dumps({"step": name, "without": part, "failed": repr(e)[:200]}), flush=True)
                    continue
            print(
                json.dumps(
                    {
                        "step": name,
                        "tries" if args.tries else "without": part,
                        "us": us,
                        "costs": round(no_partial_sums - us, 1),
                    }
                ),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
