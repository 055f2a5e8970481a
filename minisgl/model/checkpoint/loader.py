"""Opens the weights of a checkpoint of any format; a rank reads the rows or columns that it owns.  Runs in the workers.

A model takes each tensor by its Hugging Face name and the shape it expects.  Files are memory-mapped, so the ranks of one
machine share the page cache.  Next to the tensors already taken, only a piece of one tensor is in private memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_weights import GGUFWeights
from minisgl.model.checkpoint.random_weights import RandomWeights
from minisgl.model.checkpoint.safetensors_weights import SafetensorsWeights
from minisgl.model.common.gguf_blocks import scales
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import Checkpoint, QuantizedWeight, StoredWeight, Weight, dense


class OnDevice:
    """A checkpoint whose tensors are copied to a device, one by one; QuantizedWeights when they are read."""

    def __init__(self, weights: Checkpoint, device: torch.device) -> None:
        self._weights, self._device = weights, device

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        weight = self._weights.take(name, shape, rows=rows, cols=cols)
        if isinstance(weight, QuantizedWeight):
            return replace(weight, dequantize=lambda: weight.dequantize().to(self._device))
        return dense(weight).to(self._device)

    def finish(self) -> None:
        self._weights.finish()


class Finite:
    """A checkpoint whose tensors are checked, because rounding would make ordinary numbers of NaN and infinity."""

    def __init__(self, weights: Checkpoint) -> None:
        self._weights = weights
        self.finish = weights.finish

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        """See `Weights`.  Raises UserError naming a tensor with NaN or infinity; a StoredWeight does when it is read."""
        weight = self._weights.take(name, shape, rows=rows, cols=cols)
        if isinstance(weight, torch.Tensor):
            _check(name, weight)
            return weight
        assert isinstance(weight, StoredWeight)
        return replace(weight, read=lambda: _checked_rows(name, weight))


def _checked_rows(name: str, weight: StoredWeight) -> torch.Tensor:
    raw = weight.read()
    _check(name, scales(raw, weight.kind))
    return raw


def _check(name: str, numbers: torch.Tensor) -> None:
    if not torch.stack(tuple(numbers.aminmax())).isfinite().all():
        raise UserError(f"tensor {name} has NaN or infinity, which cannot be quantised. Is the file damaged?")


def open_weights(
    spec: ModelSpec, dtype: torch.dtype, *, device: torch.device | None = None, lazy: bool = False, packed: str = ""
) -> Checkpoint:
    """Open the checkpoint that `spec` was read from; its tensors are of `dtype` and on `device`, by default the CPU.

    Quantised tensors are dequantised to float32, then rounded to `dtype`.

    lazy: the matrices of the linear layers keep their stored form.  Floating-point ones keep their dtype; those in a block type
    of minisgl.model.common.gguf_blocks are StoredWeights.

    packed: matrices of 4 and 8 bits, which have scales for groups of inputs, are QuantizedWeights.  "auto", or for random
    weights the format to make them in.
    """
    if spec.format == "random":
        return RandomWeights(dtype, device or torch.device("cpu"), packed)
    kind = GGUFWeights if spec.format == "gguf" else SafetensorsWeights
    weights = kind(spec, dtype, lazy, packed=packed != "")
    if lazy:
        return Finite(weights)
    return weights if device is None else OnDevice(weights, device)
