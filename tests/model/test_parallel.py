"""Collectives: gloo on CPU tensors for real; the GPU classes with a gloo group and memory shared by the processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from minisgl.model.common.parallel import Parallel, join
from minisgl.model.cuda.parallel import (
    ONE_SHOT_BYTES,
    CudaParallel,
    SharedGpuParallel,
    SymmetricMemory,
    make_parallel,
    use_one_shot,
)

WIDTHS = [5, 3, 4]  # uneven, and none divides another


@pytest.fixture(scope="module", params=[2, 3])
def reports(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What every rank reports of every experiment below, by rank.  Each rank is a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    size, run_dir = request.param, str(tmp_path_factory.mktemp("ranks"))
    ranks = [context.Process(target=_rank, args=(queue, rank, size, run_dir), daemon=True) for rank in range(size)]
    try:
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(60)
        assert [p.exitcode for p in ranks] == [0] * size
        return [report for _, report in sorted((queue.get() for _ in ranks), key=lambda r: r[0])]
    finally:
        for p in ranks:
            p.kill()


def _rank(queue: Any, rank: int, size: int, run_dir: str) -> None:
    torch.set_num_threads(1)
    report = {}
    for experiment in (_gloo, _agreement, _symmetric):
        private = Path(run_dir) / experiment.__name__
        private.mkdir(exist_ok=True)
        report[experiment.__name__] = experiment(rank, size, str(private))
    queue.put((rank, report))


def shard(rank: int, rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rank)).to(dtype)


# ---------------------------------------------------------------- gloo
def _gloo(rank: int, size: int, run_dir: str) -> dict[str, np.ndarray]:
    parallel = make_parallel("gloo", rank, size, run_dir)
    out: dict[str, np.ndarray] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = shard(rank, 4, 6, dtype)
        assert parallel.all_reduce_(x) is x
        out[f"sum {dtype}"] = x.float().numpy()
    widths = WIDTHS[:size]
    for rows in (0, 1, 7):
        out[f"uneven {rows}"] = parallel.all_gather_cols(shard(rank, rows, widths[rank]), widths).numpy()
    out["even"] = parallel.all_gather_cols(shard(rank, 3, 8)[:, ::2], [4] * size).numpy()  # not contiguous
    parallel.close()
    parallel.close()
    return out


def test_gloo_ranks_sum_and_gather_uneven_columns(reports):
    reports, size = [r["_gloo"] for r in reports], len(reports)
    for name in reports[0]:  # bitwise the same everywhere
        assert all(np.array_equal(r[name], reports[0][name]) for r in reports), name
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        want = sum(shard(r, 4, 6, dtype).double() for r in range(size))
        np.testing.assert_allclose(reports[0][f"sum {dtype}"], want, rtol=tolerance, atol=tolerance)
    for rows in (0, 1, 7):
        want = torch.cat([shard(r, rows, WIDTHS[r]) for r in range(size)], dim=1)
        assert np.array_equal(reports[0][f"uneven {rows}"], want)
    assert np.array_equal(reports[0]["even"], torch.cat([shard(r, 3, 8)[:, ::2] for r in range(size)], dim=1))


def test_a_single_rank_of_any_kind_needs_no_group():
    for kind in ("gloo", "nccl", "shared-gpu"):
        parallel = make_parallel(kind, 0, 1, "")
        assert type(parallel) is Parallel
        x = torch.ones(2, 3)
        assert parallel.all_gather_cols(parallel.all_reduce_(x), [3]) is x
        parallel.close()


# ---------------------------------------------------------------- the choice of a path
@pytest.mark.parametrize(
    ("nbytes", "size", "one_shot"),
    [
        (16, 2, True),
        (ONE_SHOT_BYTES, 8, True),
        (ONE_SHOT_BYTES + 16, 8, False),  # too large
        (4096, 3, True),  # any degree
        (4096, 16, True),
        (4096, 17, False),  # more ranks than the kernel has signals for
        (4096, 1, False),
        (0, 2, False),
        (30, 2, False),  # not whole vectors
    ],
)
def test_small_messages_of_whole_vectors_go_one_shot(nbytes, size, one_shot):
    assert use_one_shot(nbytes, size) is one_shot


def test_the_limit_of_one_shot_can_be_given():
    assert use_one_shot(1 << 20, 2, limit=1 << 20)
    assert not use_one_shot(16, 2, limit=0)


# ---------------------------------------------------------------- agreement
class OverGloo:
    """Symmetric memory played by a process group.  Fails in one stage on rank 1; `connect` waits for all, as the real one."""

    norm_sums = None

    def __init__(self, group: dist.ProcessGroup, failing: str) -> None:
        self.group, self.failing = group, failing
        self.sums = 0

    def _reach(self, stage: str) -> None:
        if stage == self.failing and dist.get_rank(self.group) == 1:
            raise RuntimeError(f"{stage} is broken\nC++ stack trace")

    def allocate(self) -> None:
        self._reach("allocate")

    def connect(self) -> None:
        dist.barrier(self.group)
        self._reach("connect")

    def try_out(self) -> None:
        dist.barrier(self.group)
        self._reach("try_out")

    def all_reduce_(self, x: torch.Tensor) -> None:
        self.sums += 1
        dist.all_reduce(x, group=self.group)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _agreement(rank: int, size: int, run_dir: str) -> dict[str, tuple[list[str], int, bool]]:
    """By failing stage: the lines said, the sums that took the one-shot path, and whether all sums were right."""
    group = join("gloo", rank, size, run_dir)
    out = {}
    for failing in ("allocate", "connect", "try_out", ""):
        lines: list[str] = []
        fake = OverGloo(group, failing)
        parallel = CudaParallel(rank, size, group, fake, one_shot_bytes=64, say=lines.append)
        right = True
        for count, dtype in ((16, torch.float32), (17, torch.float32), (32, torch.bfloat16), (8, torch.float16)):
            x = torch.full((count,), float(rank + 1), dtype=dtype)
            right &= bool((parallel.all_reduce_(x) == size * (size + 1) // 2).all())
        out[failing] = (lines, fake.sums, right)
    with pytest.raises(RuntimeError, match="only through symmetric memory"):
        SharedGpuParallel(rank, size, group, OverGloo(group, "connect"), say=lambda _: None)
    parallel.close()
    return out


@pytest.mark.parametrize("failing", ["allocate", "connect", "try_out"])
def test_all_ranks_fall_back_when_one_cannot_and_that_one_says_why(failing, reports):
    line = f"all-reduces of every size go through gloo: rank 1: {failing} is broken"
    for rank, report in enumerate(reports):
        assert report["_agreement"][failing] == ([line] if rank == 1 else [], 0, True)


def test_small_sums_of_what_the_kernel_can_add_go_one_shot_on_all_ranks(reports):
    # 16 floats and 32 bfloat16 do; 17 floats are too many, and float16 is not in the kernel.
    assert [r["_agreement"][""] for r in reports] == [([], 2, True)] * len(reports)


# ---------------------------------------------------------------- symmetric memory's own gather
class SharedFiles:
    """torch's handle, played by mapped files: `get_buffer` sees what its rank wrote, `barrier` waits for all."""

    def __init__(self, group: dist.ProcessGroup, run_dir: str, nbytes: int) -> None:
        self.group = group
        for rank in range(dist.get_world_size(group)):
            Path(f"{run_dir}/buffer{rank}").touch()
        dist.barrier(group)
        self.buffers = []
        for rank in range(dist.get_world_size(group)):
            self.buffers.append(torch.from_file(f"{run_dir}/buffer{rank}", shared=True, size=nbytes, dtype=torch.uint8))
        dist.barrier(group)

    def barrier(self, channel: int, timeout_ms: int = 0) -> None:
        dist.barrier(self.group)

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.buffers[rank].view(dtype)[: sizes[0]]


