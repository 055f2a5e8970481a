"""Computes rotary position embeddings (RoPE), and stretches them over longer contexts.  Runs in the workers.

Su et al., RoFormer, arXiv:2104.09864, in the rotate-half layout: the first R of a head's D dimensions are rotated, of which i
and i + R/2 turn together by position * freq[i].

Two kinds of scaling depend on the length of the text: `dynamic` and `longrope`.  Keys in the cache are shared between requests
and cannot be turned again when a text grows, so the served context length decides: the tables are those of transformers for a
text of that length.
"""

from __future__ import annotations

import math

import torch

from minisgl.config import ModelSpec, RopeScaling


class Rope:
    """cos and sin in the form of the CPU's attention."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        freqs, self._amplitude = frequencies(spec)
        self._freqs = freqs.repeat(2)  # [R]
        self._sign = torch.ones(len(self._freqs))
        self._sign[: len(freqs)] = -1
        self._dtype = dtype

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [T, 1, R] of the step's positions i64[T]."""
        angles = torch.outer(positions.float(), self._freqs)[:, None]
        cos, sin = angles.cos() * self._amplitude, angles.sin() * self._amplitude
        return cos.to(self._dtype), (sin * self._sign).to(self._dtype)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn the first R dimensions of the heads x [T, heads, D] in place."""
    x = x[..., : cos.shape[-1]]
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)


def frequencies(spec: ModelSpec) -> tuple[torch.Tensor, float]:
    """Radians per position, f32[R/2], after the checkpoint's scaling, and the factor of cos and sin."""
    dim = spec.rotary_dim or spec.head_dim
    powers = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    freqs: torch.Tensor = 1.0 / spec.rope_theta**powers
    scaling = spec.rope_scaling
    if scaling is None:
        return freqs, 1.0
    match scaling.rope_type:
        case "linear":
            freqs = freqs / scaling.factor
        case "divisors":
            freqs = freqs / torch.tensor(scaling.divisors)
        case "dynamic":
            freqs = 1.0 / _dynamic_theta(spec, scaling, dim) ** powers
        case "llama3":
            freqs = _llama3(freqs, scaling)
        case "yarn":
            freqs = _yarn(freqs, spec.rope_theta, scaling, dim)
        case "longrope":
            longer = spec.max_context > scaling.original_max_position_embeddings
            freqs = 1.0 / (torch.tensor(scaling.long_factor if longer else scaling.short_factor) * spec.rope_theta**powers)
        case kind:
            raise ValueError(f"rope scaling {kind!r} passed the resolver")
    return freqs, scaling.attention_factor


def _dynamic_theta(spec: ModelSpec, scaling: RopeScaling, dim: int) -> float:
    """NTK-aware: a larger base, so that the slowest wave is stretched by as much as the text exceeds the original context."""
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    longest = max(spec.max_context, original)
    return float(spec.rope_theta * (factor * longest / original - (factor - 1)) ** (dim / (dim - 2)))


def _llama3(freqs: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: waves longer than the original context are slowed by `factor`, short ones kept, a ramp in between."""
    turns = scaling.original_max_position_embeddings * freqs / (2 * math.pi)  # of each wave within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: torch.Tensor = keep * freqs + (1 - keep) * freqs / scaling.factor
    return scaled


def _yarn(freqs: torch.Tensor, theta: float, scaling: RopeScaling, dim: int) -> torch.Tensor:
    """YaRN (Peng et al., arXiv:2309.00071, section 3.2): the same with a ramp over dimensions, between two numbers of turns."""

    def dimension(turns: float) -> float:
        """That makes `turns` turns within the original context."""
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    scaled: torch.Tensor = keep * freqs + (1 - keep) * freqs / scaling.factor
    return scaled
