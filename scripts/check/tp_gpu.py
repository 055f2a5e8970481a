"""Tensor parallelism on GPUs: collectives, models and the loss of a rank.

    python scripts/check/tp_gpu.py [--backend nccl|shared-gpu] [--ranks 2 3] [--deadline 100] [--only collectives models loss]

Each check is one line: ok or FAILED, its name, and numbers as JSON.  Exit code 1 if one fails or does not finish in time.
  eager     50 sums (or gathers) in a row without waiting, ranks delayed in turn, so that a buffer reused too early shows
  graph     the same from one CUDA graph with three collectives, replayed 50 times with changing inputs
Each compares with a sum in float32 (a gather: exactly), and the ranks' results with each other, bit by bit; a norm is the sum,
the residual with it, and the norm of that, in one kernel.  `path` tells how sums of that shape went.  With a GPU for each rank
(the default where there are two) also
  bench     microseconds in a graph of a sum, residual and norm, by size: NCCL, one-shot and one kernel for all
  models    logits and greedy text of tiny models, on all ranks against one (see tp_models.py)
  loss      a rank is killed under load: requests fail with a clear error, nothing is left, a new engine answers as the first
Otherwise all ranks share GPU 0, and collectives alone are checked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from minisgl.lifeline import die_with_parent
from minisgl.model.common.activations import Product, plain
from minisgl.model.common.parallel import Parallel
from minisgl.model.cuda.layers import Norm
from minisgl.model.cuda.parallel import CudaParallel, Kind, SymmetricMemory, make_parallel
from minisgl.model.kernels import rank_sums
from scripts.check import tp_models

REPEATS = 50
BENCH_BYTES = 1 << 20  # sums up to here are timed both ways
SUMS = [  # rows, width, dtype
    (1, 64, torch.float32),
    (1, 4096, torch.bfloat16),
    (7, 576, torch.bfloat16),
    (3, 5, torch.bfloat16),  # 30 bytes: not whole vectors
    (8, 2048, torch.float16),  # not a dtype of the one-shot kernel
    (32, 4096, torch.bfloat16),  # 256 KiB: the largest that is one-shot
    (33, 4096, torch.bfloat16),
    (1, 5120, torch.bfloat16),  # decode steps of a model of 14 or 32 billion parameters
    (256, 5120, torch.bfloat16),
    (520, 4096, torch.float32),  # more than the 8 MiB of a shared GPU's buffer
]
NORMS = [(1, 5120), (7, 576), (25, 4096), (256, 5120), (300, 5120), (4000, 5120)]  # rows, width; the last in two launches
GATHERS = [(1, 1001, torch.float32), (5, 16_032, torch.bfloat16), (33, 49_152, torch.bfloat16)]  # rows, columns in all, dtype
DTYPE, EPS = torch.bfloat16, 1e-6  # of the norms
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
failed: list[str] = []


def report(check: str, ok: bool, **numbers: object) -> None:
    print(f"{'ok    ' if ok else 'FAILED'} {check} {json.dumps(numbers)}", flush=True)
    if not ok:
        failed.append(check)


# ---------------------------------------------------------------- in the ranks
def values(rank: int, step: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """What `rank` contributes in `step`: every rank can tell, so every rank can compute the reference."""
    generator = torch.Generator("cuda").manual_seed(1000 * step + rank)
    return torch.randn(rows, width, generator=generator, device="cuda").to(dtype)


class Rank:
    """The checks of one rank, on its current device.  Calls `tell(check, ok, numbers, digest of all results)`."""

    def __init__(self, parallel: Parallel, tell: Callable[..., None]) -> None:
        self.parallel, self.tell = parallel, tell
        self.rank, self.size = parallel.rank, parallel.size

    def compare(
        self, check: str, got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float, **numbers: object
    ) -> None:
        errors = [float((g.float() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
        digest = hashlib.sha256(b"".join(g.contiguous().view(torch.uint8).cpu().numpy().tobytes() for g in got)).hexdigest()
        self.tell(check, all(e <= tolerance for e in errors), {**numbers, "error": float(f"{max(errors):.2g}")}, digest)

    def run(
        self, check: str, inputs: list[torch.Tensor], want: list[torch.Tensor], tolerance: float, **numbers: object
    ) -> None:
        """The collective on every input, eagerly and from a graph.  `check` begins with its name."""
        got = []
        for step, x in enumerate(inputs):
            if step % self.size == self.rank:
                torch.cuda._sleep(200_000)  # about 0.1 ms: this rank is late
            got.append(self.collective(check, x.clone()))
        self.compare(f"eager {check}", got, want, tolerance, **numbers)

        fixed = [torch.empty_like(inputs[0]) for _ in range(3)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # as minisgl.model.cuda.graphs
            out = [self.collective(check, x.clone()) for x in fixed]
        got = []
        for step in range(len(inputs)):
            for i, x in enumerate(fixed):
                x.copy_(inputs[(step + i) % len(inputs)])
            if step % self.size == self.rank:
                torch.cuda._sleep(200_000)
            graph.replay()
            got += [x.clone() for x in out]
        expected = [want[(step + i) % len(want)] for step in range(len(want)) for i in range(3)]
        self.compare(f"graph {check}", got, expected, tolerance, **numbers)
        torch.cuda.synchronize()
        del graph  # before the group goes

    def collective(self, check: str, x: torch.Tensor) -> torch.Tensor:
        if check.startswith("norm"):
            kept = self.residual.clone()
            return torch.cat((kept, norm(kept, self.parallel.sum_over_ranks(x), self.weight)))
        return self.parallel.all_gather_cols(x, self.widths) if check.startswith("gather") else self.parallel.all_reduce_(x)

    def sums(self, rows: int, width: int, dtype: torch.dtype) -> None:
        steps = REPEATS if rows * width < 1 << 20 else 10
        inputs = [values(self.rank, step, rows, width, dtype) for step in range(steps)]
        want = [
            torch.stack([values(r, step, rows, width, dtype).float() for r in range(self.size)]).sum(0) for step in range(steps)
        ]
        name = str(dtype).removeprefix("torch.")
        assert isinstance(self.parallel, CudaParallel)
        within, one_shot = self.parallel.norm_sums, self.parallel.is_one_shot(inputs[0])
        ours = within is not None and within.takes(inputs[0])
        path = "ours" if ours else "one shot" if one_shot else "library"
        self.run(f"sum {rows}x{width} {name}", inputs, want, TOLERANCE[dtype], path=path)

    def norms(self, rows: int, width: int) -> None:
        steps = REPEATS if rows * width < 1 << 20 else 10
        inputs = [values(self.rank, step, rows, width, DTYPE) for step in range(steps)]
        self.residual, self.weight = values(0, -1, rows, width, DTYPE), values(0, -2, 1, width, DTYPE)[0]
        want = []
        for step in range(steps):
            total = torch.stack([values(r, step, rows, width, DTYPE).float() for r in range(self.size)]).sum(0)
            kept = self.residual.float() + total
            want.append(torch.cat((kept, F.rms_norm(kept, (width,), self.weight.float(), EPS))))
        self.run(f"norm {rows}x{width}", inputs, want, TOLERANCE[DTYPE])

    def gathers(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Uneven: the first ranks have one column more, and rank 0 another 16."""
        base = (width - 16) // self.size
        self.widths = [base + 16 * (r == 0) + (r < (width - 16) % self.size) for r in range(self.size)]
        steps = 10
        inputs = [values(self.rank, step, rows, self.widths[self.rank], dtype) for step in range(steps)]
        want = [
            torch.cat([values(r, step, rows, w, dtype) for r, w in enumerate(self.widths)], dim=1).float()
            for step in range(steps)
        ]
        self.run(f"gather {rows}x{width} {str(dtype).removeprefix('torch.')}", inputs, want, 0, widths=self.widths)

    def bench(self, parallel: CudaParallel, run_dir: str) -> None:
        small = parallel.is_one_shot(torch.empty(1, 4096, dtype=torch.bfloat16))
        self.tell("small sums go through symmetric memory", small, {}, "")
        world = torch.distributed.group.WORLD
        assert world is not None
        memory = SymmetricMemory(world, torch.device("cuda", torch.cuda.current_device()), BENCH_BYTES, run_dir)
        one_shot = CudaParallel(self.rank, self.size, world, memory if small else None, one_shot_bytes=BENCH_BYTES)
        nccl = CudaParallel(self.rank, self.size, world, None)
        for rows in (1, 4, 8, 16, 25, 51, 102, 256, 1024, 8192):  # of 5120 columns: decode and prefill
            x = torch.zeros(rows, 5120, dtype=DTYPE, device="cuda")
            ways = {"nccl": nccl} | ({"one_shot": one_shot} if one_shot.is_one_shot(x) else {})
            micros = {f"{name}, norm": self.micros(way, x) for name, way in ways.items()}
            for warps in (16, 8):
                with mock.patch.object(rank_sums, "warps_for", return_value=warps):
                    micros[f"one kernel, {warps} warps"] = self.micros(parallel, x)
            self.tell(f"bench {rows} rows, {x.nbytes >> 10} KiB", True, {"us": micros}, "")

    def micros(self, parallel: CudaParallel, x: torch.Tensor) -> float:
        """Of one sum, with residual and norm, in a graph of 20."""
        residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
        norm(residual, parallel.sum_over_ranks(x), weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(20):
                norm(residual, parallel.sum_over_ranks(x), weight)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return round(float(start.elapsed_time(end)) * 1e3 / 200, 2)


def norm(x: torch.Tensor, delta: Product, weight: torch.Tensor) -> torch.Tensor:
    """As a layer does it."""
    return plain(Norm(weight, EPS, quantize=False)(x, delta))


def rank_main(rank: int, kind: Kind, size: int, run_dir: str, results: Any) -> None:
    die_with_parent(os.getppid())

    def tell(check: str, ok: bool, numbers: dict[str, object], digest: str) -> None:
        results.put((rank, check, ok, numbers, digest))

    try:
        device = torch.device("cuda", 0 if kind == "shared-gpu" else rank)
        torch.cuda.set_device(device)
        parallel = make_parallel(kind, rank, size, run_dir, device, dtype=DTYPE)
        checks = Rank(parallel, tell)
        with torch.inference_mode():
            for case in SUMS:
                checks.sums(*case)
            for rows, width in NORMS:
                checks.norms(rows, width)
            for case in GATHERS:
                checks.gathers(*case)
            if isinstance(parallel, CudaParallel) and kind == "nccl":
                checks.bench(parallel, run_dir)
        torch.cuda.synchronize()
        parallel.close()
        closed = True
    except Exception:
        traceback.print_exc()
        closed = False
    tell("close", closed, {}, "")
    results.close()
    results.join_thread()
    os._exit(not closed)  # as workers do; a process whose peers are stuck in a kernel cannot clean up


# ---------------------------------------------------------------- in the parent
def check(kind: Kind, size: int, seconds: float) -> None:
    """One group of ranks.  Whatever they do, it is over after `seconds`."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="minisgl-") as run_dir:
        args = (kind, size, run_dir, results)
        ranks = [context.Process(target=rank_main, args=(r, *args), daemon=True) for r in range(size)]
        heard: dict[str, dict[int, tuple[bool, dict[str, object], str]]] = {}
        try:
            for p in ranks:
                p.start()
            while len(heard.get("close", ())) < size:
                try:
                    rank, name, ok, numbers, digest = results.get(timeout=1)
                except queue.Empty:
                    if time.monotonic() > deadline or any(p.exitcode for p in ranks):
                        break
                    continue
                answers = heard.setdefault(name, {})
                answers[rank] = (ok, numbers, digest)
                if len(answers) == size and name != "close":
                    digests = {d for _, _, d in answers.values()}
                    right = all(ok for ok, _, _ in answers.values())
                    same = len(digests) == 1
                    report(name, right and same, backend=kind, ranks=size, same_bits=same, **answers[0][1])
                if name == "close" and not ok:
                    break  # the others wait for this one in vain
            for p in ranks:
                p.join(max(0.0, min(10.0, deadline - time.monotonic())))
        finally:
            for p in ranks:
                p.kill()
                p.join(10)
        closed = [r for r, (ok, _, _) in heard.get("close", {}).items() if ok]
        unfinished = [name for name, answers in heard.items() if len(answers) < size]
        exits = [p.exitcode for p in ranks]
        ok = len(closed) == size and exits == [0] * size
        report("all ranks finish", ok, backend=kind, ranks=size, exit_codes=exits, unfinished=unfinished)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=["shared-gpu", "nccl"], help="default: nccl where there are two GPUs")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 2 and 3 on a shared GPU, else one per GPU")
    parser.add_argument("--deadline", type=float, default=100, help="seconds for each part and number of ranks")
    parser.add_argument(
        "--only", nargs="+", choices=["collectives", "models", "loss"], default=["collectives", "models", "loss"]
    )
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    kind: Kind = args.backend or ("nccl" if gpus > 1 else "shared-gpu")
    sizes = args.ranks or ([2, 3] if kind == "shared-gpu" else [gpus])
    needed = max(sizes) if kind == "nccl" else 1
    if gpus < needed:
        print(f"check_tp_gpu: --backend {kind} needs {needed} GPUs and {gpus} are visible", file=sys.stderr)
        return 2
    began = time.monotonic()
    for size in sizes:
        if "collectives" in args.only:
            check(kind, size, args.deadline)
        if kind == "nccl":
            if "models" in args.only:
                tp_models.check_models(size, args.deadline, report)
            if "loss" in args.only:
                tp_models.check_loss(size, args.deadline, report)
    print(f"{len(failed)} failed in {time.monotonic() - began:.0f} s {json.dumps(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
