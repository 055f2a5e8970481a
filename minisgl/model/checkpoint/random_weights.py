"""A checkpoint of random weights: for benchmarks of a model's shape where its files are not at hand.  Runs in the workers.

Normal with standard deviation 0.02, norms 1, biases 0.  A tensor's values follow from its name alone, so every rank and every
run has the same.  The text that comes out is noise; speed does not depend on it.
"""

from __future__ import annotations

import zlib

import torch

from minisgl.model.common.shard import Range

STD = 0.02


class RandomWeights:
    """The Weights interface of minisgl.model.checkpoint.loader without a file."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        if len(shape) == 1:
            mine = rows[1] - rows[0] if rows else shape[0]
            return torch.full((mine,), float(not name.endswith(".bias")), dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0, STD, generator=generator)
        part = whole[slice(*rows)] if rows else whole[:, slice(*cols)] if cols else whole
        return part if part is whole else part.clone()  # a view would keep the whole alive

    def finish(self) -> None:
        """Nothing can be left over."""
