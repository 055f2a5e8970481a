"""Decoder layers on an NVIDIA GPU.  Runs in the workers.

Between layers travel plain rows [T, N], f32 parts [parts, T, N] of a product whose sum over K was cut, or `Quantized` or
`Scaled` rows (minisgl.model.kernels.activations).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from minisgl.config import ModelSpec
from minisgl.model.common.interfaces import Activations, Biases, Positions
from minisgl.model.common.interfaces import Norm as NormLayer
from minisgl.model.common.rope import frequencies
from minisgl.model.kernels import moe, norm_activation, qk_norm_rope
from minisgl.model.kernels.activations import Product, Quantized, Scaled
from minisgl.model.kernels.small_batch_matmul import choose, few_rows, settings, skinny

# The paths of an FP8 layer by the number of its rows (scripts/bench/row_counts.py).  A step of 14B took 5.1 ms at one row with
# 16-bit rows and 8-bit weights; 10.7, 11.4 and 11.8 ms at 2, 8 and 16 rows, where converting the weights for the matrix unit
# takes longer than reading them; and 5.3 ms at 17 rows with the library's float8 products.
WEIGHT_ONLY_ROWS = 1  # up to here 16-bit rows
OUR_ROWS = 0  # up to here float8 rows through our kernel, which reads no more than the weights and scales its own results
LIBRARY_ROWS = 24  # the library's products get at least as many rows: below 17 it takes twice as long
ONE_SCALE_ROWS = 1024  # up to here the library is faster with one scale than with one for each row and column


class Linear:
    """Few rows through our kernels, where they are faster, many through cuBLAS."""

    def __init__(self, weight: torch.Tensor, no_partial_sums: bool) -> None:
        self.weight, self._no_partial_sums = weight, no_partial_sums

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        n, k = self.weight.shape
        settings = None if x.dtype == torch.float32 else choose(len(x), n, k, no_partial_sums=self._no_partial_sums)
        if settings is None:
            return F.linear(x, self.weight)
        return few_rows(x, self.weight, settings)


class Fp8Product:
    """Products of rows and a weight [N, K] in float8, with a scale for each output channel and for each row."""

    def __init__(self, weight: torch.Tensor) -> None:
        quantized = norm_activation.quantize_rows(weight)
        self.weight, self.scales = quantized.values, quantized.scales.view(-1)
        self._one = torch.ones((), dtype=torch.float32, device=weight.device)

    def ours(self, x: torch.Tensor | Quantized, **options: bool) -> torch.Tensor:
        """Plain or float8 rows through our kernels."""
        n, k = self.weight.shape
        gated = options.get("gated", False)
        if isinstance(x, Quantized):
            found = settings(max(2, len(x.values)), n, k, fp8=True, **options)
            return skinny(x.values, self.weight, scales=self.scales, row_scales=x.scales, gated=gated, **found)
        return few_rows(x, self.weight, choose(len(x), n, k, fp8=True, **options) or {}, scales=self.scales, gated=gated)

    def library(self, x: Quantized, *, no_partial_sums: bool = False) -> Product:
        """bfloat16 rows, still to be scaled if that makes the product faster and the next layer can (not `no_partial_sums`)."""
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
    """Float8 weights times float8 rows; up to WEIGHT_ONLY_ROWS rows stay in 16 bits."""

    def __init__(self, weight: torch.Tensor, no_partial_sums: bool) -> None:
        self._product, self._no_partial_sums = Fp8Product(weight), no_partial_sums

    def __call__(self, x: Activations) -> Product:
        if not isinstance(x, Quantized):
            if len(x) <= WEIGHT_ONLY_ROWS:
                return self._product.ours(x, no_partial_sums=self._no_partial_sums)
            x = norm_activation.quantize_rows(x)
        product = self._product.ours if len(x.values) <= OUR_ROWS else self._product.library
        return product(x, no_partial_sums=self._no_partial_sums)


class Gated:
    """silu(gate) * up of [gate, up] weights: in the product's own kernel where that is ours."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        n, k = self.weight.shape
        settings = None if x.dtype == torch.float32 else choose(len(x), n, k, gated=True)
        if settings is None:
            return norm_activation.silu_mul(F.linear(x, self.weight))
        return few_rows(x, self.weight, settings, gated=True)


