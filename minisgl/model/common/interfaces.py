"""What a decoder is built from, so that one definition of a model serves CPUs and GPUs.  Runs in the workers.

`Blocks` makes layers; `CpuBlocks` those of cpu/layers.py, `CudaBlocks` (cuda/layers.py) fused kernels.  What
passes between layers is up to the blocks: on a GPU a product may hand on its parts [parts, T, N] to be summed by the next
layer, or what is still to be scaled, and a norm float8 values with their scales.  Models only pass them on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from minisgl.config import ModelSpec
from minisgl.model.common.rope import Rope
from minisgl.model.cpu import layers

Rows = Any  # [T, N], or what these blocks understand in its place
Norm = Callable[[torch.Tensor, Rows | None], Rows]
Rotation = tuple[torch.Tensor | None, torch.Tensor | None]  # cos and sin; None: heads are not rotated
Positions = Callable[[torch.Tensor], Rotation]
NOT_ROTATED: Rotation = (None, None)


class Blocks(Protocol):
    """Makes the layers of a decoder."""

    def linear(
        self, *weights: torch.Tensor, bias: torch.Tensor | None = None, last: bool = False, whole: bool = False
    ) -> Callable[[Rows], Rows]:
        """x @ W.T + bias for weights [out_i, in] on top of each other.

        `last`: of the model; its result is plain rows, and so is it with `whole`.
        """

    def norm(self, weight: torch.Tensor, eps: float, last: bool = False) -> Norm:
        """RMSNorm of x, after a delta has been added to it in place.  weight: of x's dtype, or float32.

        `last`: no linear layer follows, or the last one; its result is plain rows.
        """

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> Callable[[Rows], Rows]:
        """act(x @ gate.T) * (x @ up.T) for weights [I, in]: the first half of a gated MLP.  See ModelSpec.activation."""

    def experts(
        self,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        top_k: int,
        normalise: bool,
        activation: str = "silu",
        biases: layers.Biases | None = None,
    ) -> Callable[[Rows], Rows]:
        """The weighted sum of what the `top_k` likeliest of E experts make of each row; `activation`: see ModelSpec.

        router [E, C]; gate_up [E, 2 I, C]; down [E, C, I].  The weights are the softmax over all experts, scaled to add up to
        one with `normalise`.  Takes plain rows.
        """

    def rope(self, spec: ModelSpec) -> Positions:
        """positions i64[T] -> what the attention backend needs to rotate the heads at them."""


class CpuBlocks:
    """Plain torch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def linear(
        self, *weights: torch.Tensor, bias: torch.Tensor | None = None, last: bool = False, whole: bool = False
    ) -> Callable[[Rows], Rows]:
        return layers.Linear(*weights, bias=bias)

    def norm(self, weight: torch.Tensor, eps: float, last: bool = False) -> Norm:
        return layers.RMSNorm(weight, eps)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> Callable[[Rows], Rows]:
        both = layers.Linear(gate, up)
        return lambda x: layers.act_mul(both(x), activation)

    def experts(
        self,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        top_k: int,
        normalise: bool,
        activation: str = "silu",
        biases: layers.Biases | None = None,
    ) -> Callable[[Rows], Rows]:
        return layers.Experts(router, gate_up, down, top_k=top_k, normalise=normalise, activation=activation, biases=biases)

    def rope(self, spec: ModelSpec) -> Positions:
        return Rope(spec, self._dtype).at
