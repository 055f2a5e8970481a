"""Makes a checkpoint of random weights, for benchmarks of a model's shape without its files.  Runs in the workers.

Normal with standard deviation 0.02; norms are 1, biases 0.  A tensor's values depend on its name alone, so every rank and
every run has the same.  The generated text is noise; the speed is that of real weights.
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
            length = rows[1] - rows[0] if rows else shape[0]
            return torch.full((length,), float(not name.endswith(".bias")), dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        full = torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0, STD, generator=generator)
        part = full[slice(*rows)] if rows else full[:, slice(*cols)] if cols else full
        return part if part is full else part.clone()  # a view would keep all of it alive

    def finish(self) -> None:
        """Every tensor exists, so none can be left over."""
