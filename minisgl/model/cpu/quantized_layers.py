"""Layers in 8 and 4 bits on a CPU: one call of a C kernel for a product and the norm before it.  Runs in the workers.

Weights have a scale for each group of 32 inputs, and so have activations, which are quantised on the way; sums within a group
are exact.  Each row is computed for itself.  Without a compiler the same arithmetic runs in torch, slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minisgl.model.common.activations import Activations, Product, plain
from minisgl.model.common.gguf_blocks import FLOATS, GROUP, Groups, from_gguf, stored_bits
from minisgl.model.common.interfaces import GatedLayer, LinearLayer, NormLayer
from minisgl.model.common.memory import LANES, bits_of
from minisgl.model.common.weights import StoredWeight, Weight, dense
from minisgl.model.cpu import kernels, layers
from minisgl.model.cpu.kernels import Kernels, PackedWeight
from minisgl.model.cpu.layers import CpuLayers, RMSNorm
from minisgl.model.cpu.packing import quantise, round_trip


class Normed:  # a DeferredNorm, not derived from it: isinstance() is slow for a class derived from a protocol
    """Rows x [T, C] of the residual stream that the next product normalises; the first reader adds `delta` to them in place."""

    def __init__(self, x: torch.Tensor, delta: torch.Tensor | None, norm: QuantNorm) -> None:
        self.x, self.norm, self._delta = x, norm, delta

    def take_delta(self) -> torch.Tensor | None:
        """The delta if it is still to be added, for the caller to do so."""
        delta, self._delta = self._delta, None
        return delta

    def rows(self) -> torch.Tensor:
        return self.norm.plain(self.x, self.take_delta())


class QuantNorm:
    """An RMSNorm that is left to the next product."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        weight = weight.float().contiguous()
        self.plain = RMSNorm(weight, eps)
        self.struct = kernels.Norm(weight.data_ptr(), eps)

    def __call__(self, x: torch.Tensor, delta: Product | None = None) -> Normed:
        return Normed(x, None if delta is None else plain(delta), self)


class QuantLinear:
    """A product on the C kernel: f32[T, K] -> f32[T, N]."""

    def __init__(self, weight: PackedWeight, run: Kernels) -> None:
        self._weight, self._run = weight, run

    def __call__(self, x: Activations) -> torch.Tensor:
        if isinstance(x, Normed):
            delta = x.take_delta()
            return self._run.linear(self._weight, x.x, None if delta is None else delta.contiguous(), x.norm.struct)
        return self._run.linear(self._weight, plain(x).contiguous(), None, None)


class TorchLinear:
    """The same in torch, on dequantised weights."""

    def __init__(self, parts: Sequence[Groups], inputs: int, bias: torch.Tensor | None) -> None:
        self._linear = layers.Linear(*(p.values()[:, :inputs] for p in parts), bias=bias)
        self._inputs = inputs

    def __call__(self, x: Activations) -> torch.Tensor:
        return self._linear(round_trip(plain(x))[:, : self._inputs])


class QuantizedLayers(CpuLayers):
    """See `LayerFactory`.  Experts stay in float32."""

    def __init__(self, kind: str, run: Kernels | None) -> None:
        """kind: "int8" | "q4" | "auto", see `EngineConfig.quantization`.  run: None for torch."""
        super().__init__(torch.float32)
        self._kind, self._run = kind, run

    def linear(
        self, *weights: Weight, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> LinearLayer:
        inputs, bits = weights[0].shape[1], self.bits(weights)
        factors = [_row_factors(w, bits) for w in weights]
        if any(bool((f != 1).any()) for f in factors):
            near = [dense(w).float() / f[:, None] for w, f in zip(weights, factors, strict=True)]
            product, factor, offset = self.linear(*near), torch.cat(factors), 0 if bias is None else bias
            return lambda x: plain(product(x)) * factor + offset
        if self._run is None:
            return TorchLinear([_groups(w, bits) for w in weights], inputs, bias)
        blocks = self._run.pack([_rows(w, bits) for w in weights], inputs, bits)
        return QuantLinear(PackedWeight(blocks, sum(w.shape[0] for w in weights), inputs, bias=bias), self._run)

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> NormLayer:
        return RMSNorm(weight.float(), eps) if plain_output else QuantNorm(weight, eps)

    def gated(self, gate: Weight, up: Weight, *, activation: str = "silu") -> GatedLayer:
        width, inputs = gate.shape
        bits = self.bits((gate, up))
        scaled = any(bool((_row_factors(w, bits) != 1).any()) for w in (gate, up))
        if scaled or self._run is None or width % LANES or activation not in PackedWeight.GATED:
            return super().gated(gate, up, activation=activation)
        blocks = self._run.pack([_rows(gate, bits), _rows(up, bits)], inputs, bits, in_turns=True)
        return QuantLinear(PackedWeight(blocks, 2 * width, inputs, gated=activation), self._run)

    def bits(self, weights: Sequence[Weight]) -> int:
        """Bits of the weights of one product, which all have the same."""
        return bits_of(self._kind, [stored_bits(w) for w in weights])


def _row_factors(weight: Weight, bits: int) -> torch.Tensor:
    """Powers of two f32[N] to divide the rows of a matrix by before it is rounded: 1 unless half precision cannot hold a scale.

    The largest weight of such a row becomes 2^14, so that groups down to 2^-21 of it keep their precision.
    """
    if isinstance(weight, StoredWeight) and stored_bits(weight) == bits:
        return torch.ones(weight.shape[0])  # packed as it is stored
    rows = dense(weight)
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).view(len(rows), -1, GROUP)
    most = torch.maximum(groups.amax(-1), -groups.amin(-1)).float()
    largest, least = most.amax(-1), most.masked_fill(most == 0, 1).amin(-1)
    outside = (largest > 2.0**15) | (least < 2.0**-16)
    return torch.where(outside & (largest > 0), torch.exp2(largest.log2().floor() - 14), 1)


def _rows(weight: Weight, bits: int) -> tuple[torch.Tensor, int]:
    """The rows that `Kernels.pack` reads and their type: as stored if they have that many bits, otherwise numbers to round."""
    if isinstance(weight, StoredWeight) and stored_bits(weight) == bits:
        return weight.read(), weight.kind
    rows = dense(weight)
    rows = rows if rows.dtype in FLOATS else rows.float()
    return rows, FLOATS[rows.dtype]


def _groups(weight: Weight, bits: int) -> Groups:
    """The same for torch."""
    if isinstance(weight, StoredWeight) and stored_bits(weight) == bits:
        return from_gguf(weight.read(), weight.kind)
    return quantise(dense(weight), bits)
