"""The building blocks of decoder models: linear layers, embeddings, norms and activations.  Runs in the workers.

Shapes: T tokens of a step, C hidden size, H query heads, K KV heads (of this rank), D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from minisgl.config import ModelSpec
from minisgl.model.common.functional import act_mul, rms_norm, route
from minisgl.model.common.interfaces import Activations, Biases, Norm, Positions
from minisgl.model.common.rope import Rope

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


class CpuLayers:
    """Plain torch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def linear(
        self, *weights: torch.Tensor, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> Callable[[Activations], Activations]:
        return Linear(*weights, bias=bias)

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> Norm:
        return RMSNorm(weight, eps)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> Callable[[Activations], Activations]:
        both = Linear(gate, up)
        return lambda x: act_mul(both(x), activation)

    def experts(
        self,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        top_k: int,
        normalise: bool,
        activation: str = "silu",
        biases: Biases | None = None,
    ) -> Callable[[Activations], Activations]:
        return Experts(router, gate_up, down, top_k=top_k, normalise=normalise, activation=activation, biases=biases)

    def rope(self, spec: ModelSpec) -> Positions:
        return Rope(spec, self._dtype).at
