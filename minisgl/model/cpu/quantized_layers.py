"""Layers in 8 and 4 bits on a CPU: one call of a C kernel for a product with the norm before it.  Runs in the workers.

Weights have a scale for each group of 32 inputs, and so have activations, which are quantised on the way; sums within a group
are exact.  Each row is computed for itself.  Without a compiler the same arithmetic runs in torch, slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minisgl.model.checkpoint.gguf_blocks import FLOATS, GROUP, Groups, stored_bits, stored_groups, stored_rows, values
from minisgl.model.common.functional import act_mul
from minisgl.model.common.interfaces import Activations, Biases, Norm
from minisgl.model.cpu import kernels, layers
from minisgl.model.cpu.kernels import Kernels, PackedWeight
from minisgl.model.cpu.layers import CpuLayers
from minisgl.model.cpu.packing import LANES, quantise, round_trip


class Normed:
    """Rows that are yet to be normalised: the product that takes them does it.

    `x` is the residual stream; a `delta` is added to it in place by whoever looks first.
    """

    def __init__(self, x: torch.Tensor, delta: torch.Tensor | None, norm: QuantNorm) -> None:
        self.x, self.delta, self.norm = x, delta, norm

    def plain(self) -> torch.Tensor:
        """[T, C]."""
        delta, self.delta = self.delta, None
        return layers.RMSNorm.__call__(self.norm, self.x, delta)


def plain(rows: Activations) -> torch.Tensor:
    """A tensor of rows that may be Normed."""
    return rows.plain() if isinstance(rows, Normed) else rows


class QuantNorm(layers.RMSNorm):
    """An RMSNorm that is left to the next product."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__(weight.float().contiguous(), eps)
        self.struct = kernels.Norm(self._weight.data_ptr(), eps)

    def __call__(self, x: Activations, delta: Activations | None = None) -> Activations:
        return Normed(plain(x), None if delta is None else plain(delta), self)


class PlainNorm(layers.RMSNorm):
    """One whose rows are looked at."""

    def __call__(self, x: Activations, delta: Activations | None = None) -> torch.Tensor:
        return super().__call__(plain(x), None if delta is None else plain(delta))


class QuantLinear:
    """A product on the C kernel: [T, K] or Normed -> f32[T, N]."""

    def __init__(self, weight: PackedWeight, run: Kernels) -> None:
        self._weight, self._run = weight, run

    def __call__(self, x: Activations) -> torch.Tensor:
        if isinstance(x, Normed):
            delta, x.delta = x.delta, None
            return self._run.linear(self._weight, x.x, None if delta is None else delta.contiguous(), x.norm.struct)
        return self._run.linear(self._weight, x.contiguous(), None, None)


class TorchLinear:
    """The same in torch, on dequantised weights."""

    def __init__(self, parts: list[Groups], inputs: int, bias: torch.Tensor | None) -> None:
        self._linear = layers.Linear(torch.cat([p.values()[:, :inputs] for p in parts]), bias=bias)
        self._inputs = inputs

    def __call__(self, x: Activations) -> torch.Tensor:
        return self._linear(round_trip(plain(x))[:, : self._inputs])


class QuantizedLayers(CpuLayers):
    """See `LayerFactory`.  Experts stay in float32."""

    def __init__(self, kind: str, run: Kernels | None) -> None:
        """`kind`: "int8" | "q4" | "auto", see `EngineConfig.quantization`; run None: torch."""
        super().__init__(torch.float32)
        self._kind, self._run = kind, run

    def linear(
        self, *weights: torch.Tensor, bias: torch.Tensor | None = None, is_lm_head: bool = False, no_partial_sums: bool = False
    ) -> Callable[[Activations], Activations]:
        inputs, bits = weights[0].shape[1], self.bits(weights)
        if self._run is None:
            groups = [stored_groups(w) if stored_bits(w) == bits else quantise(values(w), bits) for w in weights]
            return TorchLinear(groups, inputs, bias)
        blocks = self._run.pack(_parts(weights, bits), inputs, bits)
        return QuantLinear(PackedWeight(blocks, sum(len(w) for w in weights), inputs, bias=bias), self._run)

    def norm(self, weight: torch.Tensor, eps: float, plain_output: bool = False) -> Norm:
        return PlainNorm(weight.float(), eps) if plain_output else QuantNorm(weight, eps)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu") -> Callable[[Activations], Activations]:
        if self._run is None or len(gate) % LANES or activation not in PackedWeight.GATED:
            both = self.linear(gate, up)
            return lambda x: act_mul(both(x), activation)
        inputs, bits = gate.shape[1], self.bits((gate, up))
        blocks = self._run.pack(_parts((gate, up), bits), inputs, bits, in_turns=True)
        return QuantLinear(PackedWeight(blocks, 2 * len(gate), inputs, gated=activation), self._run)

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
        run = super().experts(router, gate_up, down, top_k=top_k, normalise=normalise, activation=activation, biases=biases)
        return lambda x: run(plain(x))

    def bits(self, weights: Sequence[torch.Tensor]) -> int:
        """Of the weights of one product, which all have the same."""
        stored = [stored_bits(w) for w in weights]
        if self._kind != "int8" and set(stored) == {4}:
            return 4
        # The table of tokens is the head, too, where 4 bits cost most: it stays at 8 unless it is stored in 4.
        return 4 if self._kind == "q4" and weights[0].shape[1] % GROUP == 0 and not stored[0] else 8


def _parts(weights: tuple[torch.Tensor, ...], bits: int) -> list[tuple[torch.Tensor, int]]:
    """What `Kernels.pack` takes: stored rows where they have that many bits."""

    def part(w: torch.Tensor) -> tuple[torch.Tensor, int]:
        if stored_bits(w) == bits:
            return stored_rows(w)
        numbers = w if w.dtype in FLOATS and not w.is_meta else values(w)
        return numbers, FLOATS[numbers.dtype]

    return [part(w) for w in weights]
