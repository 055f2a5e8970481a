"""Gemma 2 (arXiv:2408.00118) and Gemma 3 text (arXiv:2503.19786): Llamas with norms around every block.  Runs in the workers.

Differences from Llama:
  - the embedding is scaled by sqrt(C), rounded to the model's dtype
  - every norm multiplies by 1 + w, where w is the tensor of the checkpoint
  - attention and MLP have a norm after them as well as before them: x += norm(attention(norm(x)))
  - the MLP's gate goes through gelu (its tanh approximation)
  - most layers see a window of the text only; every second (Gemma 2) or sixth (Gemma 3) sees all of it
  - queries times keys are scaled by query_pre_attn_scalar ** -0.5, whatever the head size
  - Gemma 2 bounds scores (`attn_softcap`) and logits (`logit_softcap`) by c * tanh(x / c)
  - Gemma 3 normalises queries and keys instead (`qk_norm`), and its layers with a window rotate faster than the others
    (`local_rope_theta`)
Windows, scale and soft caps are in the ModelSpec, where the attention backends find them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from minisgl.model.architectures import llama
from minisgl.model.common.activations import Product, plain
from minisgl.model.common.interfaces import AttentionBackend, Build, Rotation
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import Weight, Weights, dense


class OnePlus:
    """A checkpoint whose norms are read as 1 + w, in float32: in bfloat16 the sum would lose most bits of a small w."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        weight = self._weights.take(name, shape, rows=rows, cols=cols)
        return 1 + dense(weight).float() if name.endswith("norm.weight") else weight


class Layer(llama.Layer):
    """A decoder block with norms before and after attention and MLP."""

    def __init__(self, build: Build, layer: int) -> None:
        name = f"model.layers.{layer}."
        self.attn_norm = llama.make_norm(build, name + "input_layernorm")
        self.attn = llama.Attention(build, layer, no_partial_sums=True)
        self.after_attn = llama.make_norm(build, name + "post_attention_layernorm", plain_output=True)
        self.mlp_norm = llama.make_norm(build, name + "pre_feedforward_layernorm")
        self.mlp = llama.MLP(build, layer, no_partial_sums=True)
        self.after_mlp = llama.make_norm(build, name + "post_feedforward_layernorm", plain_output=True)

    def __call__(self, x: torch.Tensor, delta: Product | None, rotation: Rotation | None, attend: AttentionBackend) -> Product:
        attention = self.attn(self.attn_norm(x, delta), rotation, attend)  # [T, C]
        delta = plain(self.after_attn(plain(attention), None))
        mlp = self.mlp(self.mlp_norm(x, delta))  # [T, C]
        return plain(self.after_mlp(plain(mlp), None))


class Gemma(llama.Llama):
    """Gemma2ForCausalLM or Gemma3ForCausalLM."""

    layer_class: ClassVar = Layer

    def __init__(self, build: Build) -> None:
        super().__init__(replace(build, weights=OnePlus(build.weights)))
        spec = build.spec
        self.local_rope = self.rope
        if spec.local_rope_theta:
            self.local_rope = build.layers.rope(replace(spec, rope_theta=spec.local_rope_theta, rope_scaling=None))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return x.mul_(float(torch.tensor(self.spec.hidden_size**0.5, dtype=x.dtype)))

    def rotations(self, positions: torch.Tensor) -> Sequence[Rotation]:
        everywhere, local = self.rope(positions), self.local_rope(positions)
        return [local if self.spec.window(layer) else everywhere for layer in range(self.spec.num_layers)]
