"""Tells an observer how far the loading of a model is.  Runs in the workers."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from minisgl.config import ModelSpec
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import Checkpoint, OpenWeights, Weight

# Called with the number of layers that are loaded; the last time with all of them, when the whole model is.
Observer = Callable[[int], None]

_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Observed:
    """A checkpoint whose layers are counted.  A model takes them in order: who takes a tensor of layer i has all before it."""

    def __init__(self, weights: Checkpoint, layers: int, observer: Observer) -> None:
        self._weights, self._layers, self._observer = weights, layers, observer
        self._at = 0

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        if (found := _LAYER.search(name)) is not None and (layer := int(found[1])) > self._at:
            self._at = layer
            self._observer(layer)
        return self._weights.take(name, shape, rows=rows, cols=cols)

    def finish(self) -> None:
        self._weights.finish()
        self._observer(self._layers)


def observed(open_weights: OpenWeights, observer: Observer) -> OpenWeights:
    """`open_weights`, with its checkpoints observed."""

    def opened(
        spec: ModelSpec, dtype: torch.dtype, *, device: torch.device | None = None, lazy: bool = False, packed: str = ""
    ) -> Observed:
        observer(0)
        return Observed(open_weights(spec, dtype, device=device, lazy=lazy, packed=packed), spec.num_layers, observer)

    return opened
