"""What a tensor was in its file, where the file has it quantised: so that it need not be rounded again.

`note` hangs a way to read the stored rows on the tensor that was made of them.  What is made of such a tensor has none.
The tensor may have a shape only (torch's meta device): then what it holds is read when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minisgl.model.cpu.packing import Q4_0, Q4_1, Q8_0, Groups, from_gguf

KINDS = {Q4_0: 4, Q4_1: 4, Q8_0: 8}  # their bits

FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # ggml's numbers of these types


def note(tensor: torch.Tensor, read: Callable[[], torch.Tensor], kind: int) -> None:
    """`read` gives the rows u8[N, bytes] of the GGUF type `kind` that `tensor` [N, K] was made of."""
    tensor.stored = (read, kind)  # type: ignore[attr-defined]


def stored_bits(tensor: torch.Tensor) -> int:
    """Of what the file has of this tensor; 0 if that is of no known kind."""
    stored = getattr(tensor, "stored", None)
    return 0 if stored is None else KINDS[stored[1]]


def stored_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the file has of a tensor that has been noted: its rows and their kind."""
    read, kind = tensor.stored  # type: ignore[attr-defined]
    return read(), kind


def stored_groups(tensor: torch.Tensor) -> Groups:
    """The same as numbers and scales."""
    return from_gguf(*stored_rows(tensor))


def values(tensor: torch.Tensor) -> torch.Tensor:
    """f32[N, K]."""
    return stored_groups(tensor).values() if tensor.is_meta else tensor.float()
