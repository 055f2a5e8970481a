"""Makes a checkpoint of random weights, for benchmarks of a model's shape without its files.  Runs in the workers.

Normal with standard deviation 0.02, packed ones uniform with the same; norms are 1, biases 0.  A tensor's values depend on its
name alone, and where it is packed on the part of it, so every run has the same.  The generated text is noise; the speed is that
of real weights.
"""

from __future__ import annotations

import re
import zlib

import torch

from minisgl.model.common.shard import Range
from minisgl.model.common.weights import QuantizedWeight, Quants, Weight, dequantized

STD = 0.02
PACKED = {  # format -> bits, inputs of a group, a mean zero; the zeros of q4_k are no whole numbers
    "awq": (4, 128, 8.0),
    "gptq": (4, 128, 8.0),
    "q4_k": (4, 32, 7.5),
    "q8_0": (8, 32, 128.0),
}
_PRODUCT = re.compile(r".*_proj\.weight")


class RandomWeights:
    """The Weights interface of minisgl.model.checkpoint.loader without a file."""

    def __init__(self, dtype: torch.dtype, device: torch.device, packed: str = "") -> None:
        """packed: see `open_weights`."""
        self._dtype = dtype
        self._device = device
        self._packed = PACKED.get(packed)

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        if self._packed is not None and _PRODUCT.fullmatch(name):
            (first, last), (start, end) = rows or (0, shape[0]), cols or (0, shape[1])
            size = (last - first, end - start)
            seed = zlib.crc32(f"{name} {first} {start}".encode())
            return QuantizedWeight(
                size, lambda _: self._quants(size, seed), lambda: dequantized(self._quants(size, seed)).to(self._dtype)
            )
        if len(shape) == 1:
            length = rows[1] - rows[0] if rows else shape[0]
            return torch.full((length,), float(not name.endswith(".bias")), dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        full = torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0, STD, generator=generator)
        part = full[slice(*rows)] if rows else full[:, slice(*cols)] if cols else full
        return part if part is full else part.clone()  # a view would keep all of it alive

    def _quants(self, shape: tuple[int, int], seed: int) -> Quants:
        assert self._packed is not None
        bits, group, zero = self._packed
        least = int(2 * zero + 1 - (1 << bits))  # as far below the zero as the largest is above it
        generator = torch.Generator(self._device).manual_seed(seed)
        numbers = torch.empty(shape, dtype=torch.uint8, device=self._device).random_(least, 1 << bits, generator=generator)
        scales = torch.full((shape[0], -(-shape[1] // group)), STD * 12**0.5 / (1 << bits), device=self._device)
        return Quants(numbers, scales.half().float(), torch.full_like(scales, zero), bits, group)

    def finish(self) -> None:
        """Every tensor exists, so none can be left over."""
