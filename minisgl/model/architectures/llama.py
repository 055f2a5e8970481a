"""Llama: the decoder that most open models are, or are variations of.  Runs in the workers.

Llama 2 and 3, SmolLM2, Mistral, Ministral, Qwen2 and Qwen3 differ from each other in what a ModelSpec can say: biases
(`qkv_bias`), norms of queries and keys (`qk_norm`; Qwen3 technical report, arXiv:2505.09388, section 2), sliding windows
(`windows`; Mistral 7B, arXiv:2310.06825, section 2), rotary positions.  Other models derive their classes from these.

Shapes: T tokens of a step, C hidden size, H query heads and K KV heads of this rank, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from minisgl.config import ModelSpec
from minisgl.model.checkpoint.loader import Weights
from minisgl.model.common.embedding import Embedding
from minisgl.model.common.functional import softcap_
from minisgl.model.common.interfaces import Activations, AttentionBackend, LayerFactory, Norm, QKNorm, Rotation
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Shard, split


class Attention:
    """Self-attention over the paged KV cache; each rank computes its own heads and the outputs are summed."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: Weights,
        parallel: Parallel,
        blocks: LayerFactory,
        *,
        layer: int,
        no_partial_sums: bool = False,
    ) -> None:
        """`no_partial_sums`: the result is plain rows, for a norm of it alone."""
        name = f"model.layers.{layer}.self_attn."
        sizes = {"q": spec.num_heads * spec.head_dim, "k": spec.num_kv_heads * spec.head_dim}
        sizes["v"] = sizes["k"]
        rows = {"q": shard.q_rows, "k": shard.kv_rows, "v": shard.kv_rows}
        self.layer = layer
        self.parallel = parallel
        self.qkv = blocks.linear(
            *(weights.take(f"{name}{p}_proj.weight", (sizes[p], spec.hidden_size), rows=rows[p]) for p in "qkv"),
            bias=torch.cat([weights.take(f"{name}{p}_proj.bias", (sizes[p],), rows=rows[p]) for p in "qkv"])
            if spec.qkv_bias
            else None,
        )
        o_bias = weights.take(name + "o_proj.bias", (spec.hidden_size,)) if spec.o_bias else None
        self.o = blocks.linear(
            weights.take(name + "o_proj.weight", (spec.hidden_size, sizes["q"]), cols=shard.q_rows),
            bias=o_bias if shard.rank == 0 else None,  # the ranks' results are added up
            no_partial_sums=no_partial_sums,
        )
        self.qk_norm: QKNorm | None = None
        if spec.qk_norm:  # the same for all heads, so every rank has it whole
            q, k = (weights.take(f"{name}{part}_norm.weight", (spec.head_dim,)) for part in "qk")
            self.qk_norm = QKNorm(q, k, spec.rms_norm_eps)
        self.sinks = weights.take(name + "sinks", (spec.num_heads,), rows=shard.heads).float() if spec.sinks else None

    def __call__(self, x: Activations, rotation: Rotation, attend: AttentionBackend) -> Activations:
        out = attend(self.layer, self.qkv(x), *rotation, self.qk_norm, sinks=self.sinks)  # [T, H * D]
        return self.parallel.all_reduce_(self.o(out))


