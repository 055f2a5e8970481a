"""Arguments for kernels that read a product in any of its forms: a tensor, partial sums, or values still to be scaled."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minisgl.model.common.activations import PartialSums, Product, Scaled, Summand, plain


class Operand(NamedTuple):
    """A product as its reader is launched with it.  Without scales, `values` takes their place; the kernel reads none."""

    values: torch.Tensor  # [T, N], or [parts, T, N]
    rows: torch.Tensor  # f32 [T, 1]
    columns: torch.Tensor  # f32[N]
    parts: int
    scaled: bool


def operand(product: Product) -> Operand:
    if isinstance(product, Summand):
        product = plain(product)
    if isinstance(product, Scaled):
        return Operand(product.values, product.rows, product.columns, 1, True)
    if isinstance(product, PartialSums):
        return Operand(product.parts, product.parts, product.parts, len(product.parts), False)
    return Operand(product, product, product, 1, False)
