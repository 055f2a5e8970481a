"""gpt-oss (OpenAI, arXiv:2508.10925).  Runs in the workers.

What is not Llama's:
  - every head has a sink: a score without a value, which takes its share of the softmax (`sinks`)
  - each second layer sees a window of the text only
  - all MLPs are mixtures of experts, whose router and products have biases, and whose activation is
    (1 + up) * gate * sigmoid(1.702 gate), after gate is bounded above and up on both sides by 7
  - a checkpoint stores all experts of a layer in one tensor, the rows of gate and up alternating; OpenAI's in MXFP4
    (OCP Microscaling Formats 1.0): 4-bit floats, two in a byte, with a power of two for each 32 along the inputs
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
from minisgl.model.common.shard import Shard

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by their four bits
MX_BLOCK = 32


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bytes u8 [out, in / 32, 16], the lower four bits first, and exponents u8 [out, in / 32] -> f32 [out, in]."""
    table = torch.tensor(_FP4, device=blocks.device)
    pairs = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1)  # [out, in / 32, 16, 2]
    return torch.ldexp(pairs.flatten(2), scales.int()[..., None] - 127).flatten(1)


def expert_weight(spec: ModelSpec, weights: Weights, name: str, expert: int, shape: tuple[int, int]) -> torch.Tensor:
    """One expert's part of the tensor `name`, as a weight [out, in] of this `shape`."""
    number, one, (rows, cols) = spec.num_experts, (expert, expert + 1), shape
    if spec.expert_format == "mxfp4":
        packed = weights.take(name + "_blocks", (number, rows, cols // MX_BLOCK, MX_BLOCK // 2), rows=one)
        scales = weights.take(name + "_scales", (number, rows, cols // MX_BLOCK), rows=one)
        return from_mxfp4(packed[0].to(torch.uint8), scales[0].to(torch.uint8))
    return weights.take(name, (number, cols, rows), rows=one)[0].t()


class Experts:
    """Takes the place of a layer's MLP; each rank computes some inner columns of every expert (see moe.py)."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory, *, layer: int
    ) -> None:
        name = f"model.layers.{layer}.mlp."
        number, inner, outer = spec.num_experts, spec.expert_size, spec.hidden_size
        start, end = shard.expert
        self.parallel = parallel
        router = weights.take(name + "router.weight", (number, outer))
        gate_up = router.new_empty(number, 2 * (end - start), outer)
        down = router.new_empty(number, outer, end - start)
        for e in range(number):
            both = expert_weight(spec, weights, name + "experts.gate_up_proj", e, (2 * inner, outer))[2 * start : 2 * end]
            gate_up[e] = torch.cat((both[::2], both[1::2]))
            down[e] = expert_weight(spec, weights, name + "experts.down_proj", e, (outer, inner))[:, start:end]
        both = weights.take(name + "experts.gate_up_proj_bias", (number, 2 * inner), cols=(2 * start, 2 * end))
        down_bias = weights.take(name + "experts.down_proj_bias", (number, outer))
        self.experts = blocks.experts(
            router,
            gate_up,
            down,
            top_k=spec.experts_per_token,
            normalise=spec.norm_topk,
            activation=spec.activation,
            biases=(
                weights.take(name + "router.bias", (number,)),
                torch.cat((both[:, ::2], both[:, 1::2]), 1),
                down_bias if shard.rank == 0 else torch.zeros_like(down_bias),  # the ranks' results are added up
            ),
        )

    def __call__(self, x: Activations) -> Activations:
        return self.parallel.all_reduce_(self.experts(x))


class Layer(llama.Layer):
    """A decoder block with experts."""

    def make_mlp(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory, *, layer: int
    ) -> Callable[[Activations], Activations]:
        return Experts(spec, shard, weights, parallel, blocks, layer=layer)


class GptOss(llama.Llama):
    """GptOssForCausalLM, the part of it that `shard` owns."""

    layer_class: ClassVar = Layer