class MLP:
    """down(act(gate(x)) * up(x)); each rank computes some of the inner columns and the outputs are summed."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: Weights,
        parallel: Parallel,
        blocks: LayerFactory,
        *,
        layer: int,
        no_partial_sums: bool = False,
    ) -> None:
        """`no_partial_sums`: the result is plain rows, for a norm of it alone."""
        name = f"model.layers.{layer}.mlp."
        inner, outer = spec.intermediate_size, spec.hidden_size
        self.parallel = parallel
        self.gated = blocks.gated(
            weights.take(name + "gate_proj.weight", (inner, outer), rows=shard.mlp),
            weights.take(name + "up_proj.weight", (inner, outer), rows=shard.mlp),
            activation=spec.activation,
        )
        self.down = blocks.linear(
            weights.take(name + "down_proj.weight", (outer, inner), cols=shard.mlp), no_partial_sums=no_partial_sums
        )

    def __call__(self, x: Activations) -> Activations:
        return self.parallel.all_reduce_(self.down(self.gated(x)))


class Layer:
    """One decoder block with pre-norms.

    The residual stream x [T, C] is updated in place, one addition late: what the MLP contributes is returned and added by the
    next norm, together with which it is one kernel on a GPU.
    """

    def __init__(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory, *, layer: int
    ) -> None:
        def norm(name: str) -> Norm:
            return blocks.norm(weights.take(f"model.layers.{layer}.{name}.weight", (spec.hidden_size,)), spec.rms_norm_eps)

        self.attn_norm = norm("input_layernorm")
        self.attn = Attention(spec, shard, weights, parallel, blocks, layer=layer)
        self.mlp_norm = norm("post_attention_layernorm")
        self.mlp = self.make_mlp(spec, shard, weights, parallel, blocks, layer=layer)

    def make_mlp(
        self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory, *, layer: int
    ) -> Callable[[Activations], Activations]:
        return MLP(spec, shard, weights, parallel, blocks, layer=layer)

    def __call__(self, x: torch.Tensor, delta: Activations | None, rotation: Rotation, attend: AttentionBackend) -> Activations:
        delta = self.attn(self.attn_norm(x, delta), rotation, attend)
        return self.mlp(self.mlp_norm(x, delta))


class Llama:
    """A causal language model, the part of it that `shard` owns."""

    layer_class: ClassVar[Callable[..., Layer]] = Layer

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard,
        weights: Weights,
        parallel: Parallel,
        blocks: LayerFactory,
    ) -> None:
        """`spec.max_context` is the context that is served, which some kinds of rotary positions depend on."""
        shape = (spec.vocab_size, spec.hidden_size)
        table = weights.take("model.embed_tokens.weight", shape, rows=shard.vocab)
        self.spec = spec
        self.parallel = parallel
        self.embedding = Embedding(table, shard.vocab, parallel)
        self.rope = blocks.rope(spec)
        self.layers = [self.layer_class(spec, shard, weights, parallel, blocks, layer=i) for i in range(spec.num_layers)]
        self.norm = blocks.norm(weights.take("model.norm.weight", (spec.hidden_size,)), spec.rms_norm_eps, plain_output=True)
        self.head = blocks.linear(
            table if spec.tie_embeddings else weights.take("lm_head.weight", shape, rows=shard.vocab), is_lm_head=True
        )
        self.vocab_widths = [end - start for start, end in split(spec.vocab_size, shard.size)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """i64[T] -> the residual stream [T, C]."""
        return self.embedding(ids)

    def rotations(self, positions: torch.Tensor) -> Sequence[Rotation]:
        """What every layer rotates queries and keys at `positions` i64[T] with."""
        return [self.rope(positions)] * len(self.layers)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, sample_rows: torch.Tensor | None, attend: AttentionBackend
    ) -> torch.Tensor:
        """Logits [len(sample_rows), V] of the rows that draw a token (None: all).  ids, positions: i64[T]; sample_rows: i64.

        The rest of the step's metadata is with `attend`, which must have been prepared for the same step.
        """
        x, delta = self.states(ids, positions, attend)
        return self.logits(x, delta, sample_rows)

    def states(self, ids: torch.Tensor, positions: torch.Tensor, attend: AttentionBackend) -> tuple[torch.Tensor, Activations]:
        """All layers: the residual stream [T, C], and what the last layer adds to it."""
        x = self.embed(ids)  # [T, C]
        delta: Activations | None = None
        for layer, rotation in zip(self.layers, self.rotations(positions), strict=True):
            delta = layer(x, delta, rotation, attend)
        assert delta is not None
        return x, delta

    def final(self, x: torch.Tensor, delta: Activations, rows: torch.Tensor) -> torch.Tensor:
        """The final hidden states [len(rows), C] of some rows of `states`, behind the last norm.  The same on every rank."""
        states: torch.Tensor = self.norm(x[rows], delta[..., rows, :])
        return states

    def logits(self, x: torch.Tensor, delta: Activations, sample_rows: torch.Tensor | None) -> torch.Tensor:
        """Of some rows of `states`, see `__call__`."""
        if sample_rows is not None:
            if len(sample_rows) == 0:  # chunks of prompts only; the same on every rank
                return x.new_empty(0, sum(self.vocab_widths))
            # Parts of a product [parts, T, C] have their rows in the last dimension but one, as plain rows have.
            x, delta = x[sample_rows], delta[..., sample_rows, :]
        logits = self.parallel.all_gather_cols(self.head(self.norm(x, delta)), self.vocab_widths)
        return softcap_(logits, self.spec.logit_softcap)
