"""Computes a decoder's small operations in torch: the readable reference of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, computed in the weight's dtype, returned in x's."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def act_mul(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """[T, 2 I] (gate, up) -> act(gate) * up, [T, I].  activation: see ModelSpec."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(1.702 * gate))
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)


def softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap) in place, which stays within +-cap; with cap 0, x unchanged (Gemma 2, arXiv:2408.00118)."""
    return x.div_(cap).tanh_().mul_(cap) if cap else x


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension.  sinks: one more score for each row, which takes its share and is left out."""
    if sinks is None:
        return scores.softmax(-1)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


def route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (experts i64[T, top_k], their weights f32[T, top_k]): see ExpertWeights."""
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return experts, weights / weights.sum(-1, keepdim=True) if normalise else weights
