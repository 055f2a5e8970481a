"""What travels between layers on a GPU besides plain rows [T, N] and the f32 parts [parts, T, N] of a split product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows as float8_e4m3fn [T, N] and a scale f32 [T, 1] for each: what an FP8 product takes."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rows that are values [T, N] times rows f32 [T, 1] times columns f32 [N]: what an FP8 product leaves to its successor.

    The library's products with a scale for each row and column are slower than those with one scale; the next kernel reads
    the product anyway.
    """

    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def __getitem__(self, index: Any) -> Scaled:
        """Some of the rows, as of a tensor: [..., rows, :]."""
        return Scaled(self.values[index], self.rows[index], self.columns)


Product = torch.Tensor | Scaled  # rows, f32 parts of them, or scaled ones


def unscaled(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, scales of rows, scales of columns); where there are no scales, the values stand in for them in a launch."""
    if isinstance(product, Scaled):
        return product.values, product.rows, product.columns
    return product, product, product
