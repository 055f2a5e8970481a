"""Converts tensors of a checkpoint piece by piece.  Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from minisgl.model.common.shard import Range

PIECE = 1 << 20  # elements dequantised at a time: their float32 values and temporaries are small next to a shard


def in_pieces(
    read: Callable[[Range], torch.Tensor], rows: Range, width: int, dtype: torch.dtype, multiple: int = 1
) -> torch.Tensor:
    """[end - start, width] of `dtype`, filled by calls of `read` for some rows at a time, a multiple of `multiple`."""
    start, end = rows
    out = torch.empty(end - start, width, dtype=dtype)
    step = max(PIECE // max(width, 1) // multiple, 1) * multiple
    for at in range(start, end, step):
        stop = min(at + step, end)
        out[at - start : stop - start] = read((at, stop))
    return out


def own(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy that keeps no larger storage alive, as a slice would."""
    out = part.to(dtype).contiguous()
    return out if out.untyped_storage().nbytes() == out.nbytes else out.clone()
