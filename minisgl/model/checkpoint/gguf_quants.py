"""Reads blocks of GGUF as whole numbers with scales and zeros, for GPUs, which multiply by them.  Runs in the workers.

Layouts: ggml-common.h and dequantize_row_* of ggml-quants.c (https://github.com/ggml-org/ggml).  A block type with a minimum
has w = d * number - m, so that its zero is m / d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from minisgl.model.common.weights import Quants


class Kind(NamedTuple):
    """A block type: inputs that share a scale, and what reads rows u8[N, bytes]."""

    group: int
    read: Callable[[torch.Tensor], Quants]


def _halves(raw: torch.Tensor) -> torch.Tensor:
    """f16 in u8[..., 2 n] -> f32[..., n]."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: torch.Tensor) -> torch.Tensor:
    """u8[..., n] -> u8[..., 2 n]: the low halves, then the high ones."""
    return torch.cat((raw & 15, raw >> 4), -1)


def _cut(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The last dimension as several."""
    return x.reshape(*x.shape[:-1], *sizes)


def _quants(numbers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int) -> Quants:
    return Quants(numbers.flatten(1), scales.flatten(1), zeros.flatten(1), bits, group)


def _with_minima(numbers: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, bits: int, group: int) -> Quants:
    """scale * number - minimum.  Without a scale all weights of the group are minus the minimum: 1 * (0 - minimum)."""
    constant = scales == 0
    numbers = numbers.masked_fill(constant.repeat_interleave(group, -1).view(numbers.shape), 0)
    scales = torch.where(constant, minima, scales)
    zeros = torch.where(constant, (minima != 0).float(), minima / torch.where(scales == 0, 1, scales))
    return _quants(numbers, scales, zeros, bits, group)


def _q4_0(raw: torch.Tensor) -> Quants:
    blocks = raw.view(len(raw), -1, 18)
    scales = _halves(blocks[..., :2])
    return _quants(_nibbles(blocks[..., 2:]), scales, torch.full_like(scales, 8), 4, 32)


def _q4_1(raw: torch.Tensor) -> Quants:
    blocks = raw.view(len(raw), -1, 20)
    return _with_minima(_nibbles(blocks[..., 4:]), _halves(blocks[..., :2]), -_halves(blocks[..., 2:4]), 4, 32)


def _q8_0(raw: torch.Tensor) -> Quants:
    blocks = raw.view(len(raw), -1, 34)
    scales = _halves(blocks[..., :2])
    return _quants(blocks[..., 2:] ^ 128, scales, torch.full_like(scales, 128), 8, 32)


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima f32[..., 8] of the eight parts of a super-block: two halves times numbers of 6 bits in 12 bytes."""
    both, packed = _halves(blocks[..., :4]), blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | (second >> 6) << 4), -1)
    return both[..., :1] * scales, both[..., 1:] * minima


def _q4_k(raw: torch.Tensor) -> Quants:
    blocks = raw.view(len(raw), -1, 144)
    numbers = _nibbles(_cut(blocks[..., 16:], 4, 32)).flatten(2)  # 64 inputs of each 32 bytes
    return _with_minima(numbers, *_k_scales(blocks), 4, 32)


def _q5_k(raw: torch.Tensor) -> Quants:
    blocks = raw.view(len(raw), -1, 176)
    low = _cut(_nibbles(_cut(blocks[..., 48:], 4, 32)), 2, 32)  # [..., 4, 2, 32]
    bit = torch.arange(8, dtype=torch.uint8, device=raw.device).view(4, 2, 1)
    high = blocks[..., None, None, 16:48] >> bit & 1
    return _with_minima((low | high << 4).flatten(2), *_k_scales(blocks), 8, 32)


def _q6_k(raw: torch.Tensor) -> Quants:
    blocks = raw.view(len(raw), -1, 210)
    low = _cut(blocks[..., :128], 2, 1, 64)
    low = _cut(torch.cat((low & 15, low >> 4), -2), 2, 32)  # [..., 2, 2, 2, 32]
    bit = torch.arange(0, 8, 2, dtype=torch.uint8, device=raw.device).view(2, 2, 1)
    high = _cut(blocks[..., 128:192], 2, 1, 1, 32) >> bit & 3
    scales = _halves(blocks[..., 208:]) * blocks[..., 192:208].contiguous().view(torch.int8).float()
    return _quants((low | high << 4).flatten(2), scales, torch.full_like(scales, 32), 8, 16)


QUANTS = {  # by ggml's number of the type
    2: Kind(32, _q4_0), 3: Kind(32, _q4_1), 8: Kind(32, _q8_0), 12: Kind(32, _q4_k), 13: Kind(32, _q5_k), 14: Kind(16, _q6_k),
}  # fmt: skip
