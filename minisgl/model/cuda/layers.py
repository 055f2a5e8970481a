"""Decoder layers on an NVIDIA GPU: `CudaLayers`, a LayerFactory of fused kernels.  Runs in the workers.

Between layers travel what the next kernel reads fastest: tensors [T, N], PartialSums of a product whose sum over K was cut,
Quantized rows before an FP8 product and Scaled ones after it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minisgl.config import ModelSpec
from minisgl.model.common.activations import Activations, PartialSums, Product, Quantized, Scaled, Summand, plain
from minisgl.model.common.interfaces import ExpertWeights, GatedLayer, LinearLayer, NormLayer, RopeLayer
from minisgl.model.common.rope import frequencies
from minisgl.model.common.weights import Weight, stacked
from minisgl.model.cuda.packed_layers import packed
from minisgl.model.kernels import moe, norm_activation, qk_norm_rope
from minisgl.model.kernels.small_batch_matmul import choose, few_rows, settings, skinny

# The paths of an FP8 layer by the number of its rows (scripts/bench/row_counts.py).  A step of 14B takes 4.86, 4.93, 5.20 and
# 5.73 ms at 1, 2, 16 and 32 rows with our kernel, and 5.08, 5.21, 5.44 and 5.82 with the library; at 48 rows 6.18 and 6.05.
OUR_ROWS = 32  # up to here our kernel, which reads no more than the weights and scales its own results
LIBRARY_ROWS = 24  # the library's products get at least as many rows: below 17 it takes twice as long
ONE_SCALE_ROWS = 1024  # up to here the library is faster with one scale than with one for each row and column


class Linear:
    """Few rows through our kernels, where they are faster, many through cuBLAS."""

    def __init__(self, weight: torch.Tensor, no_partial_sums: bool) -> None:
        self.weight, self._no_partial_sums = weight, no_partial_sums

    def __call__(self, x: Activations) -> torch.Tensor | PartialSums:
        rows, (n, k) = plain(x), self.weight.shape
        settings = None if rows.dtype == torch.float32 else choose(len(rows), n, k, no_partial_sums=self._no_partial_sums)
        return F.linear(rows, self.weight) if settings is None else few_rows(rows, self.weight, settings)


class Fp8Product:
    """Products of rows and a weight [N, K] in float8, with a scale for each output channel and for each row."""

    def __init__(self, weight: torch.Tensor) -> None:
        quantized = norm_activation.quantize_rows(weight)
        self.weight, self.scales = quantized.values, quantized.scales.view(-1)
        self._one = torch.ones((), dtype=torch.float32, device=weight.device)

    def takes(self, x: Quantized) -> bool:
        """Whether our kernel does the product; its tiles are at least 64 inputs deep."""
        return len(x.values) <= OUR_ROWS and self.weight.shape[1] % 64 == 0

    def ours(self, x: Quantized, **options: bool) -> torch.Tensor | PartialSums:
        """Few rows through our kernel, as bfloat16 or partial sums."""
        found = settings(max(2, len(x.values)), *self.weight.shape, fp8=True, **options)
        return skinny(x.values, self.weight, scales=(x.scales, self.scales), gated=options.get("gated", False), **found)

    def library(self, x: Quantized, *, no_partial_sums: bool = False) -> torch.Tensor | Scaled:
        """bfloat16, still to be scaled where that makes the product faster, unless `no_partial_sums` forbids it."""
        rows = len(x.values)
        values = norm_activation.with_spare_rows(x.values, LIBRARY_ROWS)
        if no_partial_sums or rows > ONE_SCALE_ROWS:
            scales = norm_activation.with_spare_rows(x.scales, LIBRARY_ROWS)
            return self._scaled_mm(values, scales, self.scales.view(1, -1))[:rows]
        return Scaled(self._scaled_mm(values, self._one, self._one)[:rows], x.scales, self.scales)

    def _scaled_mm(self, x: torch.Tensor, scale_x: torch.Tensor, scale_w: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch._scaled_mm(
            x, self.weight.t(), scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return y


class Fp8Linear:
    """Float8 weights times float8 rows."""

    def __init__(self, weight: torch.Tensor, no_partial_sums: bool) -> None:
        self._product, self._no_partial_sums = Fp8Product(weight), no_partial_sums

    def __call__(self, x: Activations) -> Product:
        if not isinstance(x, Quantized):
            x = norm_activation.quantize_rows(plain(x))
        if self._product.takes(x):
            return self._product.ours(x, no_partial_sums=self._no_partial_sums)
        return self._product.library(x, no_partial_sums=self._no_partial_sums)


class Gated:
    """silu(gate) * up of [gate, up] weights: in the product's own kernel where that is ours."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Activations) -> torch.Tensor:
        rows, (n, k) = plain(x), self.weight.shape
        settings = None if rows.dtype == torch.float32 else choose(len(rows), n, k, gated=True)
        if settings is None:
            return norm_activation.silu_mul(F.linear(rows, self.weight))
        return plain(few_rows(rows, self.weight, settings, gated=True))


