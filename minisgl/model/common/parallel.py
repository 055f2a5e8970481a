"""Collectives between the ranks of one engine: all-reduce and all-gather over gloo.  All ranks call them in the same order."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from minisgl.config import RENDEZVOUS
from minisgl.model.common.activations import Product, plain

TIMEOUT = timedelta(minutes=10)  # a rank that waits longer has lost its peers

# Renamed in torch 2.13, which warns at the old name.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Parallel:
    """One rank of `size`, over torch.distributed.  A single rank needs no process group: its collectives do nothing."""

    def __init__(self, rank: int = 0, size: int = 1, run_dir: str = "", group: dist.ProcessGroup | None = None) -> None:
        """Join the group, which returns when all ranks have.  run_dir: see `join`.  group: one that was joined already."""
        self.rank = rank
        self.size = size
        self._group = group
        if size > 1 and group is None:
            self._group = join("gloo", rank, size, run_dir)

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place.  The result is bitwise the same on every rank."""
        if self.size > 1:
            dist.all_reduce(x, group=self._group)
        return x

    def sum_over_ranks(self, part: Product) -> Product:
        """All-reduce of this rank's part of a product [T, C].  A single rank has all of it, in whatever form."""
        return part if self.size == 1 else self.all_reduce_(plain(part))

    @property
    def needs_tensors(self) -> bool:
        """Whether `sum_over_ranks` takes nothing but tensors."""
        return self.size > 1

    def all_gather_cols(self, x: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """[rows, widths[rank]] -> [rows, sum(widths)], the ranks' columns side by side.  Uneven shards travel padded."""
        if self.size == 1:
            return x
        widest = max(widths)
        if x.shape[1] < widest:
            padded = x.new_empty(x.shape[0], widest)  # the padding is never read
            padded[:, : x.shape[1]] = x
            x = padded
        parts = self._gather(x.contiguous())
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous [...] of one shape on all ranks -> [size, ...], in one collective."""
        flat = x.new_empty(self.size * x.numel())
        all_gather_single(flat, x.view(-1), group=self._group)
        return flat.view(self.size, *x.shape)

    def close(self) -> None:
        """Leave the group.  Idempotent."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join(
    backend: Literal["gloo", "nccl"], rank: int, size: int, run_dir: str, device: torch.device | None = None
) -> dist.ProcessGroup:
    """Make the process group of all ranks; returns when all have joined.

    run_dir: a private directory, without the file RENDEZVOUS of ranks before.  The ranks find each other through it instead of
    a TCP port, so no other process can join and no port can collide; all sockets are on the loopback interface.

    NVLink multicast stays off unless the user's environment turns it on: it is shared by all programs on the host.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NET", "Socket")  # all ranks are on one host: no other network is searched
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    store = dist.FileStore(os.path.join(run_dir, RENDEZVOUS), size)  # type: ignore[attr-defined]
    # With a device, NCCL connects here and not in the first collective, which may be captured into a graph.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device)
    group = dist.group.WORLD
    assert group is not None
    return group


to_stderr = logging.getLogger("minisgl").info  # a line for the person who started the engine
