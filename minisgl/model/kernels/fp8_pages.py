"""Widens pages of a float8 KV cache to the model's own dtype, for attention kernels that cannot read float8.

Bytes: one read and two written for each element, once a layer and step: at 16,384 tokens of 8 KV heads of 128, 100 MB or 25 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minisgl.model.kernels.pdl import begin, launch_options


@triton.jit
def _widen_pages(cache, pages, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per (page, block of its elements)."""
    begin(PDL)
    page = tl.load(pages + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(cache + page * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(out + tl.program_id(0).to(tl.int64) * SIZE + at, value.to(out.dtype.element_ty), mask=at < SIZE)


def widen_pages(cache: torch.Tensor, pages: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = cache[pages[i]], for float8 pages [P, 2, K, page_size, D], contiguous, and i32 numbers of pages."""
    size, block = cache[0].numel(), 4096
    _widen_pages[(len(pages), triton.cdiv(size, block))](
        cache, pages, out, SIZE=size, BLOCK=block, num_warps=8, **launch_options(cache)
    )
