"""Attention over a paged KV cache.  Runs in the workers.

`AttentionBackend` is what a model needs; `TorchAttention` is the one for CPUs, in plain torch.

Shapes: T tokens of a step, H query heads, K KV heads, G = H / K heads per group, D head size, S context length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.model.layers import QKNorm, rotate_
from minisgl.model.state import Batch

GATHER_BYTES = 6 << 20  # decode rows gathered and padded together: small enough to stay in the caches


class AttentionBackend(Protocol):
    """Owns the KV cache and knows where the rows of the current step keep theirs: it is told before the first layer."""

    def __call__(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, qk_norm: QKNorm | None
    ) -> torch.Tensor:
        """Rotate the queries and keys of qkv [T, (H + 2K) * D], store keys and values, attend -> [T, H * D].

        cos and sin: from the `rope` of the same blocks (see minisgl.model.blocks).  With `qk_norm`, queries and keys are
        normalised head by head before they are rotated.  Takes `qkv` over: it may be changed in place.
        """


@dataclass(slots=True)
class _Chunk:
    """A prompt chunk: tokens start..end of the step, whose last one sees `context` tokens."""

    start: int
    end: int
    context: int
    pages: torch.Tensor | None  # i64; None without a cached prefix: the keys and values are at hand
    mask: torch.Tensor | None  # [chunk, context], 0 or -inf


@dataclass(slots=True)
class _DecodeGroup:
    """Decode rows start..end of the step, padded to the context of the first."""

    start: int
    end: int
    pages: torch.Tensor  # i64[rows * pages per row]
    mask: torch.Tensor  # [rows, 1, G, padded context], 0 or -inf


class TorchAttention:
    """scaled_dot_product_attention on gathered pages.

    The cache is one tensor [layer, page, page_size, 2, K, D]: keys and values of a token lie side by side, so one index_copy_
    writes them and one index_select of whole pages gathers them (several times faster than advanced indexing by token).
    Groups of query heads are folded into the query length (decode) or the head dimension (prefill); `enable_gqa` would
    repeat the keys instead.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self._page_size = page_size
        self._kv_heads, self._group, self._dim = num_kv_heads, num_heads // num_kv_heads, head_dim
        token = 2 * num_kv_heads * head_dim
        self._token_bytes = token * dtype.itemsize
        # Zero pages of the operating system: costs no memory until written, and what padding reads is never NaN.
        raw = np.zeros(num_layers * num_pages * page_size * self._token_bytes, np.uint8)
        cache = torch.from_numpy(raw).view(dtype)
        self._by_token = cache.view(num_layers, num_pages * page_size, 2, num_kv_heads, head_dim)
        self._by_page = cache.view(num_layers, num_pages, page_size * token)
        self._workspace = torch.empty(0, dtype=dtype)
        self._dtype = dtype
        self._kv_index = torch.empty(0, dtype=torch.int64)
        self._chunks: list[_Chunk] = []
        self._groups: list[_DecodeGroup] = []

    def prepare(self, batch: Batch) -> None:
        """Compute whatever all layers of the step share.  Once per step, before the first layer."""
        self._kv_index = torch.from_numpy(batch.kv_index)
        ends = np.cumsum(batch.chunk_lens)
        self._chunks = [
            self._chunk(int(end - n), int(end), int(batch.kv_lens[i]), batch.pages[i])
            for i, (n, end) in enumerate(zip(batch.chunk_lens, ends, strict=True))
        ]
        self._groups = []
        first, n_prompt_ids = len(batch.chunk_lens), int(batch.chunk_lens.sum())
        lens, pages = batch.kv_lens[first:], batch.pages[first:]
        start = 0
        while start < len(lens):  # longest first: a group is as long as its first row
            n_pages = self._pages_of(int(lens[start]))
            end = start + max(1, GATHER_BYTES // (n_pages * self._page_size * self._token_bytes))
            self._groups.append(self._decode_group(start + n_prompt_ids, lens[start:end], pages[start:end, :n_pages]))
            start = min(end, len(lens))
        needed = max(
            [len(c.pages) for c in self._chunks if c.pages is not None] + [len(g.pages) for g in self._groups], default=0
        )
        if needed > len(self._workspace):  # kept: fresh memory would be paged in anew for every layer
            self._workspace = torch.empty(needed, self._by_page.shape[2], dtype=self._dtype)

    def __call__(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, qk_norm: QKNorm | None
    ) -> torch.Tensor:
        heads = self._kv_heads * self._group
        qkv = qkv.view(-1, heads + 2 * self._kv_heads, self._dim)
        if qk_norm is not None:
            queries, keys = qkv[:, :heads], qkv[:, heads : heads + self._kv_heads]
            queries.copy_(F.rms_norm(queries, (self._dim,), qk_norm.q, qk_norm.eps))
            keys.copy_(F.rms_norm(keys, (self._dim,), qk_norm.k, qk_norm.eps))
        rotate_(qkv[:, : heads + self._kv_heads], cos, sin)
        q, kv = qkv[:, :heads], qkv[:, heads:].view(-1, 2, self._kv_heads, self._dim)
        self._by_token[layer].index_copy_(0, self._kv_index, kv)
        out = [self._prefill(layer, c, q[c.start : c.end], kv) for c in self._chunks]
        out += [self._decode(layer, g, q[g.start : g.end]) for g in self._groups]
        return torch.cat(out) if len(out) > 1 else out[0]

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _chunk(self, start: int, end: int, context: int, pages: np.ndarray[tuple[int], np.dtype[np.int32]]) -> _Chunk:
        if context == end - start:
            return _Chunk(start, end, context, None, None)
        mask = torch.full((end - start, context), -torch.inf, dtype=self._dtype).triu_(context - (end - start) + 1)
        return _Chunk(start, end, context, torch.from_numpy(pages[: self._pages_of(context)].astype(np.int64)), mask)

    def _decode_group(
        self,
        start: int,
        lens: np.ndarray[tuple[int], np.dtype[np.int32]],
        pages: np.ndarray[tuple[int, int], np.dtype[np.int32]],
    ) -> _DecodeGroup:
        beyond = np.arange(pages.shape[1] * self._page_size) >= lens[:, None]
        # Entries behind a row's last page may name any page: read page 0 instead, whose values are finite.
        mine = np.arange(pages.shape[1]) * self._page_size < lens[:, None]
        index = torch.from_numpy(np.where(mine, pages, 0).astype(np.int64).reshape(-1))
        mask = torch.zeros(beyond.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(beyond), -torch.inf)
        return _DecodeGroup(start, start + len(lens), index, mask[:, None, None].expand(-1, 1, self._group, -1))

    def _gather(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """Copy whole pages -> [tokens, 2, K, D], valid until the next gather."""
        out = self._workspace[: len(pages)]
        torch.index_select(self._by_page[layer], 0, pages, out=out)
        return out.view(-1, 2, self._kv_heads, self._dim)

    def _prefill(self, layer: int, c: _Chunk, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        kv = kv[c.start : c.end] if c.pages is None else self._gather(layer, c.pages)[: c.context]
        keys, values = kv.permute(1, 2, 0, 3)[:, :, None].expand(-1, -1, self._group, -1, -1)  # [K, G, S, D]
        q = q.view(len(q), self._kv_heads, self._group, self._dim).permute(1, 2, 0, 3)  # [K, G, chunk, D]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=c.mask, is_causal=c.mask is None)
        return out.permute(2, 0, 1, 3).reshape(q.shape[2], -1)

    def _decode(self, layer: int, g: _DecodeGroup, q: torch.Tensor) -> torch.Tensor:
        rows = len(q)
        kv = self._gather(layer, g.pages).view(rows, -1, 2, self._kv_heads, self._dim)
        keys, values = kv.permute(2, 0, 3, 1, 4)  # [rows, K, S, D]
        q = q.view(rows, self._kv_heads, self._group, self._dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=g.mask)
        return out.reshape(rows, -1)
