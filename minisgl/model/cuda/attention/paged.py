"""Runs attention over the paged KV cache on a GPU: rotates heads, writes keys and values, attends.  Runs in the workers."""

from __future__ import annotations

import torch

from minisgl.model.common.activations import Product
from minisgl.model.common.interfaces import QKNorm, Rotation
from minisgl.model.cuda.attention.base import AttentionSpec, Backend, Chunks, DecodeRows
from minisgl.model.cuda.attention.kv_cache import KVCache
from minisgl.model.kernels.qk_norm_rope import prepare_heads


class PagedAttention:
    """The AttentionBackend of a model on a GPU.  A step's tokens are those of its prompt chunks, then its decode rows."""

    def __init__(self, heads: AttentionSpec, cache: KVCache, prefill: Backend, decode: Backend, short: Backend) -> None:
        """`short`: the backend for prompt chunks inside graphs."""
        self.heads, self.cache = heads, cache
        self.prefill, self.decode, self.short = prefill, decode, short
        self._chunks = prefill  # the backend of this step's chunks
        self._kv_index = torch.empty(0)
        self._n_chunk_tokens = self._n_decode_rows = 0

    def plan(self, kv_index: torch.Tensor, chunks: Chunks | None, rows: DecodeRows | None, *, short: bool = False) -> None:
        """Prepare a step.  kv_index i64 or i32 [T]: page * page_size + offset of each token.

        `short`: the step is a graph with prompt chunks, in which decode rows are chunks of one token.
        """
        self._kv_index = kv_index
        self._n_decode_rows = 0 if rows is None else len(rows.slots)
        self._n_chunk_tokens = len(kv_index) - self._n_decode_rows
        if chunks is not None:
            self._chunks = self.short if short else self.prefill
            self._chunks.plan_prefill(chunks)
        if rows is not None:
            self.decode.plan_decode(rows)

    def __call__(
        self, layer: int, qkv: Product, rotation: Rotation | None, qk_norm: QKNorm | None, *, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        keys, values = self.cache.keys(layer), self.cache.values(layer)
        q = prepare_heads(qkv, rotation, qk_norm, keys, values, self._kv_index, dtype=self.heads.dtype)
        parts = []
        if self._n_chunk_tokens:
            parts.append(self._chunks.prefill(q[: self._n_chunk_tokens], layer, sinks))
        if self._n_decode_rows:
            parts.append(self.decode.decode(q[self._n_chunk_tokens :], layer, sinks))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out.view(len(q), self.heads.num_heads * self.heads.head_dim)
