"""Where the time of a decode step goes: one worker, no other processes, one step replayed; one JSON line, then a table.

    python scripts/profile_step.py --shape qwen3-0.6b --rows 256 --context 850 [--kv-cache-dtype fp8] [--quantization fp8]

Kernels are counted and timed by torch's profiler; the step itself is timed without it, by events.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict, deque

import numpy as np
import torch
from reference import provenance

from minisgl.config import Config, EngineConfig
from minisgl.model.cuda.runner import CudaRunner
from minisgl.model.shapes import random_shape
from minisgl.plan import GRANT, JOIN, StepPlan


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, nargs="+", default=[256])
    parser.add_argument("--context", type=int, default=850)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--top", type=int, default=14)
    args = parser.parse_args()
    spec = random_shape(args.shape)
    size, most = 16, max(args.rows)
    pages_each = -(-(args.context + 300) // size)
    engine = EngineConfig(
        device="cuda",
        max_running=most,
        step_tokens=8192,
        kv_tokens=most * pages_each * size,
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        attention_backend=args.attention_backend,
        memory_fraction=0.9,
    )
    start = time.perf_counter()
    runner = CudaRunner(Config(spec, engine), 0, "")
    runner.allocate(runner.max_pages())
    ready = time.perf_counter() - start
    assert runner._steps._attention is not None
    raw = runner._steps._attention.cache._cache
    for layer in range(len(raw)):
        raw[layer].copy_(torch.randn(raw[layer].shape, device="cuda", dtype=torch.bfloat16))
    order = np.random.default_rng(0).permutation(most * pages_each)
    step = 0
    for rows in args.rows:
        joins = np.array([(s, args.context, 0.6, 0, 1.0, 0.0, s) for s in range(rows)], JOIN)
        grants = np.array([(s, i, order[s * pages_each + i]) for s in range(rows) for i in range(pages_each)], GRANT)
        plan = StepPlan(step, joins=joins, grants=grants, decode=np.arange(rows, dtype=np.int32))
        launches, busy = [], []
        running = deque([runner.launch(plan)])
        for i in range(60):  # two in flight, as in the engine, so that launches are hidden
            step += 1
            running.append(runner.launch(StepPlan(step, decode=None)))
            pending = running.popleft()
            while not pending.done():
                pass
            result = pending.result()
            if i >= 10:
                launches.append(result.launch_us)
                busy.append(result.busy_us)
        while not running[-1].done():
            pass
        step += 1
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(3):
                pending = runner.launch(StepPlan(step, decode=None))
                step += 1
                while not pending.done():
                    pass
        by_name: dict[str, list[float]] = defaultdict(list)
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                by_name[event.name].append(event.device_time)
        kernels = sum(len(t) for n, t in by_name.items() if not n.startswith("Mem")) / 3
        print(
            json.dumps(
                {
                    "profile": args.shape,
                    "rows": rows,
                    "context": args.context,
                    "kv_cache_dtype": args.kv_cache_dtype,
                    "quantization": args.quantization,
                    "step_us": int(np.median(busy)),
                    "launch_us": int(np.median(launches)),
                    "kernels": round(kernels),
                    "ready_s": round(ready, 1),
                    "gpu": torch.cuda.get_device_name(),
                    **provenance(),
                }
            ),
            flush=True,
        )
        for name, times in sorted(by_name.items(), key=lambda kv: -sum(kv[1]))[: args.top]:
            print(f"  {sum(times) / 3:9.1f} us  {len(times) / 3:6.0f} x {np.median(times):8.2f} us  {name[:90]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
