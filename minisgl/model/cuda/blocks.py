"""Decoder layers on an NVIDIA GPU.  Runs in the workers.

Between layers travel plain rows [T, N], f32 parts [parts, T, N] of a product whose sum over K was cut, or `Quantized` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minisgl.config import ModelSpec
from minisgl.model.blocks import Norm as NormLayer
from minisgl.model.blocks import Positions, Rows
from minisgl.model.kernels import layer, moe
from minisgl.model.kernels.linear import choose, few_rows
from minisgl.model.layers import Biases
from minisgl.model.rope import frequencies

WEIGHT_ONLY_ROWS = 16  # up to here an FP8 layer multiplies plain rows by its 8-bit weights: reading those is all that counts


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows as float8_e4m3fn [T, N] and a scale f32 [T, 1] for each."""

    values: torch.Tensor
    scales: torch.Tensor


class Linear:
    """Few rows through our kernels, where they are faster, many through cuBLAS."""

    def __init__(self, weight: torch.Tensor, whole: bool) -> None:
        self._weight, self._whole = weight, whole

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        n, k = self._weight.shape
        settings = None if x.dtype == torch.float32 else choose(len(x), n, k, whole=self._whole)
        if settings is None:
            return F.linear(x, self._weight)
        return few_rows(x, self._weight, settings)


def scaled_product(x: Quantized, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x @ weight.T -> bfloat16 [T, N], for float8 weights [N, K] with scales f32 [1, N]."""
    y: torch.Tensor = torch._scaled_mm(
        x.values, weight.t(), scale_a=x.scales, scale_b=scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y


class Fp8Linear:
    """W8A8: a scale for each output channel and for each row; up to WEIGHT_ONLY_ROWS rows W8A16."""

    def __init__(self, weight: torch.Tensor, whole: bool) -> None:
        self._weight, scales = layer.quantize_rows(weight)
        self._scales = scales.view(1, -1)
        self._whole = whole

    def __call__(self, x: Rows) -> torch.Tensor:
        if not isinstance(x, Quantized):
            if len(x) <= WEIGHT_ONLY_ROWS:
                n, k = self._weight.shape
                settings = choose(len(x), n, k, whole=self._whole, fp8=True)
                return few_rows(x, self._weight, settings or {}, scales=self._scales)
            x = Quantized(*layer.quantize_rows(x))
        return scaled_product(x, self._weight, self._scales)


class Gated:
    """silu(gate) * up of [gate, up] weights: in the product's own kernel where that is ours."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        n, k = self._weight.shape
        settings = None if x.dtype == torch.float32 else choose(len(x), n, k, gated=True)
        if settings is None:
            return layer.silu_mul(F.linear(x, self._weight))
        return few_rows(x, self._weight, settings, gated=True)


class Fp8Gated:
    """As Gated; what it hands on is float8, too, where the next layer wants that."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight, scales = layer.quantize_rows(weight)
        self._scales = scales.view(1, -1)

    def __call__(self, x: Rows) -> Rows:
        if not isinstance(x, Quantized):
            n, k = self._weight.shape
            settings = choose(len(x), n, k, gated=True, fp8=True) or {}
            return few_rows(x, self._weight, settings, scales=self._scales, gated=True)
        return Quantized(*layer.silu_mul_quantized(scaled_product(x, self._weight, self._scales)))


class Biased:
    """A product of whole rows, plus a bias [N]."""

    def __init__(self, product: Callable[[Rows], torch.Tensor], bias: torch.Tensor) -> None:
        self._product, self._bias = product, bias

    def __call__(self, x: Rows) -> torch.Tensor:
        return self._product(x).add_(self._bias)


class GeluGated:
    """gelu(gate) * up of a product with [gate, up] weights."""

    def __init__(self, product: Callable[[Rows], torch.Tensor]) -> None:
        self._product = product

    def __call__(self, x: Rows) -> torch.Tensor:
        return layer.silu_mul(self._product(x), gelu=True)


class Experts:
    """A mixture of experts.  Hands on a part for each of a token's choices, or their sum if the ranks add up theirs first."""

    def __init__(
        self, router: Callable[[Rows], torch.Tensor], weights: moe.Weights, settings: moe.Settings, *, whole: bool
    ) -> None:
        self._router, self._weights, self._settings, self._whole = router, weights, settings, whole

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = moe.experts(x, self._router(x), self._weights, self._settings)
        return parts.sum(0) if self._whole else parts


class Norm:
    """RMSNorm; hands on float8 rows where the next layer wants them."""

    def __init__(self, weight: torch.Tensor, eps: float, quantize: bool) -> None:
        self._weight, self._eps, self._quantize = weight, eps, quantize

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> Rows:
        quantize = self._quantize and len(x) > WEIGHT_ONLY_ROWS
        rows, scales = layer.add_rms_norm(x, delta, self._weight, self._eps, quantize=quantize)
        return rows if scales is None else Quantized(rows, scales)


class CudaBlocks:
    """`whole`: products are never handed on in parts: ranks add theirs up first.  `fp8`: for all layers but the last."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, whole: bool = False, fp8: bool = False) -> None:
        self._dtype, self._device, self._whole, self._fp8 = dtype, device, whole, fp8

    def linear(
        self, *weights: torch.Tensor, bias: torch.Tensor | None = None, last: bool = False, whole: bool = False
    ) -> Callable[[Rows], Rows]:
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        whole |= self._whole or bias is not None
        product = Fp8Linear(weight, whole) if self._fp8 and not last else Linear(weight, whole or last)
        return product if bias is None else Biased(product, bias)

    def norm(self, weight: torch.Tensor, eps: float, last: bool = False) -> NormLayer:
        return Norm(weight, eps, self._fp8 and not last)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> Callable[[Rows], Rows]:
        if activation == "gelu_tanh":
            return GeluGated(self.linear(gate, up, whole=True))
        weight = torch.cat((gate, up))
        return Fp8Gated(weight) if self._fp8 else Gated(weight)

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
    ) -> Callable[[Rows], Rows]:
        product = Linear(router, whole=True)
        settings = moe.Settings(top_k, normalise, activation == "clamped_swiglu")
        if biases is None:
            return Experts(product, moe.Weights(gate_up, down), settings, whole=self._whole)
        return Experts(Biased(product, biases[0]), moe.Weights(gate_up, down, *biases[1:]), settings, whole=self._whole)

    def rope(self, spec: ModelSpec) -> Positions:
        freqs, amplitude = frequencies(spec)
        freqs = freqs.to(self._device)
        return lambda positions: layer.rope_tables(positions, freqs, amplitude)
