"""Mixtures of experts: Mixtral (arXiv:2401.04088) and Qwen3-MoE (arXiv:2505.09388).  Runs in the workers.

A Llama whose MLP is E small ones, of which a router picks a few for every token: y = sum over those of weight * MLP_e(x).

Tensor parallelism cuts every expert's inner columns, as it does those of a dense MLP, rather than handing out whole experts:
the ranks' work is equal whatever the router picks, no token travels, any degree works, and the sum over the ranks is the one
that a dense MLP needs.  The price is that a rank's products get narrow: I / tp columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from minisgl.config import ModelSpec
from minisgl.model.architectures import llama
from minisgl.model.checkpoint.loader import Weights
from minisgl.model.common.interfaces import Activations, LayerFactory
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Range, Shard


class Experts:
    """Takes the place of a layer's MLP; each rank computes some of the inner columns of every expert."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory, *, layer: int
    ) -> None:
        name = f"model.layers.{layer}.mlp."
        inner, outer, mine = spec.expert_size, spec.hidden_size, shard.expert[1] - shard.expert[0]
        self.parallel = parallel
        router = weights.take(name + "gate.weight", (spec.num_experts, outer))
        gate_up = router.new_empty(spec.num_experts, 2 * mine, outer)
        down = router.new_empty(spec.num_experts, outer, mine)
        for e in range(spec.num_experts):
            expert = f"{name}experts.{e}."
            gate_up[e, :mine] = weights.take(expert + "gate_proj.weight", (inner, outer), rows=shard.expert)
            gate_up[e, mine:] = weights.take(expert + "up_proj.weight", (inner, outer), rows=shard.expert)
            down[e] = weights.take(expert + "down_proj.weight", (outer, inner), cols=shard.expert)
        self.experts = blocks.experts(router, gate_up, down, top_k=spec.experts_per_token, normalise=spec.norm_topk)

    def __call__(self, x: Activations) -> Activations:
        return self.parallel.all_reduce_(self.experts(x))


class Layer(llama.Layer):
    """A decoder block with experts, or with a dense MLP if it is one of `dense_layers`."""

    def make_mlp(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory, *, layer: int
    ) -> Callable[[Activations], Activations]:
        if layer in spec.dense_layers:
            return super().make_mlp(spec, shard, weights, parallel, blocks, layer=layer)
        return Experts(spec, shard, weights, parallel, blocks, layer=layer)


class Qwen3Moe(llama.Llama):
    """Qwen3MoeForCausalLM, the part of it that `shard` owns."""

    layer_class: ClassVar = Layer


class _MixtralNames:
    """A Mixtral checkpoint under the names that `Experts` asks for."""

    _PARTS: ClassVar = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        if ".mlp." in name:
            path, part, kind = name.replace(".mlp.", ".block_sparse_moe.").rsplit(".", 2)
            name = f"{path}.{self._PARTS.get(part, part)}.{kind}"
        return self._weights.take(name, shape, rows=rows, cols=cols)

    def finish(self) -> None:
        self._weights.finish()


class Mixtral(Qwen3Moe):
    """MixtralForCausalLM, the part of it that `shard` owns."""

    def __init__(self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory) -> None:
        super().__init__(spec, shard, _MixtralNames(weights), parallel, blocks)
