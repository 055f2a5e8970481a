"""What a tensor was in its file, where the file has it quantised: so that it need not be rounded again.

`note` hangs a way to read the stored rows on the tensor that was made of them.  What is made of such a tensor has none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minisgl.model.cpu.packed import Q4_0, Q4_1, Q8_0, Groups, from_gguf

KINDS = (Q4_0, Q4_1, Q8_0)


def note(tensor: torch.Tensor, read: Callable[[], torch.Tensor], kind: int) -> None:
    """`read` gives the rows u8[N, bytes] of the GGUF type `kind` that `tensor` [N, K] was made of."""
    tensor.stored = (read, kind)  # type: ignore[attr-defined]


def stored_groups(tensor: torch.Tensor) -> Groups | None:
    """The numbers and scales that the file has of this tensor, None if it has none of a known kind."""
    stored = getattr(tensor, "stored", None)
    return None if stored is None else from_gguf(stored[0](), stored[1])
