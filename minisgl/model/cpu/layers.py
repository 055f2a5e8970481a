"""The building blocks of decoder models: linear layers, embeddings, norms and activations.  Runs in the workers.

Shapes: T tokens of a step, C hidden size, H query heads, K KV heads (of this rank), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Range

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


def _packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


class Linear:
    """y = x @ weight.T + bias: [T, in] -> [T, out]."""

    def __init__(self, *weights: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Several weights [out_i, in] are fused into one.  Only the packed form is kept where there is one."""
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._bias = bias
        self._packed = _pack(weight)
        self._weight = weight if self._packed is None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return _packed_linear(x, self._packed, self._bias)
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)


class RMSNorm:
    """x / rms(x) * weight, over the last dimension; first adds a `delta` to x in place, if given."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        if delta is not None:
            x += delta
        return rms_norm(x, self._weight, self._eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, in x's dtype; in float32 inside if that is the weight's."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


@dataclass(frozen=True, slots=True)
class QKNorm:
    """The RMSNorms of one layer's query and key heads: weights `q` and `k` [D], shared by all heads."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def act_mul(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """[T, 2 I] (gate, up) -> act(gate) * up, [T, I]; `activation`: see ModelSpec."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(1.702 * gate))
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)


def softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap) in place, which stays within +-cap; x itself where cap is 0 (Gemma 2, arXiv:2408.00118)."""
    return x.div_(cap).tanh_().mul_(cap) if cap else x


def softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension; `sinks`, which can be expanded to its size 1, take their share and are left out."""
    if sinks is None:
        return scores.softmax(-1)
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]


def route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (experts i64[T, top_k], their weights f32[T, top_k]): see Blocks.experts."""
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return experts, weights / weights.sum(-1, keepdim=True) if normalise else weights


Biases = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of a router [E], gate_up [E, 2 I] and down [E, C]


class Experts:
    """A mixture of experts, one after the other, each with the rows that chose it."""

    def __init__(
        self,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        top_k: int,
        normalise: bool,
        activation: str = "silu",
        biases: Biases | None = None,
    ) -> None:
        self._router, self._gate_up, self._down = router, gate_up, down
        self._top_k, self._normalise, self._activation = top_k, normalise, activation
        self._biases = biases or (None, [None] * len(down), [None] * len(down))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        router_bias, gate_up_bias, down_bias = self._biases
        experts, weights = route(F.linear(x, self._router, router_bias), self._top_k, self._normalise)
        y = torch.zeros_like(x)
        for e in sorted(set(experts.flatten().tolist())):
            rows, which = (experts == e).nonzero(as_tuple=True)
            hidden = act_mul(F.linear(x[rows], self._gate_up[e], gate_up_bias[e]), self._activation)
            part = F.linear(hidden, self._down[e], down_bias[e])
            y.index_add_(0, rows, part * weights[rows, which, None].to(x.dtype))
        return y


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
