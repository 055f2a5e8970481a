"""Weights as a model takes them from a checkpoint: tensors, or matrices that stay quantised as their file stores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minisgl.config import ModelSpec
from minisgl.model.common.shard import Range


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A matrix [N, K] that is read from its file when a layer is made of it."""

    shape: tuple[int, int]
    kind: int  # ggml's number of the block type, see minisgl.model.common.gguf_blocks
    read: Callable[[], torch.Tensor]  # the rows as stored, u8[N, bytes]
    dequantize: Callable[[], torch.Tensor]  # [N, K] in the dtype that the checkpoint was opened with


@dataclass(frozen=True, slots=True)
class Quants:
    """A matrix [N, K] of whole numbers: a weight is scale * (number - zero), with both for each output and group of inputs."""

    numbers: torch.Tensor  # u8[N, K]
    scales: torch.Tensor  # f32[N, G]
    zeros: torch.Tensor  # f32[N, G]
    bits: int  # 4 or 8
    group: int  # neighbouring inputs; the last group may be shorter
    order: torch.Tensor | None = None  # i64[K]: column i belongs to input order[i]; None: i


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [N, K] that a GPU multiplies by as it is stored, or dequantises; read when a layer is made of it."""

    shape: tuple[int, int]
    quants: Callable[[torch.device], Quants]
    dequantize: Callable[[], torch.Tensor]  # [N, K] in the dtype that the checkpoint was opened with


Weight = torch.Tensor | StoredWeight | QuantizedWeight


class Weights(Protocol):
    """An open checkpoint."""

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        """Tensor `name`, whose full shape must be `shape`, or only `rows` (dim 0) or `cols` (dim 1) of it.

        Contiguous, in the dtype that the checkpoint was opened with.  Only a checkpoint opened as `lazy` returns StoredWeights,
        only one opened as `packed` QuantizedWeights.
        Raises UserError naming a missing or mis-shaped tensor.
        """


class Checkpoint(Weights, Protocol):
    """An open checkpoint, as its opener sees it."""

    def finish(self) -> None:
        """Raise UserError if the checkpoint holds a tensor that the model did not take: it is then another model."""


class OpenWeights(Protocol):
    """Opens the checkpoint of a spec: minisgl.model.checkpoint.loader.open_weights, for runners that know no file format."""

    def __call__(
        self, spec: ModelSpec, dtype: torch.dtype, *, device: torch.device | None = None, lazy: bool = False, packed: str = ""
    ) -> Checkpoint: ...


def dense(weight: Weight) -> torch.Tensor:
    """The matrix as a tensor."""
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


def stacked(weights: Sequence[Weight]) -> torch.Tensor:
    """Matrices [N_i, K] on top of each other as one tensor."""
    return torch.cat([dense(w) for w in weights]) if len(weights) > 1 else dense(weights[0])


def dequantized(q: Quants) -> torch.Tensor:
    """f32[N, K]."""
    width = q.numbers.shape[1]
    scales, zeros = (x.repeat_interleave(q.group, 1)[:, :width] for x in (q.scales, q.zeros))
    values = (q.numbers.float() - zeros) * scales
    return values if q.order is None else torch.empty_like(values).index_copy_(1, q.order, values)
