"""Phi-3 (arXiv:2404.14219), Phi-3.5 and Phi-4 (mini, and Phi-4 itself).  Runs in the workers.

A Llama whose checkpoint stores queries, keys and values, and the MLP's gate and up, on top of each other.  Long contexts are
`longrope` (minisgl.model.common.rope), windows and the rotated part of a head (`rotary_dim`, Phi-4 mini) are in the ModelSpec.
"""

from __future__ import annotations

import torch

from minisgl.config import ModelSpec
from minisgl.model.architectures.llama import Llama
from minisgl.model.checkpoint.loader import Weights
from minisgl.model.common.interfaces import LayerFactory
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Range, Shard


class Unstacked:
    """A checkpoint in which q_proj, k_proj, v_proj, gate_proj and up_proj are rows of qkv_proj and gate_up_proj."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self._weights = weights
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        inner = spec.intermediate_size
        self._rows = {  # name -> stacked name, all its rows, first row
            "q_proj": ("qkv_proj", q + 2 * kv, 0),
            "k_proj": ("qkv_proj", q + 2 * kv, q),
            "v_proj": ("qkv_proj", q + 2 * kv, q + kv),
            "gate_proj": ("gate_up_proj", 2 * inner, 0),
            "up_proj": ("gate_up_proj", 2 * inner, inner),
        }

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
        part = name.split(".")[-2]
        if part not in self._rows:
            return self._weights.take(name, shape, rows=rows, cols=cols)
        stacked, total, first = self._rows[part]
        start, end = rows or (0, shape[0])
        return self._weights.take(name.replace(part, stacked), (total, *shape[1:]), rows=(first + start, first + end))

    def finish(self) -> None:
        self._weights.finish()


class Phi3(Llama):
    """Phi3ForCausalLM, the part of it that `shard` owns."""

    def __init__(self, spec: ModelSpec, shard: Shard, weights: Weights, parallel: Parallel, blocks: LayerFactory) -> None:
        super().__init__(spec, shard, Unstacked(spec, weights), parallel, blocks)
