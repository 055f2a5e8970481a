"""Types that the layers of a model hand to each other where a plain tensor [T, N] would cost an extra pass over memory.

A product returns a `Product`, and a norm or a gate returns `Activations`, which the next product takes.  A model passes both on
without looking inside.  On a GPU they save kernels; a CPU hands on tensors, or norms that the next product computes.

T tokens of a step, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class PartialSums:
    """A product whose sum over its inputs was cut into parts [parts, T, N]; the kernel that reads them adds them up."""

    parts: torch.Tensor

    def __getitem__(self, rows: torch.Tensor | slice) -> PartialSums:
        return PartialSums(self.parts[:, rows])

    def float(self) -> torch.Tensor:
        """f32[T, N]."""
        return self.parts.float().sum(0)


@dataclass(frozen=True, slots=True)
class Scaled:
    """values [T, N] * rows f32[T, 1] * columns f32[N]: an FP8 product whose scales the kernel that reads it applies.

    The library multiplies faster with one scale than with one for each row and column, and the next kernel reads the product
    anyway.
    """

    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def __getitem__(self, rows: torch.Tensor | slice) -> Scaled:
        return Scaled(self.values[rows], self.rows[rows], self.columns)

    def float(self) -> torch.Tensor:
        """f32[T, N]."""
        return self.values.float() * self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Quantized:
    """values float8_e4m3fn[T, N] * scales f32[T, 1]: the input of an FP8 product."""

    values: torch.Tensor
    scales: torch.Tensor


Part = torch.Tensor | PartialSums | Scaled


class Sums(Protocol):
    """Adds up the parts of all ranks, each call a collective: all ranks call in the same order, with parts of one shape."""

    def total(self, part: Part) -> torch.Tensor:
        """The sum [T, N] as a tensor, bitwise the same on every rank."""

    def add_rms_norm(
        self, x: torch.Tensor, part: Part, weight: torch.Tensor, eps: float, *, quantize: bool = False
    ) -> torch.Tensor | Quantized:
        """x [T, N] += the sum, in place; returns RMSNorm(x), in float8 with `quantize`."""


@dataclass(frozen=True, slots=True)
class Summand:
    """This rank's part of a product whose inner columns are cut over the ranks: the kernel that reads it adds up all parts."""

    part: Part
    sums: Sums

    def __getitem__(self, rows: torch.Tensor) -> Summand:
        return Summand(self.part[rows], self.sums)

    def float(self) -> torch.Tensor:
        """f32[T, N]."""
        return self.sums.total(self.part).float()


class DeferredNorm(Protocol):
    """The output of a norm that the next product computes itself, in the same kernel."""

    def rows(self) -> torch.Tensor:
        """The output [T, N], computed now."""


Product = Part | Summand
Activations = torch.Tensor | Quantized | DeferredNorm


def plain(x: Product | Activations) -> torch.Tensor:
    """`x` as a tensor [T, N], for layers that take nothing else.

    Raises TypeError where the layer before should have been made with `no_partial_sums` or `plain_output`.
    """
    if isinstance(x, torch.Tensor):
        return x
    if isinstance(x, Summand):
        return x.sums.total(x.part)
    if isinstance(x, PartialSums | Scaled | Quantized):
        raise TypeError(f"{type(x).__name__} where a tensor is needed: make the layer before it return one")
    return x.rows()