def _symmetric(rank: int, size: int, run_dir: str) -> dict[str, np.ndarray]:
    group = join("gloo", rank, size, run_dir)
    memory = SymmetricMemory(group, torch.device("cuda", 0), 60, run_dir)  # rounded up to 64: 16 floats, 32 halves
    memory.allocate = memory.connect = memory.try_out = lambda: None  # type: ignore[method-assign]
    memory._handle = SharedFiles(group, run_dir, 64)
    memory._mine = memory._handle.buffers[rank]
    parallel = SharedGpuParallel(rank, size, group, memory, one_shot_bytes=0)
    out = {}
    widths = WIDTHS[:size]
    for rows in (0, 1, 7, 40):  # nothing, one piece, several, many
        out[f"cols {rows}"] = parallel.all_gather_cols(shard(rank, rows, widths[rank]), widths).numpy()
        for dtype in (torch.float32, torch.float16):
            out[f"sum {rows} {dtype}"] = parallel.all_reduce_(shard(rank, rows, 5, dtype)).float().numpy()
    parallel.close()
    return out


def test_ranks_on_one_gpu_gather_through_a_buffer_smaller_than_the_message(reports):
    reports, size = [r["_symmetric"] for r in reports], len(reports)
    for rows in (0, 1, 7, 40):
        want = torch.cat([shard(r, rows, WIDTHS[r]) for r in range(size)], dim=1)
        assert all(np.array_equal(r[f"cols {rows}"], want) for r in reports)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            name = f"sum {rows} {dtype}"
            total = sum(shard(r, rows, 5, dtype).double() for r in range(size))
            assert all(np.array_equal(r[name], reports[0][name]) for r in reports)
            np.testing.assert_allclose(reports[0][name], total, rtol=tolerance, atol=tolerance)
