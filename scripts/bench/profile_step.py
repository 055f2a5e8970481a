"""Where the time of a step goes: one worker, no other processes, one step repeated; one JSON line, then a table of its kernels.

    python scripts/bench/profile_step.py [--shape S] [--points 256x600 ...] [--prefill 16384] [--tp 2] [engine flags of minisgl]

Kernels are counted and timed by torch's profiler; the step itself is timed without it, by events.  Points are decode steps,
rows x context.  With --tp, one process for each GPU takes the same steps and the first one reports; kernels that wait for the
other ranks have that in their time, which is why medians are printed.  What removing a kernel would gain is another question:
see ablate_step.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections import defaultdict

import numpy as np
import torch

from minisgl.lifeline import die_with_parent
from scripts.bench.ablate_step import Bench
from scripts.lib.reference import provenance

REPEATS = 3


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--points", nargs="*", default=["256x600", "1x300"], metavar="ROWSxCONTEXT")
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--top", type=int, default=14)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as run_dir:
        spawn = multiprocessing.get_context("spawn")
        peers = [spawn.Process(target=profile, args=(args, rank, run_dir), daemon=True) for rank in range(1, args.tp)]
        for peer in peers:
            peer.start()
        profile(args, 0, run_dir)
        for peer in peers:
            peer.join()
    return 0


def profile(args: argparse.Namespace, rank: int, run_dir: str) -> None:
    """Take all steps on one rank."""
    if rank:
        die_with_parent(os.getppid())
    points = [(int(rows), int(context)) for rows, context in (p.split("x") for p in args.points)]
    engine = {k: getattr(args, k) for k in ("kv_cache_dtype", "quantization", "attention_backend", "tp")}
    bench = Bench(args.shape, points, args.prefill, rank=rank, run_dir=run_dir, **engine)
    about = {"shape": args.shape, **engine, "gpu": torch.cuda.get_device_name(), **provenance()}
    top = args.top if rank == 0 else None
    for rows, context in points:
        report(bench, bench.decode(rows, context), top, decode_rows=rows, context=context, **about)
    if args.prefill:
        report(bench, bench.prefill(args.prefill), top, prefill_tokens=args.prefill, **about)
    bench.runner.close()


def report(bench: Bench, us: float, top: int | None, **about: object) -> None:
    """Profile the step that has just been timed; print a line about it and its `top` kernels, or nothing if that is None."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        bench.again(REPEATS)
    if top is None:
        return
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if str(event.device_type) == "DeviceType.CUDA":
            by_name[event.name].append(event.device_time)
    kernels = sum(len(t) for n, t in by_name.items() if not n.startswith("Mem")) / REPEATS
    print(json.dumps({**about, "step_us": round(us), "kernels": round(kernels)}), flush=True)
    for name, times in sorted(by_name.items(), key=lambda kv: -sum(kv[1]))[:top]:
        print(f"  {sum(times) / REPEATS:9.1f} us  {len(times) / REPEATS:6.0f} x {np.median(times):8.2f} us  {name[:90]}")


if __name__ == "__main__":
    sys.exit(main())
