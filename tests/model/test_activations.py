"""What layers hand to each other: products in several forms, and what takes a tensor only."""

from __future__ import annotations

import pytest
import torch

from minisgl.model.common.activations import PartialSums, Product, Quantized, Scaled, plain
from minisgl.model.common.parallel import Parallel

ROWS, COLUMNS = torch.rand(5, 1), torch.rand(7)
X = torch.randn(5, 7)
FORMS: dict[str, Product] = {
    "a tensor": X,
    "partial sums": PartialSums(torch.stack((X - 3, 2 * torch.ones_like(X), torch.ones_like(X)))),
    "scaled": Scaled(X / ROWS / COLUMNS, ROWS, COLUMNS),
}


@pytest.mark.parametrize("form", FORMS)
def test_some_rows_of_a_product_are_those_rows_in_every_form(form: str) -> None:
    rows = torch.tensor([3, 0, 3])
    assert torch.allclose(FORMS[form].float(), X, atol=1e-5)
    assert torch.allclose(FORMS[form][rows].float(), X[rows], atol=1e-5)


@pytest.mark.parametrize("x", [*list(FORMS.values())[1:], Quantized(X, ROWS)], ids=lambda x: type(x).__name__)
def test_a_layer_that_takes_tensors_refuses_every_other_form(x: PartialSums | Scaled | Quantized) -> None:
    with pytest.raises(TypeError, match=f"{type(x).__name__} where a tensor is needed"):
        plain(x)


def test_only_tensors_are_summed_over_ranks_and_one_rank_sums_nothing() -> None:
    alone, several = Parallel(), Parallel(group=object())  # type: ignore[arg-type]
    several.size = 2
    for product in FORMS.values():
        assert alone.sum_over_ranks(product) is product
    with pytest.raises(TypeError, match="PartialSums"):
        several.sum_over_ranks(FORMS["partial sums"])
