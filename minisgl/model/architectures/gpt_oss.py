"""gpt-oss (OpenAI, arXiv:2508.10925): a Llama with attention sinks and a mixture of experts.  Runs in the workers.

Differences from Llama:
  - every head has a sink: a score without a value, which takes its share of the softmax (`sinks`)
  - every second layer sees a window of the text only
  - all MLPs are mixtures of experts, whose router and products have biases, and whose activation is
    (1 + up) * gate * sigmoid(1.702 gate), after gate is bounded above and up on both sides by 7
  - a checkpoint stores all experts of a layer in one tensor, the rows of gate and up alternating; OpenAI's in MXFP4
    (OCP Microscaling Formats 1.0): 4-bit floats, two in a byte, with a power of two for each 32 along the inputs
"""

from __future__ import annotations

from typing import ClassVar

import torch

from minisgl.model.architectures import llama, moe
from minisgl.model.common.interfaces import Build, ExpertWeights, LinearLayer

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by their four bits
MX_BLOCK = 32


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bytes u8 [out, in / 32, 16], the lower four bits first, and exponents u8 [out, in / 32] -> f32 [out, in]."""
    table = torch.tensor(_FP4, device=blocks.device)
    pairs = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1)  # [out, in / 32, 16, 2]
    return torch.ldexp(pairs.flatten(2), scales.int()[..., None] - 127).flatten(1)


def expert_weight(build: Build, name: str, expert: int, shape: tuple[int, int]) -> torch.Tensor:
    """One expert's part of the tensor `name`, as a weight [out, in] of this `shape`."""
    number, one, (rows, cols) = build.spec.num_experts, (expert, expert + 1), shape
    if build.spec.expert_format == "mxfp4":
        packed = build.tensor(name + "_blocks", (number, rows, cols // MX_BLOCK, MX_BLOCK // 2), rows=one)
        scales = build.tensor(name + "_scales", (number, rows, cols // MX_BLOCK), rows=one)
        return from_mxfp4(packed[0].to(torch.uint8), scales[0].to(torch.uint8))
    return build.tensor(name, (number, cols, rows), rows=one)[0].t()


def read_experts(build: Build, layer: int) -> ExpertWeights:
    """This rank's inner columns of every expert of a layer, gate and up sorted apart."""
    spec, name = build.spec, f"model.layers.{layer}.mlp."
    number, inner, hidden = spec.num_experts, spec.expert_size, spec.hidden_size
    start, end = build.shard.expert
    router = build.tensor(name + "router.weight", (number, hidden))
    gate_up = router.new_empty(number, 2 * (end - start), hidden)
    down = router.new_empty(number, hidden, end - start)
    for e in range(number):
        both = expert_weight(build, name + "experts.gate_up_proj", e, (2 * inner, hidden))[2 * start : 2 * end]
        gate_up[e] = torch.cat((both[::2], both[1::2]))
        down[e] = expert_weight(build, name + "experts.down_proj", e, (hidden, inner))[:, start:end]
    both = build.tensor(name + "experts.gate_up_proj_bias", (number, 2 * inner), cols=(2 * start, 2 * end))
    down_bias = build.tensor(name + "experts.down_proj_bias", (number, hidden))
    return ExpertWeights(
        router,
        gate_up,
        down,
        spec.experts_per_token,
        spec.norm_topk,
        spec.activation,
        router_bias=build.tensor(name + "router.bias", (number,)),
        gate_up_bias=torch.cat((both[:, ::2], both[:, 1::2]), 1),
        down_bias=down_bias if build.shard.rank == 0 else torch.zeros_like(down_bias),  # once in the sum over the ranks
    )


class Layer(llama.Layer):
    """A decoder block with experts."""

    def make_mlp(self, build: Build, layer: int) -> LinearLayer:
        return moe.Experts(build, read_experts(build, layer))


class GptOss(llama.Llama):
    """GptOssForCausalLM."""

    layer_class: ClassVar = Layer
