"""Defines what an attention backend on a GPU offers: `Backend`, and the rows of a step that it plans.  Runs in the workers.

A backend attends over the paged KV cache and is one file:

    attention/triton.py      our kernels: decode at the bandwidth of the memory, no plan on the host, any head size
    attention/flashinfer.py  prefill with FA3 or FA2 at the rate of the matrix units
    attention/torch.py       the readable reference

attention/choose.py takes the best of them for prefill and for decode; `--attention-backend` names one for both.
attention/paged.py is what the model calls: it writes the cache and hands prompt chunks to one backend, decode rows to another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch

from minisgl.arrays import I32
from minisgl.config import ModelSpec
from minisgl.model.common.shard import Shard
from minisgl.model.cuda.attention.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The heads of one rank, and the GPU: what a backend must be able to do.  `capability`: 90 for compute capability 9.0."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    capability: int
    windows: tuple[int, ...] = ()  # this and the rest: see ModelSpec
    scale: float = 0.0
    softcap: float = 0.0
    sinks: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, shard: Shard, dtype: torch.dtype, kv_dtype: torch.dtype, capability: int) -> AttentionSpec:
        """The heads of `shard`."""
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
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def window(self, layer: int) -> int:
        """Tokens that a query of `layer` sees, its own included; 0: all."""
        return self.windows[layer] if self.windows else 0


def _no_ints() -> I32:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Prompt chunks of a step, on the host: the tokens of chunk i are the last chunk_lens[i] of kv_lens[i] in slots[i]."""

    chunk_lens: I32 = field(default_factory=_no_ints)
    kv_lens: I32 = field(default_factory=_no_ints)
    slots: I32 = field(default_factory=_no_ints)
    pages: I32 = field(default_factory=_no_ints)  # [P, pages of the longest row]
    tiles: torch.Tensor | None = None  # instead of these inside a graph: i32 [n, 4] on the device, see `tiles_of`


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Decode rows of a step, on the device, and their lengths as the host knows them (None inside a graph)."""

    slots: torch.Tensor  # i32[B]
    kv_lens: torch.Tensor  # i32[B]
    splits: int  # parts that each row is cut into
    host_kv_lens: I32 | None = None
    host_pages: I32 | None = None


class Backend(Protocol):
    """Attention over a KVCache.  `plan_*` once a step, then `prefill` or `decode` for every layer."""

    graphs: ClassVar[bool]  # whether its kernels can be captured in a graph: no plan on the host

    def __init__(self, heads: AttentionSpec, cache: KVCache, page_table: torch.Tensor) -> None:
        """page_table i32 [slots, pages per slot] is read when a step runs."""

    @classmethod
    def refuses(cls, heads: AttentionSpec, task: str) -> str | None:
        """Why this backend cannot do `task` ("prefill" or "decode") for these heads; None if it can."""

    def plan_prefill(self, chunks: Chunks) -> None:
        """Prepare a step's chunks."""

    def prefill(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        """Causal attention of the chunks' queries [T, H, D] -> [T, H, D].  sinks f32[H]: see AttentionBackend."""

    def plan_decode(self, rows: DecodeRows) -> None:
        """Prepare a step's decode rows."""

    def decode(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        """Attention of one query per row [B, H, D] -> [B, H, D]."""
