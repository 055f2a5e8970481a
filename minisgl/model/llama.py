"""Llama: the decoder that SmolLM2, Llama 2 and 3, Qwen3 and many others share.  Runs in the workers.

What differs between them is in the ModelSpec: Qwen3's `qk_norm` (Qwen3 technical report, arXiv:2505.09388, section 2).

Shapes: T tokens of a step, C hidden size, H query heads and K KV heads of this rank, D head size, V vocabulary.
"""

from __future__ import annotations

import torch

from minisgl.config import ModelSpec
from minisgl.model.attention import AttentionBackend
from minisgl.model.blocks import Blocks, Norm, Rows
from minisgl.model.layers import Embedding, QKNorm
from minisgl.model.loader import Weights
from minisgl.model.parallel import Parallel
from minisgl.model.shard import Shard, split


class Attention:
    """Self-attention over the paged KV cache; each rank computes its own heads and the outputs are summed."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: Blocks, *, layer: int
    ) -> None:
        name = f"model.layers.{layer}.self_attn."
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.layer = layer
        self.parallel = parallel
        self.qkv = blocks.linear(
            weights.take(name + "q_proj.weight", (q_size, spec.hidden_size), rows=shard.q_rows),
            weights.take(name + "k_proj.weight", (kv_size, spec.hidden_size), rows=shard.kv_rows),
            weights.take(name + "v_proj.weight", (kv_size, spec.hidden_size), rows=shard.kv_rows),
        )
        self.o = blocks.linear(weights.take(name + "o_proj.weight", (spec.hidden_size, q_size), cols=shard.q_rows))
        self.qk_norm: QKNorm | None = None
        if spec.qk_norm:  # the same for all heads, so every rank has it whole
            q, k = (weights.take(f"{name}{part}_norm.weight", (spec.head_dim,)) for part in "qk")
            self.qk_norm = QKNorm(q, k, spec.rms_norm_eps)

    def __call__(self, x: Rows, cos: torch.Tensor, sin: torch.Tensor, attend: AttentionBackend) -> Rows:
        out = attend(self.layer, self.qkv(x), cos, sin, self.qk_norm)  # [T, H * D]
        return self.parallel.all_reduce_(self.o(out))


class MLP:
    """down(silu(gate(x)) * up(x)); each rank computes some of the inner columns and the outputs are summed."""

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: Blocks, *, layer: int
    ) -> None:
        name = f"model.layers.{layer}.mlp."
        inner, outer = spec.intermediate_size, spec.hidden_size
        self.parallel = parallel
        self.gated = blocks.gated(
            weights.take(name + "gate_proj.weight", (inner, outer), rows=shard.mlp),
            weights.take(name + "up_proj.weight", (inner, outer), rows=shard.mlp),
        )
        self.down = blocks.linear(weights.take(name + "down_proj.weight", (outer, inner), cols=shard.mlp))

    def __call__(self, x: Rows) -> Rows:
        return self.parallel.all_reduce_(self.down(self.gated(x)))


class Layer:
    """One decoder block with pre-norms.

    The residual stream x [T, C] is updated in place, one addition late: what the MLP contributes is returned and added by the
    next norm, together with which it is one kernel on a GPU.
    """

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: Blocks, *, layer: int
    ) -> None:
        def norm(name: str) -> Norm:
            return blocks.norm(weights.take(f"model.layers.{layer}.{name}.weight", (spec.hidden_size,)), spec.rms_norm_eps)

        self.attn_norm = norm("input_layernorm")
        self.attn = Attention(spec, shard, weights, parallel, blocks, layer=layer)
        self.mlp_norm = norm("post_attention_layernorm")
        self.mlp = MLP(spec, shard, weights, parallel, blocks, layer=layer)

    def __call__(
        self, x: torch.Tensor, delta: Rows | None, cos: torch.Tensor, sin: torch.Tensor, attend: AttentionBackend
    ) -> Rows:
        delta = self.attn(self.attn_norm(x, delta), cos, sin, attend)
        return self.mlp(self.mlp_norm(x, delta))


class Llama:
    """LlamaForCausalLM or Qwen3ForCausalLM, the part of it that `shard` owns."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: Weights,
        parallel: Parallel,
        blocks: Blocks,
    ) -> None:
        shape = (spec.vocab_size, spec.hidden_size)
        table = weights.take("model.embed_tokens.weight", shape, rows=shard.vocab)
        self.parallel = parallel
        self.embed = Embedding(table, shard.vocab, parallel)
        self.rope = blocks.rope(spec)
        self.layers = [Layer(spec, shard, weights, parallel, blocks, layer=i) for i in range(spec.num_layers)]
        self.norm = blocks.norm(weights.take("model.norm.weight", (spec.hidden_size,)), spec.rms_norm_eps, last=True)
        self.head = blocks.linear(
            table if spec.tie_embeddings else weights.take("lm_head.weight", shape, rows=shard.vocab), last=True
        )
        self.vocab_widths = [end - start for start, end in split(spec.vocab_size, shard.size)]

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, sample_rows: torch.Tensor | None, attend: AttentionBackend
    ) -> torch.Tensor:
        """Logits [len(sample_rows), V] of the rows that draw a token (None: all).  ids, positions: i64[T]; sample_rows: i64.

        The rest of the step's metadata is with `attend`, which must have been prepared for the same step.
        """
        x = self.embed(ids)  # [T, C]
        cos, sin = self.rope(positions)
        delta: Rows | None = None
        for layer in self.layers:
            delta = layer(x, delta, cos, sin, attend)
        assert delta is not None
        if sample_rows is None:
            return self.parallel.all_gather_cols(self.head(self.norm(x, delta)), self.vocab_widths)
        if len(sample_rows) == 0:  # chunks of prompts only; the same on every rank
            return x.new_empty(0, sum(self.vocab_widths))
        # Parts of a product [parts, T, C] have their rows in the last dimension but one, as plain rows have.
        logits = self.head(self.norm(x[sample_rows], delta[..., sample_rows, :]))
        return self.parallel.all_gather_cols(logits, self.vocab_widths)