class Fp8Gated:
    """As Gated; what it hands on is float8, too, where the next layer wants that."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._product = Fp8Product(weight)

    def __call__(self, x: Activations) -> Activations:
        if not isinstance(x, Quantized) or len(x.values) <= OUR_ROWS:
            return self._product.ours(x, gated=True)
        return norm_activation.silu_mul_quantized(self._product.library(x))


class Biased:
    """A product of whole rows, plus a bias [N]."""

    def __init__(self, product: Callable[[Activations], Activations], bias: torch.Tensor) -> None:
        self._product, self._bias = product, bias

    def __call__(self, x: Activations) -> torch.Tensor:
        rows: torch.Tensor = self._product(x)
        return rows.add_(self._bias)


class GeluGated:
    """gelu(gate) * up of a product with [gate, up] weights."""

    def __init__(self, product: Callable[[Activations], torch.Tensor]) -> None:
        self._product = product

    def __call__(self, x: Activations) -> torch.Tensor:
        return norm_activation.silu_mul(self._product(x), gelu=True)


class Experts:
    """A mixture of experts.  Hands on a part for each of a token's choices, or their sum if the ranks add up theirs first."""

    def __init__(
        self,
        router: Callable[[Activations], torch.Tensor],
        weights: moe.Weights,
        settings: moe.Settings,
        *,
        no_partial_sums: bool,
    ) -> None:
        self._router, self._weights, self._settings, self._no_partial_sums = router, weights, settings, no_partial_sums

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = moe.experts(x, self._router(x), self._weights, self._settings)
        return parts.sum(0) if self._no_partial_sums else parts


class Norm:
    """RMSNorm; hands on float8 rows where the next layer wants them."""

    def __init__(self, weight: torch.Tensor, eps: float, quantize: bool) -> None:
        self._weight, self._eps, self._quantize = weight, eps, quantize

    def __call__(self, x: torch.Tensor, delta: Product | None = None) -> Activations:
        quantize = self._quantize and len(x) > WEIGHT_ONLY_ROWS
        return norm_activation.add_rms_norm(x, delta, self._weight, self._eps, quantize=quantize)


class CudaLayers:
    """`no_partial_sums`: products are never handed on in parts, because ranks add theirs up.  `fp8`: all but the LM head."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, no_partial_sums: bool = False, fp8: bool = False) -> None:
        self._dtype, self._device, self._no_partial_sums, self._fp8 = dtype, device, no_partial_sums, fp8

    def linear(
        self, *weights: torch.Tensor, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> Callable[[Activations], Activations]:
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        no_partial_sums |= self._no_partial_sums or bias is not None
        product = (
            Fp8Linear(weight, no_partial_sums)
            if self._fp8 and not is_lm_head
            else Linear(weight, no_partial_sums or is_lm_head)
        )
        return product if bias is None else Biased(product, bias)

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> NormLayer:
        return Norm(weight, eps, self._fp8 and not plain_output)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> Callable[[Activations], Activations]:
        if activation == "gelu_tanh":
            return GeluGated(self.linear(gate, up, no_partial_sums=True))
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
    ) -> Callable[[Activations], Activations]:
        product = Linear(router, no_partial_sums=True)
        settings = moe.Settings(top_k, normalise, activation == "clamped_swiglu")
        if biases is None:
            return Experts(product, moe.Weights(gate_up, down), settings, no_partial_sums=self._no_partial_sums)
        return Experts(
            Biased(product, biases[0]), moe.Weights(gate_up, down, *biases[1:]), settings, no_partial_sums=self._no_partial_sums
        )

    def rope(self, spec: ModelSpec) -> Positions:
        freqs, amplitude = frequencies(spec)
        freqs = freqs.to(self._device)
        return lambda positions: qk_norm_rope.rope_tables(positions, freqs, amplitude)
