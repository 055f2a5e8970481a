"""The building blocks of decoder models: linear layers, embeddings, norms and rotary positions.  Runs in the workers.

Shapes: T tokens of a step, C hidden size, H query heads, K KV heads (of this rank), D head size.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minisgl.config import ModelSpec
from minisgl.model.parallel import Parallel
from minisgl.model.shard import Range

BATCH_HINT = 16  # rows that oneDNN lays a packed weight out for; good from 1 to a few hundred


def _pack(weight: torch.Tensor) -> torch.Tensor | None:
    """`weight` in oneDNN's blocked layout, or None where this torch cannot multiply by it.

    F.linear reorders a float32 weight on every call; packing once makes a decode step nearly twice as fast.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_HINT)
        _packed_linear(weight.new_zeros(1, weight.shape[1]), packed)
    except (AttributeError, RuntimeError):  # internal operators: absent or different in other versions
        return None
    return packed


def _packed_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return y


class Linear:
    """y = x @ weight.T without bias: [T, in] -> [T, out]."""

    def __init__(self, *weights: torch.Tensor) -> None:
        """Several weights [out_i, in] are fused into one.  Only the packed form is kept where there is one."""
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._packed = _pack(weight)
        self._weight = weight if self._packed is None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return _packed_linear(x, self._packed)
        assert self._weight is not None
        return F.linear(x, self._weight)


class RMSNorm:
    """x / rms(x) * weight, over the last dimension; first adds a `delta` to x in place, if given."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        if delta is not None:
            x += delta
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


@dataclass(frozen=True, slots=True)
class QKNorm:
    """The RMSNorms of one layer's query and key heads: weights `q` and `k` [D], shared by all heads."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 I] (gate, up) -> silu(gate) * up, [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class Embedding:
    """Token ids i64[T] -> [T, C].  A rank holds the rows `vocab` and contributes zero for all other tokens."""

    def __init__(self, weight: torch.Tensor, vocab: Range, parallel: Parallel) -> None:
        self._weight = weight
        self._vocab = vocab
        self._parallel = parallel

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.size == 1:
            return F.embedding(ids, self._weight)
        start, end = self._vocab
        mine = (ids >= start) & (ids < end)
        x = F.embedding((ids - start).masked_fill_(~mine, 0), self._weight)
        return self._parallel.all_reduce_(x.masked_fill_(~mine[:, None], 0))


class Rope:
    """Rotary position embedding in the rotate-half layout: dimensions i and i + D/2 turn together by position * freq[i]."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._freqs = inverse_frequencies(spec).repeat(2)  # [D]
        self._sign = torch.ones(spec.head_dim)
        self._sign[: spec.head_dim // 2] = -1
        self._dtype = dtype

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [T, 1, D] of the step's positions i64[T], shared by all layers."""
        angles = torch.outer(positions.float(), self._freqs)[:, None]
        return angles.cos().to(self._dtype), (angles.sin() * self._sign).to(self._dtype)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn the heads x [T, heads, D] in place."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Radians per position, f32[D/2], after the checkpoint's scaling."""
    freqs: torch.Tensor = 1.0 / spec.rope_theta ** (
        torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    )
    scaling: dict[str, Any] = json.loads(spec.rope_scaling or '{"rope_type": "default"}')
    match scaling["rope_type"]:
        case "default":
            return freqs
        case "linear":
            return freqs / float(scaling["factor"])
        case "divisors":  # one per frequency, as GGUF files store Llama 3.1's scaling
            return freqs / torch.tensor(scaling["divisors"])
        case "llama3":
            return _llama3(freqs, scaling)
    raise ValueError(f"rope scaling {scaling['rope_type']!r} passed the resolver")


def _llama3(freqs: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: waves longer than the original context are slowed by `factor`, short ones kept, a ramp in between."""
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)  # of each wave within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: torch.Tensor = keep * freqs + (1 - keep) * freqs / scaling["factor"]
    return scaled
