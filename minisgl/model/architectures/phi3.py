"""Phi-3 (arXiv:2404.14219), Phi-3.5 and Phi-4 (mini, and Phi-4 itself): Llamas under stacked weights.  Runs in the workers.

Their checkpoints store queries, keys and values in one tensor, and the MLP's gate and up in another.  Long contexts
(`longrope`), windows and the rotated part of a head (`rotary_dim`, Phi-4 mini) are in the ModelSpec.
"""

from __future__ import annotations

from dataclasses import replace

from minisgl.config import ModelSpec
from minisgl.model.architectures.llama import Llama
from minisgl.model.common.interfaces import Build
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import Weight, Weights


class Unstacked:
    """A checkpoint in which q_proj, k_proj, v_proj, gate_proj and up_proj are rows of qkv_proj and gate_up_proj."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self._weights = weights
        q, kv, inner = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
        self._rows = {  # name -> stacked name, all its rows, first row
            "q_proj": ("qkv_proj", q + 2 * kv, 0),
            "k_proj": ("qkv_proj", q + 2 * kv, q),
            "v_proj": ("qkv_proj", q + 2 * kv, q + kv),
            "gate_proj": ("gate_up_proj", 2 * inner, 0),
            "up_proj": ("gate_up_proj", 2 * inner, inner),
        }

    def take(self, name: str, shape: tuple[int, ...], *, rows: Range | None = None, cols: Range | None = None) -> Weight:
        part = name.split(".")[-2]
        if part not in self._rows:
            return self._weights.take(name, shape, rows=rows, cols=cols)
        stacked, total, first = self._rows[part]
        start, end = rows or (0, shape[0])
        return self._weights.take(name.replace(part, stacked), (total, *shape[1:]), rows=(first + start, first + end))


class Phi3(Llama):
    """Phi3ForCausalLM."""

    def __init__(self, build: Build) -> None:
        super().__init__(replace(build, weights=Unstacked(build.spec, build.weights)))
