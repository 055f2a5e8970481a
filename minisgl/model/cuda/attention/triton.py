"""Attends with our own Triton kernels, which need no plan on the host and can be captured in graphs.  Runs in the workers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from minisgl.model.cuda.attention.base import AttentionSpec, Chunks, DecodeRows
from minisgl.model.cuda.attention.kv_cache import KVCache
from minisgl.model.cuda.attention.requirements import triton_lacks
from minisgl.model.kernels.decode_attention import DecodeWorkspace, decode_attention
from minisgl.model.kernels.prefill_attention import prefill_attention, tiles_of
from minisgl.model.kernels.uploads import upload


class TritonAttention:
    """A Backend."""

    graphs: ClassVar[bool] = True

    def __init__(self, heads: AttentionSpec, cache: KVCache, page_table: torch.Tensor) -> None:
        self._heads, self._cache, self._page_table = heads, cache, page_table
        self._made: list[DecodeWorkspace] = []  # one, and smaller ones before it whose addresses graphs hold
        self._workspace: DecodeWorkspace | None = None
        self._rows: DecodeRows | None = None
        self._tiles: torch.Tensor | None = None

    @classmethod
    def refuses(cls, heads: AttentionSpec, task: str) -> str | None:
        return triton_lacks(heads.head_dim, heads.capability)

    def plan_prefill(self, chunks: Chunks) -> None:
        self._tiles = chunks.tiles
        if self._tiles is None:
            table = tiles_of(chunks.chunk_lens, chunks.slots, chunks.kv_lens, self._heads.group)
            self._tiles = upload(table, self._page_table.device)

    def prefill(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        assert self._tiles is not None
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        return prefill_attention(q, keys, values, self._page_table, self._tiles, **self._rules(layer, sinks))

    def plan_decode(self, rows: DecodeRows) -> None:
        self._rows, h, last = rows, self._heads, self._made[-1] if self._made else None
        sizes = (len(rows.slots), rows.splits, h.num_heads, h.num_kv_heads, h.head_dim)
        self._workspace = DecodeWorkspace(*sizes, self._page_table.device, within=last)
        if last is None or self._workspace.out is not last.out:
            self._made.append(self._workspace)

    def decode(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        assert self._rows is not None
        assert self._workspace is not None
        keys, values, rows = self._cache.keys(layer), self._cache.values(layer), self._rows
        return decode_attention(
            q, keys, values, self._page_table, rows.slots, rows.kv_lens, self._workspace, **self._rules(layer, sinks)
        )

    def _rules(self, layer: int, sinks: torch.Tensor | None) -> dict[str, Any]:
        """What turns scores into weights in `layer`."""
        h = self._heads
        return {"scale": h.scale, "window": h.window(layer), "softcap": h.softcap, "sinks": sinks}
