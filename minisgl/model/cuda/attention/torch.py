"""Attends in plain torch, row by row: the slow reference that checks compare the other backends with.  Runs in the workers."""

from __future__ import annotations

from typing import ClassVar

import torch

from minisgl.model.common.functional import softcap_, softmax
from minisgl.model.cuda.attention.base import AttentionSpec, Chunks, DecodeRows
from minisgl.model.cuda.attention.kv_cache import KVCache

BLOCK = 256  # query tokens at a time


class TorchReference:
    """A Backend, float32 inside."""

    graphs: ClassVar[bool] = False

    def __init__(self, heads: AttentionSpec, cache: KVCache, page_table: torch.Tensor) -> None:
        self._heads, self._cache, self._page_table = heads, cache, page_table
        self._chunks: list[tuple[int, int, int]] = []  # slot, tokens, KV length
        self._rows: list[tuple[int, int, int]] = []

    @classmethod
    def refuses(cls, heads: AttentionSpec, task: str) -> str | None:
        return None

    def plan_prefill(self, chunks: Chunks) -> None:
        self._chunks = list(zip(chunks.slots.tolist(), chunks.chunk_lens.tolist(), chunks.kv_lens.tolist(), strict=True))

    def prefill(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        return self._attend(q, layer, self._chunks, sinks)

    def plan_decode(self, rows: DecodeRows) -> None:
        self._rows = [(s, 1, n) for s, n in zip(rows.slots.tolist(), rows.kv_lens.tolist(), strict=True)]

    def decode(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        return self._attend(q, layer, self._rows, sinks)

    def _attend(
        self, q: torch.Tensor, layer: int, rows: list[tuple[int, int, int]], sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """rows: (slot, tokens, KV length) of each, whose queries follow one another in q."""
        h, size, out, start = self._heads, self._cache.page_size, [], 0
        sinks = None if sinks is None else sinks.view(h.num_kv_heads, h.group, 1)
        for slot, n, kv_len in rows:
            at = torch.arange(kv_len, device=q.device)
            pages = self._page_table[slot].long()[at // size]
            keys = self._cache.keys(layer)[pages, :, at % size].float()  # [S, K, D]
            values = self._cache.values(layer)[pages, :, at % size].float()
            query = q[start : start + n].float().view(n, h.num_kv_heads, h.group, h.head_dim)
            for first in range(0, n, BLOCK):  # the scores of a whole chunk would be gigabytes
                part = query[first : first + BLOCK]
                scores = torch.einsum("tkgd,skd->tkgs", part, keys) * (h.scale or h.head_dim**-0.5)
                scores = softcap_(scores, h.softcap)
                own = kv_len - n + first + torch.arange(len(part), device=q.device)[:, None]
                seen = (at <= own) & (at > own - (h.window(layer) or kv_len))
                weights = softmax(scores.masked_fill(~seen[:, None, None], -torch.inf), sinks)
                mixed = torch.einsum("tkgs,skd->tkgd", weights, values)
                out.append(mixed.reshape(len(part), h.num_heads, h.head_dim).to(q.dtype))
            start += n
        return torch.cat(out)
