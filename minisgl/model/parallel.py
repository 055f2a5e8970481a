"""Tensor-parallel collectives between the workers of one engine.  Every rank calls them in the same order."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # a rank that waits longer has lost its peers


class Parallel:
    """One rank of `size`.  A single rank needs no process group, and its collectives do nothing."""

    def __init__(self, rank: int = 0, size: int = 1, run_dir: str = "", backend: str = "gloo") -> None:
        """Join the group; returns when all ranks have.  `run_dir`: a private directory that is new for every engine start.

        The ranks find each other through a file there instead of a TCP port, so nobody outside can join and no port can
        collide; the data goes over the loopback interface.
        """
        self.rank = rank
        self.size = size
        if size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            path = os.path.join(run_dir, "tp")
            store = dist.FileStore(path, size)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather_cols(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """[rows, widths[rank]] -> [rows, sum(widths)], the ranks' columns side by side.  Uneven shards travel padded."""
        if self.size == 1:
            return x
        widest = max(widths)
        mine = x.new_zeros(x.shape[0], widest)
        mine[:, : x.shape[1]] = x
        parts = [torch.empty_like(mine) for _ in widths]
        dist.all_gather(parts, mine)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def close(self) -> None:
        """Leave the group.  Idempotent."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
