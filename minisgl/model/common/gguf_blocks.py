"""Block types of GGUF that a layer can compute with as they are stored: groups of 32 inputs in 4 or 8 bits with a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minisgl.model.common import memory, shard
from minisgl.model.common.weights import StoredWeight, Weight

GROUP = shard.GROUP  # inputs that share a scale
Q4_0, Q4_1, Q8_0 = 2, 3, 8  # ggml's numbers of the block types
BITS = memory.STORED_BITS
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # ggml's numbers of plain types


@dataclass(frozen=True, slots=True)
class Groups:
    """A matrix [N, 32 G] in groups: numbers u8[N, G, 32], scale and offset f16[N, G].

    A weight is scale * number + offset in 4 bits, and scale * (number - 128) in 8 bits, which have no offset.
    """

    numbers: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    def values(self) -> torch.Tensor:
        """The weights f32[N, 32 G]."""
        scale = self.scale.float()[..., None]
        if self.offset is None:
            return ((self.numbers.float() - 128) * scale).flatten(1)
        return (self.numbers.float() * scale + self.offset.float()[..., None]).flatten(1)


def from_gguf(raw: torch.Tensor, kind: int) -> Groups:
    """Stored rows u8[N, bytes] of the block type `kind` (Q4_0, Q4_1 or Q8_0) as groups of the same numbers.

    A block is an f16 scale, for Q4_1 an f16 minimum, then 32 i8, or 16 bytes with inputs 0-15 in the low halves and 16-31 in
    the high ones.
    """
    halves, body = _parts(raw, kind)
    scale = halves[..., 0].contiguous()
    if kind == Q8_0:
        return Groups(body ^ 128, scale, None)
    numbers = torch.cat((body & 15, body >> 4), -1)
    return Groups(numbers, scale, halves[..., 1].contiguous() if kind == Q4_1 else scale * -8)


def _parts(raw: torch.Tensor, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The f16 numbers at the head of each block, [N, G, 1 or 2], and the bytes behind them."""
    head, width = {Q4_0: (2, 18), Q4_1: (4, 20), Q8_0: (2, 34)}[kind]
    blocks = raw.view(raw.shape[0], -1, width)
    return blocks[..., :head].contiguous().view(torch.float16), blocks[..., head:]


def scales(raw: torch.Tensor, kind: int) -> torch.Tensor:
    """All floating-point numbers of stored rows u8[N, bytes] of a block type: f16[N, G, 1 or 2]."""
    return _parts(raw, kind)[0]


def stored_bits(weight: Weight) -> int:
    """Bits of the numbers that a file has of this matrix; 0 if they are of no type that layers compute with."""
    return BITS[weight.kind] if isinstance(weight, StoredWeight) else 0
