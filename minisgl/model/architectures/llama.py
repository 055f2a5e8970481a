"""Llama: the decoder that most open models are, or are variations of.  Runs in the workers.

Llama 2 and 3, SmolLM2, Mistral, Ministral, Qwen2 and Qwen3 differ from each other in what a ModelSpec can say: biases
(`qkv_bias`), norms of queries and keys (`qk_norm`; Qwen3 technical report, arXiv:2505.09388, section 2), sliding windows
(`windows`; Mistral 7B, arXiv:2310.06825, section 2), rotary positions.  Other models derive their classes from these.

Shapes: T tokens of a step, C hidden size, D head size, V vocabulary; H query heads, K KV heads and I inner columns of the MLP
are this rank's.  A delta [T, C] is a tensor, or in the form that the next norm reads fastest (common/activations.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from minisgl.model.common.activations import Activations, Product, plain
from minisgl.model.common.embedding import Embedding
from minisgl.model.common.functional import softcap_
from minisgl.model.common.interfaces import AttentionBackend, Build, LinearLayer, NormLayer, QKNorm, Rotation
from minisgl.model.common.shard import split
from minisgl.model.common.weights import dense


def make_norm(build: Build, name: str, *, plain_output: bool = False) -> NormLayer:
    """The RMSNorm with the weights `name`."""
    weight = build.tensor(f"{name}.weight", (build.spec.hidden_size,))
    return build.layers.norm(weight, build.spec.rms_norm_eps, plain_output)


class Attention:
    """Self-attention over the paged KV cache.  Each rank computes its own heads."""

    def __init__(self, build: Build, layer: int, *, no_partial_sums: bool = False) -> None:
        """no_partial_sums: return a tensor, because a norm of the output itself follows."""
        spec, shard = build.spec, build.shard
        name = f"model.layers.{layer}.self_attn."
        hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = (("q_proj", q, shard.q_rows), ("k_proj", kv, shard.kv_rows), ("v_proj", kv, shard.kv_rows))
        biases = [build.tensor(f"{name}{part}.bias", (n,), rows=rows) for part, n, rows in parts if spec.qkv_bias]
        self.layer, self.parallel = layer, build.parallel
        self.qkv = build.layers.linear(
            *(build.weight(f"{name}{part}.weight", (n, hidden), rows=rows) for part, n, rows in parts),
            bias=torch.cat(biases) if biases else None,
        )
        bias = build.tensor(name + "o_proj.bias", (hidden,)) if spec.o_bias else None
        self.o = build.layers.linear(
            build.weight(name + "o_proj.weight", (hidden, q), cols=shard.q_rows),
            bias=bias if shard.rank == 0 else None,  # once in the sum over the ranks
            no_partial_sums=no_partial_sums,
        )
        self.qk_norm: QKNorm | None = None
        if spec.qk_norm:  # the same weights for all heads, so every rank has them in full
            q_norm, k_norm = (build.tensor(f"{name}{part}_norm.weight", (spec.head_dim,)) for part in "qk")
            self.qk_norm = QKNorm(q_norm, k_norm, spec.rms_norm_eps)
        self.sinks = build.tensor(name + "sinks", (spec.num_heads,), rows=shard.heads).float() if spec.sinks else None

    def __call__(self, x: Activations, rotation: Rotation | None, attend: AttentionBackend) -> Product:
        qkv = self.qkv(x)  # [T, (H + 2K) * D]
        heads = attend(self.layer, qkv, rotation, self.qk_norm, sinks=self.sinks)  # [T, H * D]
        return self.parallel.sum_over_ranks(self.o(heads))  # all-reduce: [T, C] of this rank's heads -> of all heads


class MLP:
    """down(act(gate(x)) * up(x)).  Each rank computes some of the inner columns."""

    def __init__(self, build: Build, layer: int, *, no_partial_sums: bool = False) -> None:
        """no_partial_sums: as for Attention."""
        name = f"model.layers.{layer}.mlp."
        inner, hidden, mine = build.spec.intermediate_size, build.spec.hidden_size, build.shard.mlp
        self.parallel = build.parallel
        self.gated = build.layers.gated(
            build.weight(name + "gate_proj.weight", (inner, hidden), rows=mine),
            build.weight(name + "up_proj.weight", (inner, hidden), rows=mine),
            activation=build.spec.activation,
        )
        down = build.weight(name + "down_proj.weight", (hidden, inner), cols=mine)
        self.down = build.layers.linear(down, no_partial_sums=no_partial_sums)

    def __call__(self, x: Activations) -> Product:
        inner = self.gated(x)  # [T, I]
        return self.parallel.sum_over_ranks(self.down(inner))  # all-reduce: [T, C] of this rank's columns -> of all


class Layer:
    """One decoder block with pre-norms.

    The residual stream x [T, C] is updated in place, one addition late: the output of the MLP is returned, and the next norm
    adds it, which a GPU does in the kernel of the norm.
    """

    def __init__(self, build: Build, layer: int) -> None:
        name = f"model.layers.{layer}."
        self.attn_norm = make_norm(build, name + "input_layernorm")
        self.attn = Attention(build, layer)
        routed = build.spec.has_experts(layer)  # a router reads plain rows
        self.mlp_norm = make_norm(build, name + "post_attention_layernorm", plain_output=routed)
        self.mlp = self.make_mlp(build, layer)

    def make_mlp(self, build: Build, layer: int) -> LinearLayer:
        return MLP(build, layer)

    def __call__(self, x: torch.Tensor, delta: Product | None, rotation: Rotation | None, attend: AttentionBackend) -> Product:
        delta = self.attn(self.attn_norm(x, delta), rotation, attend)  # x += delta; [T, C]
        return self.mlp(self.mlp_norm(x, delta))  # x += delta; [T, C]


class Llama:
    """A causal language model, see common/interfaces.py: Model."""

    layer_class: ClassVar[type[Layer]] = Layer

    def __init__(self, build: Build) -> None:
        spec, shard = build.spec, build.shard
        shape = (spec.vocab_size, spec.hidden_size)
        table = build.weight("model.embed_tokens.weight", shape, rows=shard.vocab)
        head = table if spec.tie_embeddings else build.weight("lm_head.weight", shape, rows=shard.vocab)
        self.spec, self.parallel = spec, build.parallel
        self.embedding = Embedding(dense(table), shard.vocab, build.parallel)
        self.rope = build.layers.rope(spec)
        self.layers = [self.layer_class(build, i) for i in range(spec.num_layers)]
        self.norm = make_norm(build, "model.norm", plain_output=True)
        self.head = build.layers.linear(head, is_lm_head=True)
        self.vocab_widths = [end - start for start, end in split(spec.vocab_size, shard.size)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """i64[T] -> the residual stream [T, C]."""
        return self.embedding(ids)

    def rotations(self, positions: torch.Tensor) -> Sequence[Rotation | None]:
        """For each layer, the rotation of its queries and keys at `positions` i64[T]; None: they are not rotated."""
        return [self.rope(positions)] * len(self.layers)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, sample_rows: torch.Tensor | None, attend: AttentionBackend
    ) -> torch.Tensor:
        x, delta = self.states(ids, positions, attend)
        return self.logits(x, delta, sample_rows)

    def states(self, ids: torch.Tensor, positions: torch.Tensor, attend: AttentionBackend) -> tuple[torch.Tensor, Product]:
        x = self.embed(ids)  # [T, C]
        delta: Product | None = None
        for layer, rotation in zip(self.layers, self.rotations(positions), strict=True):
            delta = layer(x, delta, rotation, attend)  # [T, C]
        assert delta is not None
        return x, delta

    def final(self, x: torch.Tensor, delta: Product, rows: torch.Tensor) -> torch.Tensor:
        return plain(self.norm(x[rows], delta[rows]))  # [len(rows), C]

    def logits(self, x: torch.Tensor, delta: Product, sample_rows: torch.Tensor | None) -> torch.Tensor:
        if sample_rows is not None:
            if len(sample_rows) == 0:  # a step of prompt chunks that draws no token; the same on every rank
                return x.new_empty(0, sum(self.vocab_widths))
            x, delta = x[sample_rows], delta[sample_rows]
        logits = plain(self.head(self.norm(x, delta)))  # [rows, V of this rank]
        return softcap_(self.parallel.all_gather_cols(logits, self.vocab_widths), self.spec.logit_softcap)  # [rows, V]
