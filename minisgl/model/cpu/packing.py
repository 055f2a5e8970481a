"""Packs matrices in 4 or 8 bits for the C kernels, in torch: the readable form of csrc/pack.c (csrc/linear.c has the format).

A matrix becomes `Groups`, numbers and scales in the usual order, which are then tiled.  GGUF's groups of Q8_0, Q4_0 and Q4_1
are taken as they are stored; all else is rounded: to 8 bits symmetrically, to 4 between the group's extremes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minisgl.model.common.gguf_blocks import GROUP, Groups
from minisgl.model.common.memory import LANES


def quantise(weight: torch.Tensor, bits: int) -> Groups:
    """Round f32[N, K] to groups; K is padded with zeros to a multiple of 32."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -k % GROUP)).view(n, -1, GROUP)
    if bits == 8:
        scale = (groups.abs().amax(-1) / 127).half()
        step = scale.float()[..., None]
        numbers = torch.where(step > 0, groups / step, 0).round_().clamp_(-127, 127) + 128
        return Groups(numbers.to(torch.uint8), scale, None)
    low, high = groups.amin(-1), groups.amax(-1)
    offset, scale = low.half(), ((high - low) / 15).half()
    step = scale.float()[..., None]
    numbers = torch.where(step > 0, (groups - offset.float()[..., None]) / step, 0).round_().clamp_(0, 15)
    return Groups(numbers.to(torch.uint8), scale, offset)


def tile(parts: Sequence[Groups]) -> torch.Tensor:
    """Matrices of the same width and bits on top of each other -> blocks u8[tiles, G, BLOCK_BYTES], the last tile padded."""
    numbers = torch.cat([p.numbers for p in parts])
    n, g, _ = numbers.shape
    pad = -n % LANES

    def lanes(x: torch.Tensor) -> torch.Tensor:  # f16[N, G] -> u8[tiles, G, 32]
        x = torch.nn.functional.pad(x, (0, 0, 0, pad)).view(-1, LANES, g).transpose(1, 2)
        return x.contiguous().view(torch.uint8)

    quads = torch.nn.functional.pad(numbers, (0, 0, 0, 0, 0, pad)).view(-1, LANES, g, 8, 4).permute(0, 2, 3, 1, 4)
    scale = lanes(torch.cat([p.scale for p in parts]))
    if parts[0].offset is None:
        return torch.cat((quads.flatten(2), scale), -1)
    both = quads[:, :, :4] | quads[:, :, 4:] << 4
    offset = lanes(torch.cat([p.offset for p in parts if p.offset is not None]))
    return torch.cat((both.flatten(2), scale, offset), -1)


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Tiles of gate and up in turns, as the C kernel reads them in a gated product."""
    return torch.stack((gate, up), 1).flatten(0, 1).contiguous()


def round_trip(x: torch.Tensor) -> torch.Tensor:
    """Rows f32[T, K] as the C kernel rounds them: two bytes for each input, a scale for each group of 32."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    numbers = groups * torch.where(most > 1e-30, 127 / most, 0)
    high = numbers.round()
    return ((high + ((numbers - high) * 254).round() / 254) * (most / 127)).flatten(1)
