"""Gemma 2 (arXiv:2408.00118) and Gemma 3 text (arXiv:2503.19786).  Runs in the workers.

What is not Llama's:
  - the embedding is scaled by sqrt(C), rounded to the model's dtype
  - every norm multiplies by 1 + w, w being what the checkpoint holds
  - attention and MLP have a norm behind them as well as before them: x += norm(attention(norm(x)))
  - the MLP's gate goes through gelu (its tanh approximation)
  - most layers see a window of the text only; the others, each second (Gemma 2) or sixth (Gemma 3), see all of it
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

from minisgl.config import ModelSpec
from minisgl.model.architectures import llama
from minisgl.model.checkpoint.loader import Weights
from minisgl.model.common.interfaces import Activations, AttentionBackend, LayerFactory, Norm, Rotation
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Range, Shard


class OnePlus:
    """A checkpoint whose norms come out as 1 + w, in float32: in bfloat16 the sum would lose most bits of a small w."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        part = self._weights.take(name, shape, rows=rows, cols=cols)
        return 1 + part.float() if name.endswith("norm.weight") else part

    def finish(self) -> None:
        self._weights.finish()


class Layer(llama.Layer):
    """A decoder block with norms before and behind; see llama.Layer for what is returned."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory, *, layer: int
    ) -> None:
        def norm(name: str, *, behind: bool = False) -> Norm:
            weight = weights.take(f"model.layers.{layer}.{name}.weight", (spec.hidden_size,))
            return blocks.norm(weight, spec.rms_norm_eps, plain_output=behind)

        self.attn_norm = norm("input_layernorm")
        self.attn = llama.Attention(spec, shard, weights, parallel, blocks, layer=layer, no_partial_sums=True)
        self.behind_attn = norm("post_attention_layernorm", behind=True)
        self.mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = llama.MLP(spec, shard, weights, parallel, blocks, layer=layer, no_partial_sums=True)
        self.behind_mlp = norm("post_feedforward_layernorm", behind=True)

    def __call__(self, x: torch.Tensor, delta: Activations | None, rotation: Rotation, attend: AttentionBackend) -> Activations:
        delta = self.behind_attn(self.attn(self.attn_norm(x, delta), rotation, attend), None)
        return self.behind_mlp(self.mlp(self.mlp_norm(x, delta)), None)


class Gemma(llama.Llama):
    """Gemma2ForCausalLM or Gemma3ForCausalLM, the part of it that `shard` owns."""

    layer_class: ClassVar = Layer

    def __init__(self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory) -> None:
        super().__init__(spec, shard, OnePlus(weights), parallel, blocks)
        self.local_rope = self.rope
        if spec.local_rope_theta:
            self.local_rope = blocks.rope(replace(spec, rope_theta=spec.local_rope_theta, rope_scaling=None))
        self.windowed = [spec.window(layer) > 0 for layer in range(spec.num_layers)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return x.mul_(float(torch.tensor(self.spec.hidden_size**0.5, dtype=x.dtype)))

    def rotations(self, positions: torch.Tensor) -> Sequence[Rotation]:
        everywhere, local = self.rope(positions), self.local_rope(positions)
        return [local if windowed else everywhere for windowed in self.windowed]
