"""Computes attention over the paged KV cache on a CPU in torch: `TorchAttention`.  Runs in the workers.

It serves every model; `KernelAttention` (attention_c.py) is faster and serves most.

Shapes: T tokens of a step, H query heads, K KV heads, G = H / K heads per group, D head size, S context length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from minisgl.arrays import I32
from minisgl.config import ModelSpec
from minisgl.model.common.activations import Product, plain
from minisgl.model.common.functional import rms_norm, softcap_, softmax
from minisgl.model.common.interfaces import QKNorm, Rotation
from minisgl.model.common.rope import rotate_
from minisgl.model.common.shard import Shard
from minisgl.model.common.slots import StepBatch

GATHER_BYTES = 6 << 20  # keys and values of decode rows that are gathered together: small enough to stay in the CPU's caches


@dataclass(slots=True)
class _Chunk:
    """A prompt chunk: tokens start..end of the step; the last one sees `context` tokens, counted from the first of `pages`."""

    start: int
    end: int
    context: int
    pages: torch.Tensor | None  # i64; None without a cached prefix: the step itself has all keys and values
    mask: torch.Tensor | None  # [chunk, context], 0 or -inf; None: causal


@dataclass(slots=True)
class _DecodeGroup:
    """Decode rows start..end of the step, padded to the longest context."""

    start: int
    end: int
    pages: torch.Tensor  # i64[rows * pages per row]
    mask: torch.Tensor  # [rows, 1, G, padded context], 0 or -inf


@dataclass(slots=True)
class _Step:
    """The rows of a step, laid out for the layers of one window size."""

    chunks: list[_Chunk]
    groups: list[_DecodeGroup]


class TorchAttention:
    """scaled_dot_product_attention on gathered pages.

    The cache is one tensor [layer, page, page_size, 2, K, D].  Keys and values of a token are adjacent, so one index_copy_
    writes them, and one index_select of complete pages gathers them (several times faster than advanced indexing by token).
    Groups of query heads are folded into the query length (decode) or the head dimension (prefill); `enable_gqa` would
    repeat the keys instead.
    """

    def __init__(self, spec: ModelSpec, shard: Shard, num_pages: int, page_size: int, dtype: torch.dtype) -> None:
        self._page_size = page_size
        self._kv_heads, self._group, self._dim = shard.num_kv_heads, shard.num_heads // shard.num_kv_heads, spec.head_dim
        self._scale, self._softcap = spec.scale, spec.attn_softcap
        self._by_hand = spec.sinks or self._softcap > 0  # scaled_dot_product_attention has neither
        self._windows = [spec.window(layer) for layer in range(spec.num_layers)]
        token = 2 * shard.num_kv_heads * spec.head_dim
        self._token_bytes = token * dtype.itemsize
        # Zero pages of the operating system: they take no memory until written.
        raw = np.zeros(spec.num_layers * num_pages * page_size * self._token_bytes, np.uint8)
        cache = torch.from_numpy(raw).view(dtype)
        self._by_token = cache.view(spec.num_layers, num_pages * page_size, 2, shard.num_kv_heads, spec.head_dim)
        self._by_page = cache.view(spec.num_layers, num_pages, page_size * token)
        self._workspace = torch.empty(0, dtype=dtype)
        self._dtype = dtype
        self._kv_index = torch.empty(0, dtype=torch.int64)
        self._steps: dict[int, _Step] = {}  # by window

    def plan(self, batch: StepBatch) -> None:
        """Lay out the step for all layers.  Once per step, before the first layer."""
        self._kv_index = torch.from_numpy(batch.kv_index)
        # Complete pages are gathered, and a weight of 0 does not undo NaN: nothing of a page's former owner may remain.
        begun = batch.kv_index[batch.kv_index % self._page_size == 0] // self._page_size
        if len(begun):
            self._by_page.index_fill_(1, torch.from_numpy(begun), 0)
        self._steps = {window: self._lay_out(batch, window) for window in set(self._windows)}
        steps = self._steps.values()
        needed = max([len(c.pages) for s in steps for c in s.chunks if c.pages is not None], default=0)
        needed = max([needed, *(len(g.pages) for s in steps for g in s.groups)])
        if needed > len(self._workspace):  # kept between steps: new memory would be paged in again for every layer
            self._workspace = torch.empty(needed, self._by_page.shape[2], dtype=self._dtype)

    def _lay_out(self, batch: StepBatch, window: int) -> _Step:
        ends = np.cumsum(batch.chunk_lens)
        chunks = [
            self._chunk(int(end - n), int(end), int(batch.kv_lens[i]), batch.pages[i], window)
            for i, (n, end) in enumerate(zip(batch.chunk_lens, ends, strict=True))
        ]
        groups = []
        first, n_prompt_ids = len(batch.chunk_lens), int(batch.chunk_lens.sum())
        lens, pages = batch.kv_lens[first:], batch.pages[first:]
        start = 0
        while start < len(lens):  # longest first: a group is as long as its first row
            n_pages = self._pages_of(int(lens[start]))
            if window:  # a window may begin and end within a page
                n_pages = min(n_pages, self._pages_of(window - 1) + 1)
            end = start + max(1, GATHER_BYTES // (n_pages * self._page_size * self._token_bytes))
            groups.append(self._decode_group(start + n_prompt_ids, lens[start:end], pages[start:end], n_pages, window))
            start = min(end, len(lens))
        return _Step(chunks, groups)

    def __call__(
        self, layer: int, qkv: Product, rotation: Rotation | None, qk_norm: QKNorm | None, *, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        n_heads = self._kv_heads * self._group
        heads = plain(qkv).view(-1, n_heads + 2 * self._kv_heads, self._dim)
        q = heads[:, :n_heads]
        if qk_norm is not None:
            k = heads[:, n_heads : n_heads + self._kv_heads]
            q.copy_(rms_norm(q, qk_norm.q, qk_norm.eps))
            k.copy_(rms_norm(k, qk_norm.k, qk_norm.eps))
        if rotation is not None:
            rotate_(heads[:, : n_heads + self._kv_heads], *rotation)
        kv = heads[:, n_heads:].view(-1, 2, self._kv_heads, self._dim)
        if self._dtype == torch.float16:
            kv.clamp_(-65504, 65504)
        self._by_token[layer].index_copy_(0, self._kv_index, kv)
        step = self._steps[self._windows[layer]]
        out = [self._prefill(layer, c, q[c.start : c.end], kv, sinks) for c in step.chunks]
        out += [self._decode(layer, g, q[g.start : g.end], sinks) for g in step.groups]
        return torch.cat(out) if len(out) > 1 else out[0]

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _chunk(self, start: int, end: int, context: int, pages: I32, window: int) -> _Chunk:
        n = end - start
        alone = context == n  # no cached prefix
        if alone and not (window and context > window) and not self._by_hand:
            return _Chunk(start, end, context, None, None)
        # Pages before the first token that any query sees are left out, and positions count from the first page kept.
        skipped = 0 if alone or not window else max(0, context - n - window + 1) // self._page_size
        rest = context - skipped * self._page_size
        mask = torch.full((n, rest), -torch.inf, dtype=self._dtype).triu_(rest - n + 1)
        if window:
            mask += torch.full((n, rest), -torch.inf, dtype=self._dtype).tril_(rest - n - window)
        mine = torch.from_numpy(pages[skipped : self._pages_of(context)].astype(np.int64))
        return _Chunk(start, end, rest, None if alone else mine, mask)

    def _decode_group(self, start: int, lens: I32, pages: I32, n_pages: int, window: int) -> _DecodeGroup:
        # The first token that each row sees.
        first = np.maximum(lens - window, 0)[:, None] if window else np.zeros((len(lens), 1), np.int64)
        page = first // self._page_size + np.arange(n_pages)
        position = (page[:, :, None] * self._page_size + np.arange(self._page_size)).reshape(len(lens), -1)
        unseen = (position < first) | (position >= lens[:, None])
        # Entries after a row's last page may name any page, of any request: the row's own last page is read instead.
        own = np.minimum(page, (lens[:, None] - 1) // self._page_size)
        index = torch.from_numpy(np.take_along_axis(pages, own, axis=1).astype(np.int64).reshape(-1))
        mask = torch.zeros(unseen.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(unseen), -torch.inf)
        return _DecodeGroup(start, start + len(lens), index, mask[:, None, None].expand(-1, 1, self._group, -1))

    def _gather(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """Copies complete pages -> [tokens, 2, K, D], valid until the next gather."""
        out = self._workspace[: len(pages)]
        torch.index_select(self._by_page[layer], 0, pages, out=out)
        return out.view(-1, 2, self._kv_heads, self._dim)

    def _prefill(self, layer: int, c: _Chunk, q: torch.Tensor, kv: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        kv = kv[c.start : c.end] if c.pages is None else self._gather(layer, c.pages)[: c.context]
        spoilt = None
        if not kv.sum(dtype=torch.float32).isfinite():
            # Tokens before one whose keys or values are no finite numbers must not get NaN from a weight of 0; those that see
            # it become NaN.
            bad = ~kv.isfinite().flatten(1).all(1)
            spoilt = bad.cumsum(0) > 0 if c.mask is None else (c.mask[:, bad] == 0).any(1)
            kv = kv.masked_fill(bad[:, None, None, None], 0)
        keys, values = kv.permute(1, 2, 0, 3)[:, :, None].expand(-1, -1, self._group, -1, -1)  # [K, G, S, D]
        q = q.view(len(q), self._kv_heads, self._group, self._dim).permute(1, 2, 0, 3)  # [K, G, chunk, D]
        if sinks is not None:
            sinks = sinks.view(self._kv_heads, self._group, 1, 1)
        out = self._attend(q, keys, values, c.mask, sinks).permute(2, 0, 1, 3).reshape(q.shape[2], -1)
        return out if spoilt is None else out.masked_fill(spoilt[:, None], torch.nan)

    def _decode(self, layer: int, g: _DecodeGroup, q: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        rows = len(q)
        kv = self._gather(layer, g.pages).view(rows, -1, 2, self._kv_heads, self._dim)
        keys, values = kv.permute(2, 0, 3, 1, 4)  # [rows, K, S, D]
        q = q.view(rows, self._kv_heads, self._group, self._dim)
        if sinks is not None:
            sinks = sinks.view(self._kv_heads, self._group, 1)
        return self._attend(q, keys, values, g.mask, sinks).reshape(rows, -1)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is None or not self._by_hand:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, scale=self._scale)
        scores = softcap_(q @ keys.transpose(-1, -2) * self._scale, self._softcap) + mask
        return softmax(scores, sinks) @ values
