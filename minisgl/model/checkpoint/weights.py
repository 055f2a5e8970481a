"""Declares `Weights`, the interface of an open checkpoint, and converts tensors piece by piece.  Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from minisgl.model.common.shard import Range

PIECE = 1 << 20  # elements dequantised at a time: their float32 values and temporaries are small next to a shard


class Weights(Protocol):
    """An open checkpoint."""

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        """Tensor `name`, whose full shape must be `shape`; only `rows` (dim 0) or `cols` (dim 1) of it if given.

        Contiguous, in the dtype that the weights were opened with.  Raises UserError naming a missing or mis-shaped tensor.
        """

    def finish(self) -> None:
        """Raise UserError if a tensor was not taken: the checkpoint then holds another model than its metadata says."""


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
