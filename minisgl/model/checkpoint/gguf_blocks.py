"""What a tensor was in its file, where the file has it quantised: so that it need not be rounded again.

`note` hangs a way to read the stored rows on the tensor that was made of them.  What is made of such a tensor has none.
The tensor may have a shape only (torch's meta device): then what it holds is read when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

GROUP = 32  # inputs that share a scale
Q4_0, Q4_1, Q8_0 = 2, 3, 8  # ggml's numbers of these types
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


@dataclass(frozen=True, slots=True)
class Groups:
    """[N, G, 32] numbers u8, of them w = scale * q + offset (4 bits) or scale * (q - 128) (8 bits); scale, offset f16[N, G]."""

    numbers: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    @property
    def bits(self) -> int:
        return 8 if self.offset is None else 4

    def values(self) -> torch.Tensor:
        """The weights that these stand for, f32[N, 32 G]."""
        if self.offset is None:
            out = (self.numbers.float() - 128) * self.scale.float()[..., None]
        else:
            out = self.numbers.float() * self.scale.float()[..., None] + self.offset.float()[..., None]
        return out.flatten(1)


def from_gguf(raw: torch.Tensor, kind: int) -> Groups:
    """Stored rows u8[N, bytes] of Q4_0, Q4_1 or Q8_0 -> the same numbers.

    Block: f16 scale, for Q4_1 f16 minimum, then 32 i8, or 16 bytes with inputs 0-15 in the low halves and 16-31 in the high.
    """
    head, width = {Q4_0: (2, 18), Q4_1: (4, 20), Q8_0: (2, 34)}[kind]
    blocks = raw.view(raw.shape[0], -1, width)
    halves = blocks[..., :head].contiguous().view(torch.float16)
    scale, body = halves[..., 0].contiguous(), blocks[..., head:]
    if kind == Q8_0:
        return Groups(body ^ 128, scale, None)
    numbers = torch.cat((body & 15, body >> 4), -1)
    return Groups(numbers, scale, halves[..., 1].contiguous() if kind == Q4_1 else scale * -8)
