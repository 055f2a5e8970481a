"""Computes attention over the paged KV cache on a CPU with the C kernel: `KernelAttention`.  Runs in the workers."""

from __future__ import annotations

import numpy as np
import torch

from minisgl.config import ModelSpec
from minisgl.model.common.activations import Product, plain
from minisgl.model.common.interfaces import QKNorm, Rotation
from minisgl.model.common.shard import Shard
from minisgl.model.common.slots import StepBatch
from minisgl.model.cpu.kernels import Kernels, Layer, Step

QUERIES = 16  # tokens of a prompt in one item of work
KV_DTYPE = torch.float16


class KernelAttention:
    """See `AttentionBackend`.  The cache is in half precision; its layout is in csrc/attention.c."""

    def __init__(self, spec: ModelSpec, shard: Shard, num_pages: int, page_size: int, run: Kernels) -> None:
        self._run = run
        self._width = shard.num_heads * spec.head_dim
        layer_bytes = num_pages * page_size * 2 * shard.num_kv_heads * spec.head_dim * KV_DTYPE.itemsize
        # Zero pages of the operating system: they take no memory until written.
        self._cache = np.zeros(spec.num_layers * layer_bytes, np.uint8)
        base = self._cache.ctypes.data
        self._layers = [
            Layer(
                cache=base + i * layer_bytes,
                scale=spec.scale,
                softcap=spec.attn_softcap,
                page_size=page_size,
                heads=shard.num_heads,
                kv_heads=shard.num_kv_heads,
                dim=spec.head_dim,
                window=spec.window(i),
            )
            for i in range(spec.num_layers)
        ]
        self._step = Step()
        self._kept: tuple[object, ...] = ()  # keeps the arrays alive that the step points to

    def plan(self, batch: StepBatch) -> None:
        """Lay out the step's items of work.  Once per step, before the first layer."""
        lens, contexts = batch.chunk_lens.astype(np.int64), batch.kv_lens.astype(np.int64)
        n_chunks = len(lens)
        rows = np.arange(len(contexts))
        count = np.concatenate((lens, np.ones(len(contexts) - n_chunks, np.int64)))  # tokens of each row
        start = np.cumsum(count) - count
        pieces = -(-count // QUERIES)
        row = np.repeat(rows, pieces)
        offset = (np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * QUERIES
        items = np.stack(
            (start[row] + offset, np.minimum(QUERIES, count[row] - offset), contexts[row] - count[row] + offset, row), 1
        )
        work = items[:, 1] * (items[:, 1] + items[:, 2])
        items = np.ascontiguousarray(items[np.argsort(-work, kind="stable")], np.int32)  # the largest first
        pages, slots = np.ascontiguousarray(batch.pages, np.int32), np.ascontiguousarray(batch.kv_index, np.int64)
        self._kept = (items, pages, slots)
        self._step = Step(
            slots=slots.ctypes.data,
            items=items.ctypes.data,
            pages=pages.ctypes.data,
            n_tokens=len(slots),
            n_items=len(items),
            pages_per_row=pages.shape[1],
        )

    def __call__(
        self, layer: int, qkv: Product, rotation: Rotation | None, qk_norm: QKNorm | None, *, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        here, step = self._layers[layer], self._step
        if qk_norm is not None:
            here.q_norm, here.k_norm, here.eps = qk_norm.q.data_ptr(), qk_norm.k.data_ptr(), qk_norm.eps
        if sinks is not None:
            here.sinks = sinks.data_ptr()
        step.cos = step.sin = None
        if rotation is not None:
            cos, sin = rotation
            step.cos, step.sin, step.rotary = cos.data_ptr(), sin.data_ptr(), cos.shape[-1]
        return self._run.attention(here, step, plain(qkv), self._width)