class Fp8Gated:
    """As Gated in float8: the output is Quantized, too, except from our kernel."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._product = Fp8Product(weight)

    def __call__(self, x: Activations) -> Activations:
        rows = x if isinstance(x, Quantized) else norm_activation.quantize_rows(plain(x))
        if self._product.takes(rows):
            return plain(self._product.ours(rows, gated=True))
        return norm_activation.silu_mul_quantized(self._product.library(rows))


def biased(product: LinearLayer, bias: torch.Tensor | None) -> LinearLayer:
    """A layer that returns tensors, plus a bias [N] if it has one."""
    return product if bias is None else lambda x: plain(product(x)).add_(bias)


class Experts:
    """A mixture of experts.  Returns a part for each of a token's choices, or their sum with `no_partial_sums`."""

    def __init__(self, weights: ExpertWeights, *, no_partial_sums: bool, fp8: bool = False) -> None:
        """fp8: of the experts; the router keeps its dtype, because small differences would choose others."""
        w = weights
        self._router = biased(Linear(w.router, no_partial_sums=True), w.router_bias)
        self._weights = moe.Weights(w.gate_up, w.down, w.gate_up_bias, w.down_bias)
        if fp8:
            self._weights = moe.in_float8(self._weights)
        self._settings = moe.Settings(w.top_k, w.normalise, clamped=w.activation == "clamped_swiglu")
        self._no_partial_sums = no_partial_sums

    def __call__(self, x: Activations) -> torch.Tensor | PartialSums:
        rows = plain(x)
        parts = moe.experts(rows, plain(self._router(rows)), self._weights, self._settings)
        return parts.sum(0) if self._no_partial_sums else PartialSums(parts)


class Norm:
    """RMSNorm; its output is Quantized with `quantize`, unless the next product multiplies plain rows."""

    def __init__(self, weight: torch.Tensor, eps: float, quantize: bool) -> None:
        self._weight, self._eps, self._quantize = weight, eps, quantize

    def __call__(self, x: torch.Tensor, delta: Product | None = None) -> torch.Tensor | Quantized:
        if isinstance(delta, Summand):
            return delta.sums.add_rms_norm(x, delta.part, self._weight, self._eps, quantize=self._quantize)
        return norm_activation.add_rms_norm(x, delta, self._weight, self._eps, quantize=self._quantize)


class CudaLayers:
    """See `LayerFactory`."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, no_partial_sums: bool = False, fp8: bool = False) -> None:
        """no_partial_sums: all products return tensors, because an all-reduce follows.  fp8: all but the LM head are in FP8."""
        self._dtype, self._device, self._no_partial_sums, self._fp8 = dtype, device, no_partial_sums, fp8

    def linear(
        self, *weights: Weight, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> LinearLayer:
        no_partial_sums |= self._no_partial_sums or bias is not None or is_lm_head
        if (found := packed(weights, self._dtype, self._device, no_partial_sums=no_partial_sums)) is not None:
            return biased(found, bias)
        weight = stacked(weights)
        fp8 = self._fp8 and not is_lm_head
        product: LinearLayer = Fp8Linear(weight, no_partial_sums) if fp8 else Linear(weight, no_partial_sums)
        return biased(product, bias)

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> NormLayer:
        return Norm(weight, eps, self._fp8 and not plain_output)

    def gated(self, gate: Weight, up: Weight, *, activation: str = "silu") -> GatedLayer:
        if activation == "gelu_tanh":
            product = self.linear(gate, up, no_partial_sums=True)
            return lambda x: norm_activation.silu_mul(plain(product(x)), gelu=True)
        if (found := packed((gate, up), self._dtype, self._device, gated=True)) is not None:
            return found  # type: ignore[return-value]  # never in parts
        weight = stacked((gate, up))
        return Fp8Gated(weight) if self._fp8 else Gated(weight)

    def experts(self, weights: ExpertWeights) -> LinearLayer:
        return Experts(weights, no_partial_sums=self._no_partial_sums, fp8=self._fp8)

    def rope(self, spec: ModelSpec) -> RopeLayer:
        freqs, amplitude = frequencies(spec)
        freqs = freqs.to(self._device)
        return lambda positions: qk_norm_rope.rope_tables(positions, freqs, amplitude)
