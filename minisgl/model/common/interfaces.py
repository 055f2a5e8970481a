"""What a decoder is built from, so that one definition of a model serves CPUs and GPUs.  Runs in the workers.

`LayerFactory` makes layers; `CpuLayers` those of cpu/layers.py, `CudaLayers` (cuda/layers.py) fused kernels.  What
passes between layers is up to the blocks: on a GPU a product may hand on its parts [parts, T, N] to be summed by the next
layer, or what is still to be scaled, and a norm float8 values with their scales.  Models only pass them on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from minisgl.config import ModelSpec

Activations = Any  # [T, N], or what these blocks understand in its place
Norm = Callable[[torch.Tensor, Activations | None], Activations]
Rotation = tuple[torch.Tensor | None, torch.Tensor | None]  # cos and sin; None: heads are not rotated
Positions = Callable[[torch.Tensor], Rotation]
NOT_ROTATED: Rotation = (None, None)


class LayerFactory(Protocol):
    """Makes the layers of a decoder."""

    def linear(
        self, *weights: torch.Tensor, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> Callable[[Activations], Activations]:
        """x @ W.T + bias for weights [out_i, in] on top of each other.

        `no_partial_sums`: return the summed output, because the next operation cannot add parts.  `is_lm_head`: the output
        is the logits, which are never split into partial sums and never computed in float8.
        """

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> Norm:
        """RMSNorm of x, after a delta has been added to it in place.  weight: of x's dtype, or float32.

        `plain_output`: no linear layer follows, or the LM head does; the result is a tensor [T, C].
        """

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> Callable[[Activations], Activations]:
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
        biases: Biases | None = None,
    ) -> Callable[[Activations], Activations]:
        """The weighted sum of what the `top_k` likeliest of E experts make of each row; `activation`: see ModelSpec.

        router [E, C]; gate_up [E, 2 I, C]; down [E, C, I].  The weights are the softmax over all experts, scaled to add up to
        one with `normalise`.  Takes plain rows.
        """

    def rope(self, spec: ModelSpec) -> Positions:
        """positions i64[T] -> what the attention backend needs to rotate the heads at them."""


class AttentionBackend(Protocol):
    """Owns the KV cache and knows where the rows of the current step keep theirs: it is told before the first layer."""

    def __call__(
        self,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        qk_norm: QKNorm | None,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotate the queries and keys of qkv [T, (H + 2K) * D], store keys and values, attend -> [T, H * D].

        cos and sin: from the `rope` of the same blocks (see common/interfaces.py), None for a layer that does not rotate.  With
        `qk_norm`, queries and keys are normalised head by head before they are rotated.  `sinks` f32[H]: scores without values
        that take part in the softmax.  Window, scale and soft cap are those of the ModelSpec.  Takes `qkv` over: it may be
        changed in place.
        """


@dataclass(frozen=True, slots=True)
class QKNorm:
    """The RMSNorms of one layer's query and key heads: weights `q` and `k` [D], shared by all heads."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


Biases = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of a router [E], gate_up [E, 2 I] and down [E, C]
