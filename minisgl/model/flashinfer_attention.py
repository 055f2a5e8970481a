"""Paged attention on NVIDIA GPUs through FlashInfer.  Runs in the workers; `flashinfer` is imported when a backend is made.

The cache has the layout of TorchAttention, [layer, page, page_size, 2, K, D]: one scatter writes a token's key and value, and
FlashInfer reads keys and values as two strided views (NHD).

A step with prompt chunks runs the chunks through the prefill kernels (causal, ragged queries over paged keys, so a cached
prefix needs nothing special) and the decode rows through the decode kernels, each planned on the host beforehand.  A step of
decodes only is planned into fixed buffers, so that one CUDA graph per batch size can be replayed.

FlashInfer's `plan` fills a pinned host buffer and copies it asynchronously; planning again before that copy has run would
corrupt it, so an event after the copies is waited for first.  That wait is short: plan k is published after the result of
step k - lag is known, and the copies of the step between stand right behind it in the stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minisgl.model.cuda_kernels import rope_and_store
from minisgl.model.layers import QKNorm
from minisgl.model.state import Batch

WORKSPACE_BYTES = 256 << 20  # of FlashInfer, for partial results; shared by all wrappers (one stream, one after the other)


class FlashInferAttention:
    """An AttentionBackend.  Page `num_pages` is a spare one, which padding rows write to; `max_rows`: most decode rows."""

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
        device: torch.device,
        max_rows: int,
        max_pages_per_row: int,
    ) -> None:
        import flashinfer

        self._fi = flashinfer
        self.page_size, self.num_pages = page_size, num_pages
        self._heads, self._kv_heads, self._dim = num_heads, num_kv_heads, head_dim
        self._dtype, self._device = dtype, device
        cache = torch.zeros(num_layers, num_pages + 1, page_size, 2, num_kv_heads, head_dim, dtype=dtype, device=device)
        self._by_token = cache.view(num_layers, (num_pages + 1) * page_size, 2, num_kv_heads, head_dim)
        self._keys, self._values = cache[:, :, :, 0], cache[:, :, :, 1]
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # The CUDA-core kernel handles small groups of query heads best and some groups not at all.
        self._tensor_cores = num_heads // num_kv_heads not in (1, 2, 4)
        self._prefill_wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
        self._decode_wrapper = self._new_decode_wrapper()
        self._indices = torch.zeros(max_rows * max_pages_per_row, dtype=torch.int32, device=device)
        self._graph_wrappers: dict[int, Any] = {}
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # after the copies of the latest plan
        self._kv_index = torch.empty(0, dtype=torch.int64, device=device)
        self._prefill: Any = None
        self._decode: Any = None
        self._split = 0  # tokens of the step that belong to prompt chunks

    # ---------------- planning (host)
    def prepare(self, batch: Batch) -> None:
        """Plan a step that is not replayed from a graph."""
        chunks = len(batch.chunk_lens)
        self._split = int(batch.chunk_lens.sum())
        self._kv_index = self.upload(batch.kv_index)
        self._prefill = self._decode = None
        self._copied.synchronize()
        if chunks:
            self._prefill = self._prefill_wrapper
            indptr, indices, last = self._paging(batch.kv_lens[:chunks], batch.pages[:chunks])
            starts = torch.from_numpy(np.concatenate(([0], np.cumsum(batch.chunk_lens))).astype(np.int32))
            self._prefill.plan(
                starts,
                indptr,
                self.upload(indices),
                last,
                self._heads,
                self._kv_heads,
                self._dim,
                self.page_size,
                causal=True,
                q_data_type=self._dtype,
            )
        if len(batch.kv_lens) > chunks:
            self._decode = self._decode_wrapper
            self._plan_decode(self._decode, batch.kv_lens[chunks:], batch.pages[chunks:])
        self._copied.record()

    def prepare_graph(self, rows: int, kv_lens: np.ndarray, pages: np.ndarray, kv_index: torch.Tensor) -> None:
        """Plan a replay for `rows` decode rows (padding included); `kv_index` is the graph's own buffer."""
        if rows not in self._graph_wrappers:
            self._graph_wrappers[rows] = self._new_decode_wrapper(rows)
        self._prefill, self._split = None, 0
        self._decode = self._graph_wrappers[rows]
        self._kv_index = kv_index
        self._copied.synchronize()
        self._plan_decode(self._decode, kv_lens, pages)
        self._copied.record()

    def _plan_decode(self, wrapper: Any, kv_lens: np.ndarray, pages: np.ndarray) -> None:
        indptr, indices, last = self._paging(kv_lens, pages)
        wrapper.plan(
            indptr,
            self.upload(indices),
            last,
            self._heads,
            self._kv_heads,
            self._dim,
            self.page_size,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )

    def _paging(self, kv_lens: np.ndarray, pages: np.ndarray) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """(indptr i32[rows + 1] on the host, page numbers i32, tokens in each row's last page i32[rows] on the host)"""
        counts = -(-kv_lens // self.page_size)
        mine = np.arange(pages.shape[1]) < counts[:, None]
        indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        last = kv_lens - (counts - 1) * self.page_size
        return torch.from_numpy(indptr), pages[mine].astype(np.int32), torch.from_numpy(last.astype(np.int32))

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """To the device, without waiting for it."""
        return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(self._device, non_blocking=True)

    def _new_decode_wrapper(self, graph_rows: int = 0) -> Any:
        if not graph_rows:
            return self._fi.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=self._tensor_cores)
        return self._fi.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._tensor_cores,
            paged_kv_indptr_buffer=torch.zeros(graph_rows + 1, dtype=torch.int32, device=self._device),
            paged_kv_indices_buffer=self._indices,
            paged_kv_last_page_len_buffer=torch.ones(graph_rows, dtype=torch.int32, device=self._device),
        )

    # ---------------- running (device)
    def __call__(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, qk_norm: QKNorm | None
    ) -> torch.Tensor:
        if qk_norm is not None:
            raise NotImplementedError("models that normalise queries and keys (Qwen3) do not run on a GPU yet")
        q = rope_and_store(qkv, cos, sin, self._by_token[layer], self._kv_index, num_heads=self._heads)
        cache = (self._keys[layer], self._values[layer])
        parts = []
        if self._prefill is not None:
            parts.append(self._prefill.run(q[: self._split], cache))
        if self._decode is not None:
            parts.append(self._decode.run(q[self._split :], cache))
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        return out.view(len(q), self._heads * self._dim)
