"""Decoder layers on a CPU in torch: `CpuLayers`, the readable LayerFactory.  Runs in the workers.

Layers take and return tensors [T, N]; T tokens of a step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minisgl.config import ModelSpec
from minisgl.model.common.activations import Activations, Product, plain
from minisgl.model.common.functional import act_mul, rms_norm, route
from minisgl.model.common.interfaces import ExpertWeights, GatedLayer, LinearLayer, NormLayer, RopeLayer
from minisgl.model.common.rope import Rope
from minisgl.model.common.weights import Weight, stacked

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

    def __init__(self, *weights: Weight, bias: torch.Tensor | None = None) -> None:
        """Several weights [out_i, in] are fused into one.  Only the packed form is kept where there is one."""
        weight = stacked(weights)
        self._bias = bias
        self._packed = _pack(weight)
        self._weight = weight if self._packed is None else None

    def __call__(self, x: Activations) -> torch.Tensor:
        rows = plain(x)
        if self._packed is not None:
            return _packed_linear(rows, self._packed, self._bias)
        assert self._weight is not None
        return F.linear(rows, self._weight, self._bias)


class RMSNorm:
    """x / rms(x) * weight, over the last dimension; first adds a `delta` to x in place, if given."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor, delta: Product | None = None) -> torch.Tensor:
        if delta is not None:
            x += plain(delta)
        return rms_norm(x, self._weight, self._eps)


class Experts:
    """A mixture of experts, one after the other, each with the rows that chose it."""

    def __init__(self, weights: ExpertWeights) -> None:
        self._weights = weights

    def __call__(self, x: Activations) -> torch.Tensor:
        w, rows = self._weights, plain(x)
        experts, shares = route(F.linear(rows, w.router, w.router_bias), w.top_k, w.normalise)
        y = torch.zeros_like(rows)
        for e in sorted(set(experts.flatten().tolist())):
            token, choice = (experts == e).nonzero(as_tuple=True)
            gate_up_bias, down_bias = (None if b is None else b[e] for b in (w.gate_up_bias, w.down_bias))
            hidden = act_mul(F.linear(rows[token], w.gate_up[e], gate_up_bias), w.activation)
            part = F.linear(hidden, w.down[e], down_bias)
            y.index_add_(0, token, part * shares[token, choice, None].to(rows.dtype))
        return y


class CpuLayers:
    """See `LayerFactory`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def linear(
        self, *weights: Weight, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> LinearLayer:
        return Linear(*weights, bias=bias)

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> NormLayer:
        return RMSNorm(weight, eps)

    def gated(self, gate: Weight, up: Weight, *, activation: str = "silu") -> GatedLayer:
        gate_up = self.linear(gate, up)
        return lambda x: act_mul(plain(gate_up(x)), activation)

    def experts(self, weights: ExpertWeights) -> LinearLayer:
        return Experts(weights)

    def rope(self, spec: ModelSpec) -> RopeLayer:
        return Rope(spec, self._dtype).at
