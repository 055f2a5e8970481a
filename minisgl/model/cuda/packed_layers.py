"""Linear layers whose weights stay in 4 or 8 bits on the GPU, as their checkpoint has them.  Runs in the workers.

`packed` says which can: all matrices of a product must be quantised, for groups of inputs that a tile can hold
(packed_matmul.packs).  Matrices of different kinds in one product (Q4_K and Q6_K of queries, keys and values) share the wider
numbers and the smaller groups, which changes no value.  Others are dequantised as they load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from minisgl.model.common.activations import Activations, PartialSums, plain
from minisgl.model.common.weights import QuantizedWeight, Weight
from minisgl.model.kernels.packed_matmul import Packed, matmul, pack, packs


class PackedLinear:
    """x @ weight.T; silu(gate) * up of gated weights."""

    def __init__(self, weight: Packed, order: torch.Tensor | None, no_partial_sums: bool) -> None:
        """order: of the inputs in the weight, None: as they come."""
        self.weight, self._order, self._no_partial_sums = weight, order, no_partial_sums

    def __call__(self, x: Activations) -> torch.Tensor | PartialSums:
        rows = plain(x) if self._order is None else plain(x).index_select(1, self._order)
        return matmul(rows, self.weight, no_partial_sums=self._no_partial_sums)


def packed(
    weights: Sequence[Weight], dtype: torch.dtype, device: torch.device, *, gated: bool = False, no_partial_sums: bool = False
) -> PackedLinear | None:
    """The layer of matrices on top of each other; None where they cannot stay as they are."""
    if dtype not in (torch.bfloat16, torch.float16) or not all(isinstance(w, QuantizedWeight) for w in weights):
        return None
    parts = [w.quants(device) for w in weights if isinstance(w, QuantizedWeight)]
    bits, group = max(p.bits for p in parts), math.gcd(*(p.group for p in parts))
    order, inputs = parts[0].order, parts[0].numbers.shape[1]
    same = all((p.order is None) if order is None else (p.order is not None and torch.equal(p.order, order)) for p in parts)
    if not same or not packs(bits, group, inputs) or (gated and len(parts[0].numbers) % 8):
        return None

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(p, name).repeat_interleave(p.group // group, 1)[:, : -(-inputs // group)] for p in parts])

    numbers = torch.cat([p.numbers for p in parts])
    weight = pack(numbers, joined("scales"), joined("zeros"), bits, group, dtype, gated=gated)
    return PackedLinear(weight, order, no_partial_sums)
