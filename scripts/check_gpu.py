"""The GPU worker against the CPU worker on the same tiny random checkpoint, and its speed on random weights of real shapes.

    python scripts/check_gpu.py [--bench] [--shape llama-3.1-8b]

Checks, each one JSON line with ok true or false; exit code 1 if one fails:
  logits    prefill in chunks over a cached prefix and decode steps: bfloat16 on the GPU against float32 on the CPU, as a
            ratio of norms
  graph     a decode step replayed from a CUDA graph against the same step run eagerly: the same tokens
  sampling  the distribution of drawn tokens against softmax, and the same token whatever the batch mates
With --bench: tokens per second of the offline benchmark (256 requests, 100 to 1024 tokens in and out, seed 0) through all
processes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from reference import provenance
from transformers import LlamaConfig, LlamaForCausalLM

from minisgl.config import Config, EngineConfig, ModelSpec
from minisgl.model.resolve import resolve
from minisgl.plan import GRANT, JOIN, PREFILL, StepPlan

SHAPES = {  # hidden, inner, layers, heads, kv heads, head size, vocabulary
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128_256),
    "llama-3.1-8b": (4096, 14_336, 32, 32, 8, 128, 128_256),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151_936),
}
failed: list[str] = []


def report(check: str, ok: bool, **numbers: object) -> None:
    print(json.dumps({"check": check, "ok": bool(ok), **numbers}), flush=True)
    if not ok:
        failed.append(check)


def tiny(directory: str, heads: int, kv_heads: int, dim: int) -> ModelSpec:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return resolve(directory)


class Harness:
    """One runner, its logits recorded, driven by plans for slots 0..n with scattered pages."""

    def __init__(self, runner: object, pages: int, page_size: int) -> None:
        self.runner, self.size = runner, page_size
        self.logits: list[torch.Tensor] = []
        self.step = 0
        self.free = list(np.random.default_rng(5).permutation(pages))
        self.tables: dict[int, list[int]] = {}
        self.lens: dict[int, int] = {}
        inner = runner._model

        def spy(ids: torch.Tensor, positions: torch.Tensor, rows: object, attend: object) -> torch.Tensor:
            out = inner(ids, positions, rows, attend)
            if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
                self.logits.append(out.float().cpu())
            return out

        runner._model = spy

    def run(
        self, prefill: list[tuple[int, list[int], bool]], decode: list[int], join: bool = False, **params: float
    ) -> list[int]:
        joins, grants = [], []
        for slot, _, _ in prefill:
            if join:
                self.tables[slot], self.lens[slot] = [], 0
                p = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": slot} | params
                joins.append((slot, 0, p["temperature"], p["top_k"], p["top_p"], p["min_p"], p["seed"]))
        for slot, n in [(s, len(ids)) for s, ids, _ in prefill] + [(s, 1) for s in decode]:
            self.lens[slot] += n
            while len(self.tables[slot]) * self.size < self.lens[slot]:
                page = int(self.free.pop())
                grants.append((slot, len(self.tables[slot]), page))
                self.tables[slot].append(page)
        plan = StepPlan(
            self.step,
            joins=np.array(joins, JOIN),
            grants=np.array(grants, GRANT),
            prefill=np.array([(s, int(last), len(ids)) for s, ids, last in prefill], PREFILL),
            decode=np.array(decode, np.int32),
            ids=np.array([t for _, ids, _ in prefill for t in ids], np.int32),
        )
        self.step += 1
        pending = self.runner.launch(plan)
        while not pending.done():
            pass
        return [int(t) for t in pending.result().tokens]


def both(spec: ModelSpec, **engine: object) -> tuple[Harness, Harness]:
    from minisgl.model.cuda_runner import CudaRunner
    from minisgl.model.runner import Runner

    settings = {"max_running": 40, "step_tokens": 512, "kv_tokens": 32_768, "page_size": 16} | engine
    harnesses = []
    for device, make in (("cpu", Runner), ("cuda", CudaRunner)):
        runner = make(Config(spec, EngineConfig(device=device, **settings)), 0, "")
        runner.allocate(runner.max_pages())
        harnesses.append(Harness(runner, runner.max_pages(), settings["page_size"]))
    return harnesses[0], harnesses[1]


def check_logits(name: str, spec: ModelSpec, **engine: object) -> None:
    """The GPU is fed the tokens that the CPU chose, so that one near tie does not end the comparison."""
    cpu, gpu = both(spec, **engine)
    rng = random.Random(1)
    prompts = {s: [rng.randrange(512) for _ in range(rng.choice([1, 15, 16, 17, 100, 333]))] for s in range(12)}
    for harness in (cpu, gpu):
        harness.run([(s, p[: len(p) // 2] or p, len(p) == 1) for s, p in prompts.items()], [], join=True)
        harness.run([(s, p[len(p) // 2 :], True) for s, p in prompts.items() if len(p) > 1], [])
        del harness.logits[:-1]
    agree = total = 0
    for _ in range(20):
        tokens = cpu.run([], list(prompts))
        gpu.runner._last_token[: len(prompts)] = gpu.runner._last_token[: len(prompts)]
        theirs = gpu.run([], list(prompts))
        agree += sum(a == b for a, b in zip(tokens, theirs, strict=True))
        total += len(tokens)
        for i, slot in enumerate(prompts):
            gpu.runner._last_token[slot] = tokens[i]
    a, b = cpu.logits[0], gpu.logits[0]
    error = float((a - b).norm() / a.norm())
    report(f"logits {name}", error < 2e-2, prefill_error=round(error, 5), decode_agreement=round(agree / total, 3), **engine)


def check_graph(spec: ModelSpec) -> None:
    from minisgl.model.cuda_runner import CudaRunner

    tokens = {}
    for mode in ("graph", "eager"):
        runner = CudaRunner(Config(spec, EngineConfig(device="cuda", max_running=40, step_tokens=512, kv_tokens=32_768)), 0, "")
        runner.allocate(runner.max_pages())
        if mode == "eager":
            runner._replay = runner._eager
        harness = Harness(runner, runner.max_pages(), 16)
        rng = random.Random(2)
        prompts = [(s, [rng.randrange(512) for _ in range(rng.randrange(1, 90))], True) for s in range(23)]
        out = [harness.run(prompts, [], join=True)]
        for n in (23, 23, 5, 1, 17, 23):  # several graphs, and back
            out.append(harness.run([], list(range(n))))
        out.append(harness.run([(30, [7, 8, 9], True)], list(range(20)), join=True))  # mixed
        out.append(harness.run([], [*range(20), 30]))
        tokens[mode] = out
    same = sum(a == b for x, y in zip(tokens["graph"], tokens["eager"], strict=True) for a, b in zip(x, y, strict=True))
    count = sum(map(len, tokens["eager"]))
    report("graph equals eager", same == count, same=same, of=count)


def check_sampling() -> None:
    from minisgl.model.cuda_sampler import filtered_sample, gumbel_sample

    torch.manual_seed(3)
    device = torch.device("cuda")
    logits = torch.randn(50, device=device) * 2
    n = 200_000
    many = logits.expand(n, 50).contiguous()
    seeds, positions = torch.arange(n, device=device), torch.full((n,), 7, device=device)
    for t in (0.5, 1.0):
        temperature = torch.full((n,), t, device=device)
        counts = torch.bincount(gumbel_sample(many, temperature, seeds, positions).long(), minlength=50).float() / n
        distance = float((counts - torch.softmax(logits / t, 0)).abs().sum() / 2)
        report("gumbel distribution", distance < 0.01, temperature=t, total_variation=round(distance, 5))
    ones = torch.ones(n, device=device)
    off = {"top_k": torch.zeros(n, dtype=torch.int32, device=device), "top_p": ones, "min_p": 0 * ones}
    kept = {"top_k 5": {"top_k": off["top_k"] + 5}, "top_p 0.8": {"top_p": 0.8 * ones}, "min_p 0.2": {"min_p": 0.2 * ones}}
    probs = torch.softmax(logits, 0)
    order = probs.sort(descending=True)
    expected = {
        "top_k 5": set(order.indices[:5].tolist()),
        "top_p 0.8": set(order.indices[: int((order.values.cumsum(0) - order.values < 0.8).sum())].tolist()),
        "min_p 0.2": set((probs >= 0.2 * probs.max()).nonzero()[:, 0].tolist()),
    }
    for name, change in kept.items():
        drawn = set(filtered_sample(many, ones, seeds, positions, **{**off, **change}).tolist())
        report(f"filter {name}", drawn == expected[name], tokens=len(drawn))
    wide = torch.randn(33, 151_936, device=device, dtype=torch.bfloat16)
    t33, s33, p33 = torch.full((33,), 0.8, device=device), torch.arange(33, device=device), torch.arange(33, device=device)
    t33[::3] = 0
    alone = [int(gumbel_sample(wide[i : i + 1], t33[i : i + 1], s33[i : i + 1], p33[i : i + 1])) for i in range(33)]
    report("batch mates do not matter", alone == gumbel_sample(wide, t33, s33, p33).tolist())
    report("greedy rows are argmax", all(alone[i] == int(wide[i].float().argmax()) for i in range(0, 33, 3)))


def check_kernels() -> None:
    """Each fused kernel against plain torch in float32."""
    import torch.nn.functional as F

    from minisgl.model.cuda_kernels import add_rms_norm, rope_and_store, silu_mul
    from minisgl.model.layers import rotate_

    torch.manual_seed(4)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got.float() - want.float()).norm() / want.float().norm())

    for tokens, width in ((1, 576), (7, 4096), (300, 5120)):
        x, delta, weight = rand(tokens, width), rand(tokens, width), rand(width)
        total = (x + delta).float()
        want = F.rms_norm(total, (width,), weight.float(), 1e-5)
        kept = x.clone()
        got = add_rms_norm(kept, delta, weight, 1e-5)
        plain = add_rms_norm(x, None, weight, 1e-5)
        ok = error(got, want) < 5e-3 and torch.equal(kept, x + delta)
        ok &= error(plain, F.rms_norm(x.float(), (width,), weight.float(), 1e-5)) < 5e-3
        report("kernel add_rms_norm", ok, shape=[tokens, width], error=round(error(got, want), 5))
        gate_up = rand(tokens, 2 * width)
        gate, up = gate_up.float().chunk(2, -1)
        bad = error(silu_mul(gate_up), F.silu(gate) * up)
        report("kernel silu_mul", bad < 5e-3, shape=[tokens, width], error=round(bad, 5))
    for heads, kv_heads, dim in ((8, 2, 64), (5, 1, 80), (40, 8, 128)):
        tokens = 33
        qkv = rand(tokens, heads + 2 * kv_heads, dim)
        angles = torch.rand(tokens, 1, dim // 2, device="cuda") * 6
        cos = torch.cat([angles.cos()] * 2, -1).bfloat16()
        sin = torch.cat([-angles.sin(), angles.sin()], -1).bfloat16()
        index = torch.randperm(200, device="cuda")[:tokens]
        cache = torch.zeros(200, 2, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
        want = qkv.float()
        rotate_(want[:, : heads + kv_heads], cos.float(), sin.float())
        q = rope_and_store(qkv, cos, sin, cache, index, num_heads=heads)
        bad = max(error(q, want[:, :heads]), error(cache[index].view(tokens, -1, dim), want[:, heads:]))
        untouched = torch.ones(200, dtype=torch.bool, device="cuda")
        untouched[index] = False
        ok = bad < 5e-3 and not bool(cache[untouched].any())
        report("kernel rope_and_store", ok, heads=[heads, kv_heads, dim], error=round(bad, 5))


def bench(shape: str) -> None:
    from minisgl import LLM, SamplingParams

    hidden, inner, layers, heads, kv_heads, dim, vocab = SHAPES[shape]
    spec = replace(
        _template(),
        name=shape,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        vocab_size=vocab,
        tie_embeddings=False,
    )
    random.seed(0)
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(100, 1024)) for _ in range(256)]
    start = time.perf_counter()
    with LLM(
        spec, device="cuda", dtype="bfloat16", max_running=256, step_tokens=16_384, memory_fraction=0.8, cache="none"
    ) as llm:
        ready = time.perf_counter() - start
        for attempt in range(2):
            start = time.perf_counter()
            answers = llm.generate(prompts, params)
            seconds = time.perf_counter() - start
            tokens = sum(len(a.token_ids) for a in answers)
            errors = [a.error for a in answers if a.error]
            print(
                json.dumps(
                    {
                        "bench": "offline",
                        "shape": shape,
                        "pass": attempt + 1,
                        "tok_s": round(tokens / seconds),
                        "seconds": round(seconds, 2),
                        "in": sum(map(len, prompts)),
                        "out": tokens,
                        "errors": len(errors),
                        "ready_s": round(ready, 1),
                    }
                ),
                flush=True,
            )
        one = SamplingParams(temperature=0, ignore_eos=True, max_tokens=256)
        llm.generate([prompts[0][:100]], one)
        start = time.perf_counter()
        llm.generate([prompts[0][:100]], one)
        print(
            json.dumps(
                {"bench": "batch 1", "shape": shape, "ms_per_token": round((time.perf_counter() - start) / 256 * 1e3, 3)}
            )
        )


def _template() -> ModelSpec:
    return ModelSpec(
        name="",
        path="",
        format="random",
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        hidden_size=0,
        intermediate_size=0,
        num_layers=0,
        num_heads=0,
        num_kv_heads=0,
        head_dim=0,
        vocab_size=0,
        max_context=4096,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling="",
        tie_embeddings=False,
        bos_id=None,
        eos_ids=(2,),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["llama-3.1-8b"])
    args = parser.parse_args()
    print(json.dumps({**provenance(), "gpu": torch.cuda.get_device_name()}), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for name, heads, kv_heads, dim in (("group 4", 8, 2, 64), ("group 1", 4, 4, 64), ("group 3", 6, 2, 128)):
            spec = tiny(f"{directory}/{name.replace(' ', '')}", heads, kv_heads, dim)
            check_logits(name, spec)
            if name == "group 4":
                check_logits(name, spec, page_size=1)
                check_graph(spec)
    check_sampling()
    check_kernels()
    if args.bench:
        for shape in args.shape:
            bench(shape)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
