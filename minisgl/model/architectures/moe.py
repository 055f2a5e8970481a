"""Mixtures of experts: Mixtral (arXiv:2401.04088) and Qwen3-MoE (arXiv:2505.09388).  Runs in the workers.

A Llama whose MLP is E small ones, of which a router picks a few for every token: y = sum over those of weight * MLP_e(x).

Each rank computes some inner columns of every expert, as it does of a dense MLP, rather than some of the experts: the ranks'
work is equal whatever the router picks, no token travels, any number of ranks works, and the all-reduce is the one that a dense
MLP needs.  The price is that a rank's products get narrow: I / tp columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from minisgl.model.architectures import llama
from minisgl.model.common.activations import Activations, Product
from minisgl.model.common.interfaces import Build, ExpertWeights, LinearLayer
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import Weight, Weights


def read_experts(build: Build, layer: int) -> ExpertWeights:
    """This rank's inner columns of every expert of a layer."""
    spec, name, mine = build.spec, f"model.layers.{layer}.mlp.", build.shard.expert
    inner, hidden, width = spec.expert_size, spec.hidden_size, mine[1] - mine[0]
    router = build.tensor(name + "gate.weight", (spec.num_experts, hidden))
    gate_up = router.new_empty(spec.num_experts, 2 * width, hidden)
    down = router.new_empty(spec.num_experts, hidden, width)
    for e in range(spec.num_experts):
        expert = f"{name}experts.{e}."
        gate_up[e, :width] = build.tensor(expert + "gate_proj.weight", (inner, hidden), rows=mine)
        gate_up[e, width:] = build.tensor(expert + "up_proj.weight", (inner, hidden), rows=mine)
        down[e] = build.tensor(expert + "down_proj.weight", (hidden, inner), cols=mine)
    return ExpertWeights(router, gate_up, down, spec.experts_per_token, spec.norm_topk)


class Experts:
    """A mixture of experts in the place of a layer's MLP."""

    def __init__(self, build: Build, weights: ExpertWeights) -> None:
        self.parallel, self.experts = build.parallel, build.layers.experts(weights)

    def __call__(self, x: Activations) -> Product:
        return self.parallel.sum_over_ranks(self.experts(x))  # all-reduce: [T, C], this rank's columns -> all columns


class Layer(llama.Layer):
    """A decoder block with experts, or with a dense MLP if it is one of `dense_layers`."""

    def make_mlp(self, build: Build, layer: int) -> LinearLayer:
        return Experts(build, read_experts(build, layer)) if build.spec.has_experts(layer) else super().make_mlp(build, layer)


class Qwen3Moe(llama.Llama):
    """Qwen3MoeForCausalLM."""

    layer_class: ClassVar = Layer


class _MixtralNames:
    """A Mixtral checkpoint under the names of Qwen3-MoE."""

    _PARTS: ClassVar = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        if ".mlp." in name:
            path, part, kind = name.replace(".mlp.", ".block_sparse_moe.").rsplit(".", 2)
            name = f"{path}.{self._PARTS.get(part, part)}.{kind}"
        return self._weights.take(name, shape, rows=rows, cols=cols)


class Mixtral(Qwen3Moe):
    """MixtralForCausalLM."""

    def __init__(self, build: Build) -> None:
        super().__init__(replace(build, weights=_MixtralNames(build.weights)))
