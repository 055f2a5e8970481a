"""Interfaces between a model, the layers it is built from, and the attention it runs on: one model serves CPUs and GPUs.

A `Model` (minisgl/model/architectures) asks the `LayerFactory` of its `Build` for layers and calls an `AttentionBackend`.
cpu/ and cuda/ implement the two, each with its own kernels; neither knows the other or any model.

Shapes: T tokens of a step, C hidden size, H query heads and K KV heads of this rank, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from minisgl.config import ModelSpec
from minisgl.model.common.activations import Activations, Product
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Range, Shard
from minisgl.model.common.weights import Weight, Weights, dense

LinearLayer = Callable[[Activations], Product]
GatedLayer = Callable[[Activations], Activations]
NormLayer = Callable[[torch.Tensor, Product | None], Activations]
Rotation = tuple[torch.Tensor, torch.Tensor]  # cos and sin at the positions of a step
RopeLayer = Callable[[torch.Tensor], Rotation]  # positions i64[T] -> their rotation


# ---------------- layers
@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """A mixture of E experts, gated MLPs with I inner columns on this rank; each token goes through the `top_k` likeliest."""

    router: torch.Tensor  # [E, C]
    gate_up: torch.Tensor  # [E, 2 I, C]
    down: torch.Tensor  # [E, C, I]
    top_k: int
    normalise: bool  # a token's weights, the softmax over all experts, are scaled to add up to one
    activation: str = "silu"  # see ModelSpec
    router_bias: torch.Tensor | None = None  # [E]; a model has all three biases or none
    gate_up_bias: torch.Tensor | None = None  # [E, 2 I]
    down_bias: torch.Tensor | None = None  # [E, C]


class LayerFactory(Protocol):
    """Makes the layers of a decoder."""

    def linear(
        self, *weights: Weight, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> LinearLayer:
        """x @ W.T + bias, for weights [out_i, in] stacked on top of each other.

        no_partial_sums: return the sum as a tensor, because the next operation cannot add parts.  is_lm_head: the output is
        the logits, a tensor that is never computed in float8.
        """

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> NormLayer:
        """RMSNorm of the residual stream x [T, C], to which a delta is added in place first.  weight: of x's dtype, or f32.

        plain_output: return a tensor, because no linear layer follows, or the LM head does.
        """

    def gated(self, gate: Weight, up: Weight, *, activation: str = "silu") -> GatedLayer:
        """act(x @ gate.T) * (x @ up.T) for weights [I, in]: the first half of a gated MLP.  activation: see ModelSpec."""

    def experts(self, weights: ExpertWeights) -> LinearLayer:
        """The weighted sum of the outputs of each token's experts.  Takes tensors."""

    def rope(self, spec: ModelSpec) -> RopeLayer:
        """The rotary positions of `spec`, in the form that the attention of the same device takes."""


# ---------------- attention
@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMSNorms of the query and key heads of one layer: weights `q` and `k` [D], shared by all heads."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


class AttentionBackend(Protocol):
    """Attention over the paged KV cache, which it owns; prepared once per step, then called by every layer."""

    def __call__(
        self, layer: int, qkv: Product, rotation: Rotation | None, qk_norm: QKNorm | None, *, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalise and rotate the heads of qkv [T, (H + 2K) * D], store keys and values, attend -> [T, H * D].

        rotation: of the `rope` of the same device; None for a layer that does not rotate.  qk_norm comes before the rotation.
        sinks f32[H]: scores without values that take part in each head's softmax.  Window, scale and soft cap are those of the
        ModelSpec.  May change `qkv` in place.
        """


# ---------------- models
@dataclass(frozen=True, slots=True)
class Build:
    """All that one rank builds its part of a model from."""

    spec: ModelSpec  # with `max_context` as it is served, on which some kinds of rotary positions depend
    shard: Shard
    weights: Weights
    parallel: Parallel
    layers: LayerFactory

    def weight(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        """A matrix for `layers`, see Weights.take."""
        return self.weights.take(name, shape, rows=rows, cols=cols)

    def tensor(
        self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None
    ) -> torch.Tensor:
        """Any other parameter, see Weights.take."""
        return dense(self.weights.take(name, shape, rows=rows, cols=cols))


class Model(Protocol):
    """A causal language model, the part of it that one rank owns.  All ranks call it with the same arguments."""

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, sample_rows: torch.Tensor | None, attend: AttentionBackend
    ) -> torch.Tensor:
        """Logits [len(sample_rows), V] of the rows that draw a token (None: all).  ids, positions: i64[T]; sample_rows: i64.

        The rest of the step's metadata is with `attend`, which must have been prepared for the same step.
        """

    def states(self, ids: torch.Tensor, positions: torch.Tensor, attend: AttentionBackend) -> tuple[torch.Tensor, Product]:
        """All layers: the residual stream [T, C], and the last layer's delta, still to be added to it."""

    def final(self, x: torch.Tensor, delta: Product, rows: torch.Tensor) -> torch.Tensor:
        """The final hidden states [len(rows), C] of some rows of `states`, after the last norm."""

    def logits(self, x: torch.Tensor, delta: Product, sample_rows: torch.Tensor | None) -> torch.Tensor:
        """Logits of some rows of `states`, see `__call__`."""
