"""What all formats of checkpoints share: the interface, reading in pieces, and the complaints.  Runs in the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from minisgl.errors import UserError
from minisgl.model.common.shard import Range

PIECE = 1 << 20  # elements that are dequantised at a time: their float32 values and temporaries are small beside a shard


def in_pieces(
    read: Callable[[Range], torch.Tensor], rows: Range, width: int, dtype: torch.dtype, multiple: int = 1
) -> torch.Tensor:
    """[end - start, width] of `dtype`, filled with what `read` says of some rows at a time, a multiple of `multiple`."""
    start, end = rows
    out = torch.empty(end - start, width, dtype=dtype)
    step = max(PIECE // max(width, 1) // multiple, 1) * multiple
    for at in range(start, end, step):
        stop = min(at + step, end)
        out[at - start : stop - start] = read((at, stop))
    return out


def own(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of exactly the bytes it needs: a slice may share the storage of the whole."""
    out = part.to(dtype).contiguous()
    return out if out.untyped_storage().nbytes() == out.nbytes else out.clone()


def check_shape(path: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError naming the tensor and both shapes."""
    if found != expected:
        raise UserError(f"--model {path}: {name} has shape {found}, the model's sizes make it {expected}.")


def missing(path: str, name: str) -> UserError:
    return UserError(f"--model {path}: the checkpoint lacks the tensor {name}. Is the download complete?")


def extra(path: str, names: Iterable[str]) -> UserError:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(
        f"--model {path}: the checkpoint holds tensors that this architecture has no place for: {', '.join(names[:3])}{more}."
    )
