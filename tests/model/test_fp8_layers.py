"""Layers with float8 weights, at every border between their paths: few rows, our kernel, the library, one scale or many."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if not torch.cuda.is_available():
    import interpreter  # noqa: F401  before the kernels

import torch.nn.functional as F

from minisgl.model.common.activations import PartialSums, Quantized, Scaled
from minisgl.model.cuda import layers as cuda_layers
from minisgl.model.cuda.layers import CudaLayers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, INNER = 256, 128
TOLERANCE = 0.1 if DEVICE.type == "cuda" else 0.2  # the interpreter cuts off where a GPU rounds


def block(rows: int, *, no_partial_sums: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What an MLP with its norms makes of `rows` rows in float8, and in float32."""
    torch.manual_seed(rows)
    make = CudaLayers(torch.bfloat16, DEVICE, no_partial_sums=no_partial_sums, fp8=True)
    weight = torch.ones(WIDTH, device=DEVICE, dtype=torch.bfloat16)
    gate, up = (torch.randn(INNER, WIDTH, device=DEVICE).bfloat16() for _ in range(2))
    down = torch.randn(WIDTH, INNER, device=DEVICE).bfloat16()
    x = torch.randn(rows, WIDTH, device=DEVICE).bfloat16()
    norm, last = make.norm(weight, 1e-5), make.norm(weight, 1e-5, plain_output=True)
    delta = make.linear(down)(make.gated(gate, up)(norm(x.clone(), None)))
    normed = F.rms_norm(x.float(), (WIDTH,), weight.float(), 1e-5)
    inner = F.silu(normed @ gate.float().T) * (normed @ up.float().T)
    want = F.rms_norm(x.float() + inner @ down.float().T, (WIDTH,), weight.float(), 1e-5)
    return last(x.clone(), delta), want


@pytest.mark.parametrize("no_partial_sums", [False, True])
@pytest.mark.parametrize("ours", [0, 16])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 24, 25])
def test_every_number_of_rows_gives_what_exact_weights_give(
    rows: int, ours: int, no_partial_sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_layers, "OUR_ROWS", ours)
    got, want = block(rows, no_partial_sums=no_partial_sums)
    assert got.shape == want.shape
    assert float((got.float() - want).norm() / want.norm()) < TOLERANCE


def test_rows_of_one_scale_above_the_border_get_a_scale_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_layers, "ONE_SCALE_ROWS", 20)
    got, want = block(21, no_partial_sums=False)
    assert float((got.float() - want).norm() / want.norm()) < TOLERANCE


def test_rows_are_quantised_and_ours_come_back_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_layers, "OUR_ROWS", 1)
    make = CudaLayers(torch.bfloat16, DEVICE, fp8=True)
    norm = make.norm(torch.ones(WIDTH, device=DEVICE, dtype=torch.bfloat16), 1e-5)
    product = make.linear(torch.randn(WIDTH, WIDTH, device=DEVICE).bfloat16())
    for rows, kinds in ((1, (Quantized, PartialSums | torch.Tensor)), (2, (Quantized, Scaled))):
        normed = norm(torch.randn(rows, WIDTH, device=DEVICE).bfloat16(), None)
        assert isinstance(normed, kinds[0])
        assert isinstance(product(normed), kinds[1])
