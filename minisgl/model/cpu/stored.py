"""What a tensor was in its file, where the file has it quantised: so that it need not be rounded again.

`note` hangs the stored rows on the tensor that was read from them.  Whatever is made of such a tensor does not have them.
"""

from __future__ import annotations

import torch

from minisgl.model.cpu.packed import Q4_0, Q4_1, Q8_0, Groups, from_gguf

KINDS = (Q4_0, Q4_1, Q8_0)


def note(tensor: torch.Tensor, raw: torch.Tensor, kind: int) -> torch.Tensor:
    """`tensor` [N, K], and with it the rows u8[N, bytes] of the GGUF type `kind` that it was read from."""
    tensor.stored = (raw, kind)  # type: ignore[attr-defined]
    return tensor


def stored_groups(tensor: torch.Tensor) -> Groups | None:
    """The numbers and scales that the file has of this tensor, None if it has none of a known kind."""
    stored = getattr(tensor, "stored", None)
    return None if stored is None else from_gguf(*stored)
