"""Weights that stay in 4 or 8 bits on a GPU: kernels against a slow reference, checkpoints against their dequantised form.

Triton's interpreter runs the kernels on the CPU.  It computes in float16, since it rounds no bfloat16 but cuts it off.
"""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("on a GPU scripts/bench/packed.py does this", allow_module_level=True)
import interpreter  # noqa: F401  before the kernels
import torch.nn.functional as F

from minisgl.model.common.activations import PartialSums
from minisgl.model.common.weights import QuantizedWeight, Quants, dequantized
from minisgl.model.cuda import packed_layers
from minisgl.model.cuda.layers import CudaLayers, Linear
from minisgl.model.kernels import packed_matmul as pm

CPU = torch.device("cpu")


def quants(n: int, k: int, bits: int, group: int, *, real: bool = False, seed: int = 0) -> Quants:
    torch.manual_seed(seed)
    groups = -(-k // group)
    numbers = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, groups) * 0.03 + 0.01).half().float()
    zeros = torch.rand(n, groups) * 15 if real else torch.randint(0, 1 << bits, (n, groups)).float()
    return Quants(numbers, scales, zeros.half().float(), bits, group)


def packed(q: Quants, dtype: torch.dtype = torch.float16, *, gated: bool = False) -> pm.Packed:
    return pm.pack(q.numbers, q.scales, q.zeros, q.bits, min(q.group, q.numbers.shape[1]), dtype, gated=gated)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def reference(x: torch.Tensor, q: Quants, *, gated: bool = False) -> torch.Tensor:
    y = x.float() @ dequantized(q).T
    if not gated:
        return y
    gate, up = y.chunk(2, 1)
    return F.silu(gate) * up


