"""`PagedAttention`, which a model calls on a GPU: it writes to the paged KV cache and attends through backends."""

from __future__ import annotations

import torch

from minisgl.model.common.activations import Product
from minisgl.model.common.interfaces import QKNorm, Rotation
from minisgl.model.cuda.attention.base import AttentionSpec, Backend, Chunks, DecodeRows
from minisgl.model.cuda.attention.kv_cache import KVCache
from minisgl.model.kernels.qk_norm_rope import prepare_heads


class PagedAttention:
    """The AttentionBackend of a model on a GPU, over one cache."""

    def __init__(self, heads: AttentionSpec, cache: KVCache, prefill: Backend, decode: Backend, short: Backend) -> None:
        """`short`: the backend for the chunks of steps that are captured as graphs."""
        self.heads, self.cache = heads, cache
        self._backends = {"prefill": prefill, "short": short}
        self._decode_backend = decode
        self._prefill_backend = prefill
        self._kv_index = torch.empty(0)
        self._split = 0  # tokens of the step that belong to prompt chunks
        self._rows = 0

    def plan(self, kv_index: torch.Tensor, chunks: Chunks | None, rows: DecodeRows | None, *, short: bool = False) -> None:
        """Prepare a step: chunks first, then decode rows.  kv_index i64 or i32 [T]: page * page_size + offset of each token.

        `short`: the chunks' tokens include the decode rows' (as chunks of one token); used inside graphs.
        """
        self._kv_index = kv_index
        self._rows = 0 if rows is None else len(rows.slots)
        self._split = len(kv_index) - self._rows
        if chunks is not None:
            self._prefill_backend = self._backends["short" if short else "prefill"]
            self._prefill_backend.plan_prefill(chunks)
        if rows is not None:
            self._decode_backend.plan_decode(rows)

    def __call__(
        self, layer: int, qkv: Product, rotation: Rotation | None, qk_norm: QKNorm | None, *, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        cos, sin = rotation or (None, None)
        q = prepare_heads(
            qkv,
            cos,
            sin,
            None if qk_norm is None else qk_norm.q,
            None if qk_norm is None else qk_norm.k,
            self.cache.keys(layer),
            self.cache.values(layer),
            self._kv_index,
            dtype=self.heads.dtype,
            eps=0.0 if qk_norm is None else qk_norm.eps,
        )
        parts = []
        if self._split:
            parts.append(self._prefill_backend.prefill(q[: self._split], layer, sinks))
        if self._rows:
            parts.append(self._decode_backend.decode(q[self._split :], layer, sinks))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out.view(len(q), self.heads.num_heads * self.heads.head_dim)
