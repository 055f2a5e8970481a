"""Attention on a GPU: what every backend offers, and the part that all share.  Runs in the workers.

`PagedAttention` is what the model calls: it normalises and rotates the heads, writes keys and values to the cache, and hands
prompt chunks to one backend and decode rows to another.  A backend is one file:

    triton      (attention_triton)      our kernels: decode at the bandwidth of the memory, no plan on the host, any head size
    flashinfer  (attention_flashinfer)  prefill with FA3 or FA2 at the rate of the matrix units
    torch       (attention_torch)       the readable reference

`choose` takes, for each of the two tasks, the first of them that can do it; `--attention-backend` names one for both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from minisgl.arrays import I32
from minisgl.config import ModelSpec
from minisgl.model.common.shard import Shard
from minisgl.model.cuda.attention.kv_cache import KVCache


def _no_ints() -> I32:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a backend must be able to do.  `capability`: 90 for compute capability 9.0."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    capability: int
    windows: tuple[int, ...] = ()  # by layer, and so on: see ModelSpec
    scale: float = 0.0
    softcap: float = 0.0
    sinks: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, shard: Shard, dtype: torch.dtype, kv_dtype: torch.dtype, capability: int) -> AttentionSpec:
        """Those of a rank."""
        return cls(
            num_heads=shard.num_heads,
            num_kv_heads=shard.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
            capability=capability,
            windows=spec.windows,
            scale=spec.scale,
            softcap=spec.attn_softcap,
            sinks=spec.sinks,
        )

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def window(self, layer: int) -> int:
        """Tokens that a query of `layer` sees, its own included; 0: all."""
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True, slots=True)
class Chunks:
    """Prompt chunks of a step, on the host: the tokens of chunk i are the last chunk_lens[i] of kv_lens[i] in slots[i]."""

    chunk_lens: I32 = field(default_factory=_no_ints)
    kv_lens: I32 = field(default_factory=_no_ints)
    slots: I32 = field(default_factory=_no_ints)
    pages: I32 = field(default_factory=_no_ints)  # [P, pages of the longest row]
    tiles: torch.Tensor | None = None  # in their place inside a graph: i32 [n, 4] on the device, see `tiles_of`


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Decode rows of a step, on the device, and their lengths as the host knows them (None inside a graph)."""

    slots: torch.Tensor  # i32[B]
    kv_lens: torch.Tensor  # i32[B]
    splits: int  # parts that each row is cut into
    host_kv_lens: I32 | None = None
    host_pages: I32 | None = None


class Backend(Protocol):
    """Attention over a KVCache.  `plan_*` once per step, then `prefill` or `decode` for every layer."""

    graphs: ClassVar[bool]  # whether `decode` can be part of a CUDA graph, planned or not

    def __init__(self, heads: AttentionSpec, cache: KVCache, page_table: torch.Tensor) -> None:
        """page_table i32 [slots, pages per slot] is read when a step runs."""

    @classmethod
    def refuses(cls, heads: AttentionSpec, task: str) -> str | None:
        """Why this backend cannot do `task` ("prefill" or "decode") for these heads here; None if it can."""

    def plan_prefill(self, chunks: Chunks) -> None:
        """Prepare a step's chunks."""

    def prefill(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        """Causal attention of the chunks' queries [T, H, D] -> [T, H, D].  sinks f32[H]: see AttentionBackend."""

    def plan_decode(self, rows: DecodeRows) -> None:
        """Prepare a step's decode rows."""

    def decode(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        """Attention of one query per row [B, H, D] -> [B, H, D]."""


def splits_for(rows: int, kv_heads: int, max_len: int, processors: int, kv_bytes: int) -> int:
    """Parts to cut each decode row into, a power of two: programs for all processors, and no part much longer than the others.

    Several programs for each processor keep its loads in flight to the end; `kv_bytes` is 2, or 1 for a float8 cache, whose
    tokens are read in half the time.  `kv_heads` must be the same number on all ranks: the parts are part of a graph's key, and
    ranks that capture at different steps would mix up their collectives.
    """
    wanted = 8 * kv_bytes * processors // (rows * kv_heads)
    return min(triton_parts(max_len), 1 << (wanted.bit_length() - 1) if wanted > 1 else 1)


def triton_parts(max_len: int) -> int:
    """The most parts that make sense: at least 64 tokens in each, 64 parts at most."""
    return max(1, min(64, 1 << (max(1, max_len // 64)).bit_length() - 1))


def paging(kv_lens: npt.NDArray[np.int32], pages: I32, page_size: int) -> tuple[I32, I32, I32]:
    """(indptr i32[rows + 1], page numbers of all rows on end, tokens in each row's last page)."""
    counts = -(-kv_lens // page_size)
    mine = np.arange(pages.shape[1]) < counts[:, None]
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return indptr, pages[mine].astype(np.int32), (kv_lens - (counts - 1) * page_size).astype(np.int32)