@pytest.mark.parametrize("seed", range(12))
def test_a_product_is_that_of_the_dequantised_weight_for_any_sizes_groups_and_rows(seed: int) -> None:
    pick = random.Random(seed)
    bits, gated = pick.choice((4, 4, 8)), pick.random() < 0.3
    group = pick.choice((16, 32, 48, 64, 96, 128, 256, 1000))
    n = 16 * pick.randint(1, 9) if gated else pick.randint(1, 150)
    k, rows = pick.randint(1, 24) * 16 - 8 * (group == 1000), pick.randint(1, 40)
    real = bits == 4 and pick.random() < 0.4
    q = quants(n, k, bits, group, real=real, seed=seed)
    w = packed(q, gated=gated)
    x = torch.randn(rows, k).half() / 8
    setting = {
        "splits": 1 if gated else pick.randint(1, 3),
        "block_m": pick.choice((8, 16, 32)),
        "block_n": pick.choice((32, 64)),
    }
    y = pm.product(x, w, **setting)
    assert isinstance(y, PartialSums) == (setting["splits"] > 1)
    assert error(y, reference(x, q, gated=gated)) < 2e-3
    assert error(pm.many_rows(x, w), reference(x, q)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_scales_and_zeros_survive_packing_in_either_dtype(bits: int, dtype: torch.dtype) -> None:
    q = quants(40, 96, bits, 32)
    w = packed(q, dtype)
    assert w.f16
    assert error(pm.dequantize(w), dequantized(q)) < (4e-3 if dtype == torch.bfloat16 else 3e-4)
    x = torch.zeros(3, 96, dtype=dtype)
    x[0, 5], x[1, 40], x[2, 95] = 1, 2, -1
    exact = reference(x, q)
    assert torch.allclose(pm.product(x, w, splits=2).float(), exact, rtol=1e-5, atol=1e-6)


def test_scales_that_half_precision_cannot_hold_are_kept_in_bfloat16() -> None:
    q = quants(16, 64, 4, 32)
    tiny = Quants(q.numbers, q.scales * 1e-6, q.zeros, 4, 32)
    w = packed(tiny)
    assert not w.f16
    x = torch.randn(2, 64).half() * 64
    assert error(pm.product(x, w, splits=2), reference(x, tiny)) < 6e-3


def test_zeros_that_half_precision_cannot_hold_make_no_infinity() -> None:
    """A block with a minimum far larger than its scale: the weights are nearly all minus the minimum."""
    q = quants(16, 64, 4, 32)
    zeros = torch.full_like(q.zeros, -250_000.0)
    zeros[:, 1] = 250_000.0
    flat = Quants(q.numbers, q.scales * 1e-4, zeros, 4, 32)
    w = packed(flat)
    assert error(pm.dequantize(w), dequantized(flat)) < 4e-3  # the scales are in bfloat16
    x = torch.randn(2, 64).half()
    assert error(pm.product(x, w, splits=2), reference(x, flat)) < 1e-2


def test_rows_of_a_packed_table_are_found_by_id_and_in_parts() -> None:
    w = packed(quants(40, 96, 4, 32))
    whole, ids = pm.dequantize(w), torch.tensor([3, 39, 0, 3])
    assert torch.equal(pm.dequantize(w, ids=ids), whole[ids])
    assert torch.equal(pm.dequantize(w, (7, 31)), whole[7:31])


def test_gate_and_up_come_back_apart_however_many_rows_are_dequantised_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quants(288, 64, 4, 32)
    w = packed(q, gated=True)
    assert torch.equal(pm.dequantize(w), pm.dequantize(packed(q)))
    x = torch.randn(5, 64).half()
    whole = pm.many_rows(x, w)
    monkeypatch.setattr(pm, "SCRATCH", 128 * 64)
    assert error(pm.many_rows(x, w), whole.float()) < 1e-3


def stored(q: Quants) -> QuantizedWeight:
    return QuantizedWeight(tuple(q.numbers.shape), lambda _: q, lambda: dequantized(q).half())


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_layers_of_an_mlp_take_packed_weights_of_mixed_kinds(rows: int) -> None:
    make = CudaLayers(torch.float16, CPU)
    gate, up = quants(48, 64, 4, 64, seed=1), quants(48, 64, 8, 16, seed=2)
    down = quants(64, 48, 4, 32, seed=3)
    gated, product = make.gated(stored(gate), stored(up)), make.linear(stored(down))
    assert isinstance(product, packed_layers.PackedLinear)
    x = torch.randn(rows, 64).half() / 8
    inner = F.silu(x.float() @ dequantized(gate).T) * (x.float() @ dequantized(up).T)
    assert error(product(gated(x)), inner @ dequantized(down).T) < 4e-3


def test_a_layer_whose_inputs_are_reordered_gets_them_in_its_order() -> None:
    q = quants(32, 64, 4, 16)
    order = torch.randperm(64)
    q = Quants(q.numbers, q.scales, q.zeros, 4, 16, order)
    product = CudaLayers(torch.float16, CPU).linear(stored(q))
    x = torch.randn(3, 64).half()
    assert isinstance(product, packed_layers.PackedLinear)
    assert error(product(x), x.float() @ dequantized(q).T) < 2e-3


def test_what_cannot_stay_packed_is_dequantised() -> None:
    make = CudaLayers(torch.float16, CPU)
    fine, odd = quants(16, 64, 4, 32), quants(16, 64, 4, 24)
    reordered = Quants(fine.numbers, fine.scales, fine.zeros, 4, 32, torch.randperm(64))
    x = torch.randn(2, 64).half()
    for parts in ((odd,), (fine, reordered)):
        product = make.linear(*(stored(q) for q in parts))
        assert not isinstance(product, packed_layers.PackedLinear)
        assert error(product(x), torch.cat([x.float() @ dequantized(q).T for q in parts], 1)) < 2e-3
    thin = stored(quants(12, 64, 4, 32))
    assert packed_layers.packed((thin, thin), torch.float16, CPU) is not None
    assert packed_layers.packed((thin, thin), torch.float16, CPU, gated=True) is None, "gate and up take turns by eights"
    mixed = make.linear(stored(fine), torch.randn(8, 64).half())
    assert not isinstance(mixed, packed_layers.PackedLinear)
    assert isinstance(CudaLayers(torch.float32, CPU).linear(stored(fine)), Linear)
