"""Holds the paged KV cache of one rank on its GPU.  Runs in the workers."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn


class KVCache:
    """[layer, page, keys and values, K, page_size, D]: the tokens of a page are contiguous for each head.

    There is one page more than the scheduler knows, number `num_pages`: padding rows of graphs write there.  The cache starts
    as zeros, because FlashInfer reads full pages and multiplies what lies behind a row's end by zero: it must be finite.
    """

    def __init__(
        self,
        *,
        layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.dtype = dtype
        shape = (layers, num_pages + 1, 2, kv_heads, page_size, head_dim)
        raw = torch.zeros(shape, dtype=torch.uint8 if dtype == FP8 else dtype, device=device)
        self._cache = raw.view(dtype)

    def pages(self, layer: int) -> torch.Tensor:
        """[pages, 2, K, page_size, D] of one layer."""
        return self._cache[layer]

    def scratch(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed pages like those of one layer, of another dtype, as many as `size` bytes hold."""
        page = self._cache.shape[2:]
        return torch.zeros(size // (page.numel() * dtype.itemsize), *page, dtype=dtype, device=self._cache.device)

    def keys(self, layer: int) -> torch.Tensor:
        """[pages, K, page_size, D] of one layer."""
        return self._cache[layer, :, 0]

    def values(self, layer: int) -> torch.Tensor:
        """[pages, K, page_size, D] of one layer."""
        return self._cache[layer, :, 1]
