"""What a decoder is built from, so that one definition of a model serves CPUs and GPUs.  Runs in the workers.

`Blocks` makes layers; `CpuBlocks` those of minisgl.model.layers, `CudaBlocks` (minisgl.model.cuda.blocks) fused kernels.  What
passes between layers is up to the blocks: on a GPU a product may hand on its parts [parts, T, N] to be summed by the next
layer, and a norm float8 values with their scales.  Models only pass them on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from minisgl.config import ModelSpec
from minisgl.model import layers

Rows = Any  # [T, N], or what these blocks understand in its place
Norm = Callable[[torch.Tensor, Rows | None], Rows]
Positions = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Blocks(Protocol):
    """Makes the layers of a decoder."""

    def linear(self, *weights: torch.Tensor, last: bool = False) -> Callable[[Rows], Rows]:
        """x @ W.T for weights [out_i, in] on top of each other; `last`: of the model, whose result is plain rows."""

    def norm(self, weight: torch.Tensor, eps: float, last: bool = False) -> Norm:
        """RMSNorm of x, after a delta has been added to it in place; `last`: what follows is the last linear layer."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> Callable[[Rows], Rows]:
        """silu(x @ gate.T) * (x @ up.T) for weights [I, in]: the first half of a gated MLP."""

    def rope(self, spec: ModelSpec) -> Positions:
        """positions i64[T] -> what the attention backend needs to rotate the heads at them."""


class CpuBlocks:
    """Plain torch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def linear(self, *weights: torch.Tensor, last: bool = False) -> Callable[[Rows], Rows]:
        return layers.Linear(*weights)

    def norm(self, weight: torch.Tensor, eps: float, last: bool = False) -> Norm:
        return layers.RMSNorm(weight, eps)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> Callable[[Rows], Rows]:
        both = layers.Linear(gate, up)
        return lambda x: layers.silu_mul(both(x))

    def rope(self, spec: ModelSpec) -> Positions:
        return layers.Rope(spec, self._dtype).at
