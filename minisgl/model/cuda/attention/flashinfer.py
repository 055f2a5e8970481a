"""Attends with FlashInfer's kernels, compiled at their first use or ahead of time (`minisgl prebuild`).  Runs in the workers.

Prefill: ragged queries over paged keys, causal from the end, so that a cached prefix needs neither a second call nor a merge.
On Hopper it uses FA3, which is 1.3 to 1.9 times as fast as FA2 on long prompts.  FA3 has no kernel for 16-bit queries over a
float8 cache, so the pages of a step are first widened into a scratch cache, layer by layer, which costs little compared with
attention itself.  FA2 reads the float8 cache where a step's contexts do not fit the scratch, and does everything on other GPUs.

Decode: the kernel for CUDA cores where it supports the number of query heads per KV head, otherwise the one of prefill.  Each
step is planned on the host, so it is not captured in graphs.  The Triton backend needs no plan and is faster
(docs/benchmarks.md), so this one decodes only with `--attention-backend flashinfer`.

FlashInfer's `plan` fills a pinned host buffer and copies it asynchronously.  Planning again before that copy has run would
corrupt it, so `_plan` first waits for an event after the copies.  That wait is short: plan k is published after the result of
step k - lag is known, and the copies of the step between stand right behind it in the stream.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from minisgl.arrays import I32
from minisgl.model.cuda.attention.base import AttentionSpec, Chunks, DecodeRows
from minisgl.model.cuda.attention.kv_cache import KVCache
from minisgl.model.cuda.attention.requirements import WIDENED_BYTES, WORKSPACE_BYTES, flashinfer_lacks
from minisgl.model.cuda.flashinfer.modules import CUDA_CORE_GROUPS
from minisgl.model.kernels.fp8_pages import widen_pages
from minisgl.model.kernels.uploads import upload


class FlashInferAttention:
    """A Backend."""

    graphs: ClassVar[bool] = False  # its plans are made on the host for every step

    def __init__(self, heads: AttentionSpec, cache: KVCache, page_table: torch.Tensor) -> None:
        import flashinfer

        self._heads, self._cache, self._device = heads, cache, page_table.device
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        fa3, widen = heads.capability == 90, heads.kv_dtype != heads.dtype
        # A window is part of a plan, so layers with different ones have a wrapper each.
        windows = set(heads.windows) or {0}

        def wrappers(backend: str) -> dict[int, Any]:
            return {w: flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND", backend=backend) for w in windows}

        self._prefill = wrappers("fa3" if fa3 and not widen else "fa2")
        self._widening = wrappers("fa3") if fa3 and widen else {}
        self._scratch = cache.scratch(WIDENED_BYTES if fa3 and widen else 0, heads.dtype)
        self._widened: torch.Tensor | None = None  # the pages of this step that `prefill` widens
        self._decode: dict[int, Any] = {
            window: flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "HND", use_tensor_cores=heads.group not in CUDA_CORE_GROUPS
            )
            for window in windows
        }
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # after the copies of the latest plan

    @classmethod
    def refuses(cls, heads: AttentionSpec, task: str) -> str | None:
        dtype = str(heads.dtype).removeprefix("torch.")
        return flashinfer_lacks(heads.head_dim, dtype, heads.capability, sinks=heads.sinks)

    def plan_prefill(self, chunks: Chunks) -> None:
        starts = torch.zeros(len(chunks.chunk_lens) + 1, dtype=torch.int32)
        starts[1:] = torch.from_numpy(np.cumsum(chunks.chunk_lens))
        pages = int(np.sum(-(-chunks.kv_lens // self._cache.page_size)))
        widen = bool(self._widening) and pages <= len(self._scratch)
        indices = self._plan(
            self._widening if widen else self._prefill, (starts,), chunks.kv_lens, chunks.pages, widened=widen, causal=True
        )
        self._widened = indices if widen else None

    def prefill(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        window = self._heads.window(layer)
        out = torch.empty_like(q)  # FlashInfer would fill its own with zeros first
        if self._widened is None:
            self._prefill[window].run(q, (self._cache.keys(layer), self._cache.values(layer)), out=out)
        else:
            widen_pages(self._cache.pages(layer), self._widened, self._scratch)
            self._widening[window].run(q, (self._scratch[:, 0], self._scratch[:, 1]), out=out)
        return out

    def plan_decode(self, rows: DecodeRows) -> None:
        if rows.host_kv_lens is None or rows.host_pages is None:
            raise RuntimeError("FlashInfer plans decode rows on the host")
        self._plan(self._decode, (), rows.host_kv_lens, rows.host_pages)

    def decode(self, q: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> torch.Tensor:
        wrapper = self._decode[self._heads.window(layer)]
        out: torch.Tensor = wrapper.run(q, (self._cache.keys(layer), self._cache.values(layer)))
        return out

    def _plan(
        self,
        wrappers: dict[int, Any],
        first: tuple[torch.Tensor, ...],
        kv_lens: I32,
        pages: I32,
        *,
        widened: bool = False,
        **more: Any,
    ) -> torch.Tensor:
        """Plan rows of kv_lens[r] tokens in `pages`; `first` and `more`: arguments that the two kinds of wrappers do not share.

        Returns the page numbers of all rows, on the device.  `widened`: the rows will be read from the scratch cache, which
        holds these pages in their order.
        """
        indptr, indices, last = paging(kv_lens, pages, self._cache.page_size)
        h, on_device = self._heads, upload(indices, self._device)
        planned = torch.arange(len(indices), dtype=torch.int32, device=self._device) if widened else on_device
        self._copied.synchronize()
        for window, wrapper in wrappers.items():
            wrapper.plan(
                *first,
                torch.from_numpy(indptr),
                planned,
                torch.from_numpy(last),
                h.num_heads,
                h.num_kv_heads,
                h.head_dim,
                self._cache.page_size,
                q_data_type=h.dtype,
                kv_data_type=h.dtype if widened else h.kv_dtype,
                sm_scale=h.scale or None,
                window_left=window - 1,  # tokens before the query's own; -1: all
                logits_soft_cap=h.softcap or None,
                **more,
            )
        self._copied.record()
        return on_device


def paging(kv_lens: npt.NDArray[np.int32], pages: I32, page_size: int) -> tuple[I32, I32, I32]:
    """(indptr i32[rows + 1], page numbers of all rows on end, tokens in each row's last page)."""
    counts = -(-kv_lens // page_size)
    mine = np.arange(pages.shape[1]) < counts[:, None]
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return indptr, pages[mine].astype(np.int32), (kv_lens - (counts - 1) * page_size).astype(np.int32)
