"""The GPU kernels against slow readable references: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if not torch.cuda.is_available():
    import interpreter  # noqa: F401  before the kernels

import numpy as np
import torch.nn.functional as F

from minisgl.model.common.activations import PartialSums, Product, Quantized, Scaled
from minisgl.model.common.functional import act_mul, route
from minisgl.model.common.interfaces import ExpertWeights, QKNorm
from minisgl.model.common.slots import SamplingRows
from minisgl.model.cpu.layers import Experts
from minisgl.model.cpu.sampler import sample as cpu_sample
from minisgl.model.kernels import moe, norm_activation
from minisgl.model.kernels.apply_plan import apply_plan, decode_inputs
from minisgl.model.kernels.decode_attention import DecodeWorkspace, decode_attention
from minisgl.model.kernels.fp8_pages import widen_pages
from minisgl.model.kernels.prefill_attention import prefill_attention, tiles_of
from minisgl.model.kernels.qk_norm_rope import prepare_heads, rope_tables
from minisgl.model.kernels.sampling import SamplingState, sample
from minisgl.model.kernels.small_batch_matmul import choose, gemv, skinny
from minisgl.plan import GRANT, JOIN, NOT_A_NUMBER

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # the interpreter is exact in float32
TOLERANCE = 1e-2 if DEVICE.type == "cuda" else 1e-5

FP8_TOLERANCE = 0.04 if DEVICE.type == "cuda" else 0.1  # the interpreter cuts off where a GPU rounds


def rand(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error as a ratio of norms; NaN never passes."""
    return float((got.float() - want.float()).norm() / want.float().norm())


class Cache:
    """One layer of a paged KV cache with scattered pages, and how a reader without pages sees it."""

    def __init__(self, kv_lens: list[int], kv_heads: int, dim: int, page_size: int, dtype: torch.dtype = HALF) -> None:
        torch.manual_seed(sum(kv_lens) + page_size)
        width = -(-max(kv_lens) // page_size)
        pages = width * (len(kv_lens) + 1) + 3
        self.cache = rand(pages, 2, kv_heads, page_size, dim).to(dtype)
        self.keys, self.values = self.cache[:, 0], self.cache[:, 1]
        self.page_table = torch.randperm(pages - 1, device=DEVICE)[: width * (len(kv_lens) + 1)].view(-1, width).int() + 1
        self.slots = torch.randperm(len(kv_lens), device=DEVICE).int()
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
        self.page_size = page_size

    def row(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, K, D] of row i, float32."""
        n = int(self.kv_lens[i])
        at = torch.arange(n, device=DEVICE)
        pages = self.page_table[self.slots[i].long()][at // self.page_size].long()
        return self.keys.float()[pages, :, at % self.page_size], self.values.float()[pages, :, at % self.page_size]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int = 0,
    softcap: float = 0.0,
    scale: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference: q [T, H, D] are the last T of S positions; softmax over what is not later."""
    t, heads, dim = q.shape
    s, kv_heads, _ = k.shape
    q = q.float().view(t, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("tkgd,skd->tkgs", q, k) * (scale or dim**-0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    own, at = torch.arange(s - t, s, device=q.device)[:, None], torch.arange(s, device=q.device)
    seen = (at <= own) & (at > own - (window or s))
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(kv_heads, -1, 1).expand(t, -1, -1, 1)), -1)
    return torch.einsum("tkgs,skd->tkgd", scores.softmax(-1)[..., :s], v).reshape(t, heads, dim)


@pytest.mark.parametrize("task", ["decode", "prefill"])
def test_attention_reads_no_token_but_the_rows_own(task: str) -> None:
    c = Cache([3, 37], 1, 64, 16)
    mine = torch.zeros(c.cache.shape[0], 16, dtype=torch.bool, device=DEVICE)
    for i, n in enumerate([3, 37]):
        at = torch.arange(n, device=DEVICE)
        mine[c.page_table[c.slots[i].long()][at // 16].long(), at % 16] = True
    c.cache.permute(0, 3, 1, 2, 4)[~mine] = torch.nan
    if task == "decode":
        workspace = DecodeWorkspace(2, 2, 4, 1, 64, DEVICE)
        got = decode_attention(rand(2, 4, 64), c.keys, c.values, c.page_table, c.slots, c.kv_lens, workspace)
    else:
        lens = np.array([3, 37], np.int32)
        tiles = torch.from_numpy(tiles_of(lens, c.slots.cpu().numpy(), lens, 4)).to(DEVICE)
        got = prefill_attention(rand(40, 4, 64), c.keys, c.values, c.page_table, tiles)
    assert bool(got.isfinite().all())


SHAPES = [(2, 2, 64), (4, 2, 64), (5, 1, 128), (7, 1, 80), (10, 2, 96), (16, 1, 128), (4, 1, 256)]
PAGED = [(*shape, 16) for shape in SHAPES] + [(4, 2, 64, 1), (4, 2, 64, 64), (7, 1, 80, 1), (7, 1, 80, 64)]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page_size"), PAGED)
def test_decode_attention_over_scattered_pages_is_softmax_attention(
    heads: int, kv_heads: int, dim: int, page_size: int, splits: int
) -> None:
    c = Cache([1, 130, 64, 65, 17], kv_heads, dim, page_size)
    q = rand(5, heads, dim)
    workspace = DecodeWorkspace(5, splits, heads, kv_heads, dim, DEVICE)
    for _ in range(2):  # the second launch finds the counters as the first one did
        got = decode_attention(q, c.keys, c.values, c.page_table, c.slots, c.kv_lens, workspace)
        for i in range(5):
            assert error(got[i], attend(q[i : i + 1], *c.row(i))[0]) < TOLERANCE
        alone = decode_attention(q[1:2], c.keys, c.values, c.page_table, c.slots[1:2], c.kv_lens[1:2], workspace)
        assert error(alone, got[1:2]) < TOLERANCE  # a single row joins its parts in another way
    assert int(workspace.counters.abs().sum()) == 0


def test_launches_one_after_another_share_a_workspace_that_is_large_enough() -> None:
    c = Cache([1, 130, 64, 65, 17], 2, 64, 16)
    large = DecodeWorkspace(5, 4, 4, 2, 64, DEVICE)
    for splits in (4, 2, 1):
        q, workspace = rand(5, 4, 64), DecodeWorkspace(5, splits, 4, 2, 64, DEVICE, within=large)
        assert workspace.out is large.out
        got = decode_attention(q, c.keys, c.values, c.page_table, c.slots, c.kv_lens, workspace)
        for i in range(5):
            assert error(got[i], attend(q[i : i + 1], *c.row(i))[0]) < TOLERANCE
    assert DecodeWorkspace(5, 8, 4, 2, 64, DEVICE, within=large).out is not large.out
    more_rows = DecodeWorkspace(6, 1, 4, 2, 64, DEVICE, within=large)
    assert len(more_rows.counters) == 12
    assert len(more_rows.lse) == len(large.lse), "taking turns, they would be made again and again"


SINKS = torch.tensor([0.5, -1.0, 4.0], device=DEVICE)
LIMITS = [
    {"window": 1},
    {"window": 37},
    {"window": 64, "sinks": SINKS},
    {"softcap": 2.0, "scale": 0.3},
    {"window": 20, "softcap": 5.0, "sinks": SINKS},
]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_attention_keeps_to_window_soft_cap_scale_and_sinks(limits: dict[str, Any], splits: int) -> None:
    c = Cache([1, 130, 64, 37], 1, 64, 16)
    q = rand(4, 3, 64)
    workspace = DecodeWorkspace(4, splits, 3, 1, 64, DEVICE)
    got = decode_attention(q, c.keys, c.values, c.page_table, c.slots, c.kv_lens, workspace, **limits)
    for i in range(4):
        assert error(got[i], attend(q[i : i + 1], *c.row(i), **limits)[0]) < TOLERANCE
    alone = decode_attention(q[1:2], c.keys, c.values, c.page_table, c.slots[1:2], c.kv_lens[1:2], workspace, **limits)
    assert error(alone, got[1:2]) < TOLERANCE
    assert int(workspace.counters.abs().sum()) == 0


@pytest.mark.parametrize("limits", LIMITS)
def test_prefill_attention_keeps_to_window_soft_cap_scale_and_sinks(limits: dict[str, Any]) -> None:
    chunks, kv_lens = np.array([70, 9], np.int32), np.array([70, 150], np.int32)
    c = Cache(kv_lens.tolist(), 1, 64, 16)
    q = rand(79, 3, 64)
    tiles = torch.from_numpy(tiles_of(chunks, c.slots.cpu().numpy(), kv_lens, 3)).to(DEVICE)
    got = prefill_attention(q, c.keys, c.values, c.page_table, tiles, **limits)
    for i, start in enumerate((0, 70)):
        own = slice(start, start + chunks[i])
        assert error(got[own], attend(q[own], *c.row(i), **limits)) < TOLERANCE


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page_size"), PAGED)
def test_prefill_attention_sees_the_cached_prefix_and_nothing_later(
    heads: int, kv_heads: int, dim: int, page_size: int
) -> None:
    chunks, kv_lens = np.array([1, 40, 7, 65], np.int32), np.array([1, 40, 90, 100], np.int32)
    c = Cache(kv_lens.tolist(), kv_heads, dim, page_size)
    q = rand(int(chunks.sum()), heads, dim)
    table = tiles_of(chunks, c.slots.cpu().numpy(), kv_lens, heads // kv_heads, pad_to=200)
    got = prefill_attention(q, c.keys, c.values, c.page_table, torch.from_numpy(table).to(DEVICE))
    start = 0
    for i, n in enumerate(chunks.tolist()):
        assert error(got[start : start + n], attend(q[start : start + n], *c.row(i))) < TOLERANCE
        start += n


@pytest.mark.parametrize("heads", [4, 10])
def test_attention_over_a_float8_cache_multiplies_by_its_scales(heads: int) -> None:
    c = Cache([50, 20], 2, 64, 16, torch.float8_e4m3fn)
    q = rand(2, heads, 64)
    workspace = DecodeWorkspace(2, 2, heads, 2, 64, DEVICE)
    got = decode_attention(q, c.keys, c.values, c.page_table, c.slots, c.kv_lens, workspace, k_scale=0.5, v_scale=3.0)
    for i in range(2):
        k, v = c.row(i)
        assert error(got[i], attend(q[i : i + 1], k * 0.5, v * 3)[0]) < max(TOLERANCE, 1e-3)
    chunks = np.array([9, 20], np.int32)
    tiles = tiles_of(chunks, c.slots.cpu().numpy(), c.kv_lens.cpu().numpy(), heads // 2)
    q = rand(29, heads, 64)
    got = prefill_attention(q, c.keys, c.values, c.page_table, torch.from_numpy(tiles).to(DEVICE), k_scale=0.5, v_scale=3.0)
    assert error(got[:9], attend(q[:9], c.row(0)[0] * 0.5, c.row(0)[1] * 3)) < max(TOLERANCE, 1e-3)


def test_a_tile_never_mixes_chunks_and_longer_contexts_come_first() -> None:
    tiles = tiles_of(np.array([100, 3], np.int32), np.array([7, 2], np.int32), np.array([100, 500], np.int32), 2, pad_to=9)
    assert tiles.tolist() == [
        [100, 3, 2, 497],
        [96, 4, 7, 96],
        [64, 32, 7, 64],
        [32, 32, 7, 32],
        [0, 32, 7, 0],
        *[[0, 0, 0, 0]] * 4,
    ]


@pytest.mark.parametrize(("n", "k"), [(77, 300), (64, 1024), (128, 2560)])
def test_gemv_is_a_matrix_product_with_one_row(n: int, k: int) -> None:
    x, w = rand(1, k), rand(n, k)
    assert error(gemv(x, w), x.float() @ w.float().T) < TOLERANCE


@pytest.mark.parametrize("rows", [2, 16, 20])
@pytest.mark.parametrize("splits", [1, 4])
def test_skinny_products_and_the_sum_of_their_parts(rows: int, splits: int) -> None:
    x, w = rand(rows, 512), rand(130, 512)
    got = skinny(x, w, splits=splits, block_k=64)
    assert (got.parts if isinstance(got, PartialSums) else got[None]).shape == (splits, rows, 130)
    assert error(got.float(), x.float() @ w.float().T) < TOLERANCE


def test_the_chosen_settings_divide_the_products_they_are_chosen_for() -> None:
    shapes = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (5120, 17_408), (34_816, 5120), (960, 576), (576, 1536)]
    for rows in (1, 2, 8, 16, 17, 64, 65, 128, 129, 256, 257):
        for n, k in shapes:
            for no_partial_sums in (False, True):
                settings = choose(rows, n, k, no_partial_sums=no_partial_sums)
                if settings is None or rows == 1:
                    continue
                assert k % (settings["splits"] * settings["block_k"]) == 0
                assert settings["prefetch_k"] <= k // settings["splits"]
                assert settings["splits"] == 1 or not no_partial_sums
                assert (settings["block_m"] + 64) * settings["block_k"] * 2 * settings["stages"] < 227 << 10  # of shared memory


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 20])
def test_products_of_float8_rows_multiply_by_the_scales_of_rows_and_outputs(rows: int, gated: bool) -> None:
    x, w = rand(rows, 512) * (torch.rand(rows, 1, device=DEVICE).to(HALF) + 0.1), rand(128, 512) * 0.1
    qx, qw = norm_activation.quantize_rows(x), norm_activation.quantize_rows(w)
    splits = 1 if gated else 2
    block_m = 16 if rows <= 16 else 32
    got = skinny(qx.values, qw.values, scales=(qx.scales, qw.scales.view(-1)), gated=gated, splits=splits, block_m=block_m)
    want = rows_of(qx) @ rows_of(qw).T
    if gated:
        first, second = want.chunk(2, -1)
        want = F.silu(first) * second
    assert (
        error(got.parts.sum(0) if isinstance(got, PartialSums) else got, want) < 2e-2
    )  # bfloat16, and with `gated` rounded three times


def test_a_few_quantised_rows_have_spare_ones_behind_them_for_the_library() -> None:
    x, weight = rand(3, 256), rand(256)
    for q in (
        norm_activation.quantize_rows(x),
        norm_activation.add_rms_norm(x.clone(), None, weight, 1e-5, quantize=True),
        norm_activation.silu_mul_quantized(rand(3, 512)),
    ):
        assert isinstance(q, Quantized)
        assert (q.values.shape, q.scales.shape) == ((3, 256), (3, 1))
        spare = norm_activation.with_spare_rows(q.values, norm_activation.SPARE_ROWS)
        assert spare.shape == (norm_activation.SPARE_ROWS, 256)
        assert spare.data_ptr() == q.values.data_ptr()
        assert norm_activation.with_spare_rows(q.scales, 17).shape == (17, 1)
        assert norm_activation.with_spare_rows(q.values, 2) is q.values


def parts_of(x: torch.Tensor, parts: int) -> torch.Tensor:
    """f32 [parts, *x.shape] that add up to x exactly enough."""
    weights = torch.rand(parts, *[1] * x.dim(), device=x.device)
    return x.float()[None] * (weights / weights.sum(0))


def scaled(x: torch.Tensor) -> Scaled:
    """As an FP8 product would leave x."""
    rows, columns = (torch.rand(n, device=x.device) + 0.5 for n in x.shape)
    return Scaled((x.float() / rows[:, None] / columns).to(x.dtype), rows[:, None], columns)


def as_product(x: torch.Tensor, kind: str) -> Product:
    return scaled(x) if kind == "scaled" else PartialSums(parts_of(x, 3)) if kind == "parts" else x


def rows_of(q: object) -> torch.Tensor:
    assert isinstance(q, Quantized)
    return q.values.float() * q.scales


@pytest.mark.parametrize("kind", ["plain", "parts", "scaled"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (7, 1024), (70, 300)])
def test_add_rms_norm_adds_in_place_and_normalises_what_is_kept(tokens: int, width: int, kind: str) -> None:
    x, delta, weight = rand(tokens, width), rand(tokens, width), rand(width)
    total = x + delta
    want = F.rms_norm(total.float(), (width,), weight.float(), 1e-5)
    kept = x.clone()
    got = norm_activation.add_rms_norm(kept, as_product(delta, kind), weight, 1e-5)
    assert isinstance(got, torch.Tensor)
    assert error(got, want) < TOLERANCE
    assert error(kept, total) < TOLERANCE
    plain = norm_activation.add_rms_norm(x.clone(), None, weight, 1e-5)
    assert isinstance(plain, torch.Tensor)
    assert error(plain, F.rms_norm(x.float(), (width,), weight.float(), 1e-5)) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("width", [64, 88])
def test_gated_products_end_in_silu_times_the_other_half(rows: int, width: int) -> None:
    x, w = rand(rows, 256), rand(2 * width, 256) * 0.1
    gate, up = (x.float() @ w.float().T).chunk(2, -1)
    product = gemv if rows == 1 else skinny
    assert error(product(x, w, block_k=64, gated=True), F.silu(gate) * up) < TOLERANCE


def test_silu_mul_gates() -> None:
    gate_up = rand(5, 2 * 333)
    gate, up = gate_up.float().chunk(2, -1)
    assert error(norm_activation.silu_mul(gate_up), F.silu(gate) * up) < TOLERANCE


@pytest.mark.parametrize("rows", [5, 66])
def test_silu_mul_quantises_rows_as_a_whole(rows: int) -> None:
    gate_up = rand(rows, 2 * 2333) * torch.rand(rows, 1, device=DEVICE).to(HALF)
    gate, up = gate_up.float().chunk(2, -1)
    want = F.silu(gate) * up
    for product in (gate_up, scaled(gate_up)):
        got = norm_activation.silu_mul_quantized(product)
        assert error(rows_of(got), want) < FP8_TOLERANCE
        assert error(got.scales[:, 0] * 448, want.abs().amax(1)) < TOLERANCE


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["plain", "parts", "scaled"])
@pytest.mark.parametrize(("num_heads", "kv_heads", "dim"), [(4, 2, 64), (5, 1, 80), (3, 3, 96)])
def test_prepare_heads_normalises_rotates_and_stores(num_heads: int, kv_heads: int, dim: int, kind: str, norm: bool) -> None:
    from minisgl.model.common.rope import rotate_

    tokens, page_size = 9, 16
    qkv = rand(tokens, num_heads + 2 * kv_heads, dim)
    positions = torch.randint(0, 2000, (tokens,), device=DEVICE)
    freqs = torch.rand(dim // 2, device=DEVICE)
    cos, sin = rope_tables(positions, freqs)
    angles = torch.outer(positions.float(), freqs)
    assert error(cos, angles.cos()) < 1e-4
    assert error(sin, angles.sin()) < 1e-4
    qk_norm = QKNorm(rand(dim), rand(dim), 1e-6) if norm else None
    index = torch.randperm(5 * page_size, device=DEVICE)[:tokens]
    cache = torch.zeros(5, 2, kv_heads, page_size, dim, device=DEVICE, dtype=HALF)
    flat = qkv.reshape(tokens, -1)
    q = prepare_heads(
        as_product(flat, kind),
        (cos, sin),
        qk_norm,
        cache[:, 0],
        cache[:, 1],
        index,
        dtype=HALF,
    )
    want = qkv.float()
    if qk_norm is not None:
        want[:, :num_heads] = F.rms_norm(want[:, :num_heads], (dim,), qk_norm.q.float(), 1e-6)
        want[:, num_heads : num_heads + kv_heads] = F.rms_norm(
            want[:, num_heads : num_heads + kv_heads], (dim,), qk_norm.k.float(), 1e-6
        )
    rotate_(want[:, : num_heads + kv_heads], torch.cat([cos] * 2, -1)[:, None], torch.cat([-sin, sin], -1)[:, None])
    assert error(q, want[:, :num_heads]) < TOLERANCE
    stored = cache[index // page_size, :, :, index % page_size].float()  # [T, 2, K, D]
    assert error(stored[:, 0], want[:, num_heads : num_heads + kv_heads]) < TOLERANCE
    assert error(stored[:, 1], want[:, num_heads + kv_heads :]) < TOLERANCE
    assert int(cache.any(-1).sum()) == tokens * 2 * kv_heads  # and nothing else is touched


@pytest.mark.parametrize(("dim", "rotary"), [(16, 0), (16, 12), (24, 8), (128, 96)])
def test_only_the_first_dimensions_of_a_head_turn(dim: int, rotary: int) -> None:
    from minisgl.model.common.rope import rotate_

    qkv, index = rand(3, 4, dim), torch.tensor([5, 0, 9], device=DEVICE)
    weight = rand(dim)
    rotation = rope_tables(index, torch.rand(rotary // 2, device=DEVICE), 1.3) if rotary else None
    cache = torch.zeros(3, 2, 1, 4, dim, device=DEVICE, dtype=HALF)
    norm = QKNorm(weight.float(), weight.float(), 0.1)
    q = prepare_heads(qkv.view(3, -1), rotation, norm, cache[:, 0], cache[:, 1], index, dtype=HALF)
    want = qkv.float()
    want[:, :3] = F.rms_norm(want[:, :3], (dim,), weight.float(), 0.1)
    if rotation is not None:
        cos, sin = rotation
        rotate_(want[:, :3], torch.cat([cos] * 2, -1)[:, None], torch.cat([-sin, sin], -1)[:, None])
    stored = cache[index // 4, :, :, index % 4].float()
    assert error(q, want[:, :2]) < TOLERANCE
    assert error(stored[:, 0], want[:, 2:3]) < TOLERANCE
    assert error(stored[:, 1], want[:, 3:]) < TOLERANCE


def test_gelu_gates_as_torch_does() -> None:
    gate_up = 3 * rand(2, 300)
    want = F.gelu(gate_up[:, :150].float(), approximate="tanh") * gate_up[:, 150:].float()
    assert error(norm_activation.silu_mul(gate_up, gelu=True), want) < TOLERANCE


# ---------------- experts
@pytest.mark.parametrize(("tokens", "e", "top"), [(1, 5, 5), (3, 128, 8), (70, 7, 3), (130, 3, 2)])
def test_choices_are_sorted_into_blocks_of_one_expert_each(tokens: int, e: int, top: int) -> None:
    torch.manual_seed(tokens)
    logits = torch.randn(tokens, e, device=DEVICE)
    experts, weights = moe.route(logits, top, normalise=True)
    want_experts, want_weights = route(logits, top, normalise=True)
    assert torch.equal(experts.long(), want_experts)
    assert error(weights, want_weights) < 1e-5
    assert error(moe.route(logits, top, normalise=False)[1], route(logits, top, normalise=False)[1]) < 1e-5
    for size in (16, 64):
        order, blocks = moe.sort(experts, e, size)
        places: dict[int, list[int]] = {}
        for b, (expert, end) in enumerate(blocks.tolist()):
            if expert < e:
                assert b * size < end
                places.setdefault(expert, []).extend(order[b * size : min(end, b * size + size)].tolist())
        flat = experts.flatten().tolist()
        assert places == {x: [i for i, y in enumerate(flat) if y == x] for x in sorted(set(flat))}  # all, once, in order


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "e", "inner"), [(1, 4, 24), (37, 5, 64)])
def test_experts_are_the_weighted_sum_of_what_each_says(tokens: int, e: int, inner: int, normalise: bool) -> None:
    torch.manual_seed(e)
    x, router = rand(tokens, 96), rand(e, 96)
    gate_up, down = rand(e, 2 * inner, 96) / 10, rand(e, 96, inner) / 10
    parts = moe.experts(x, F.linear(x, router), moe.Weights(gate_up, down), moe.Settings(2, normalise))
    want = Experts(ExpertWeights(router, gate_up, down, 2, normalise))(x)
    biases = (rand(e), 4 * rand(e, 2 * inner), rand(e, 96))
    more = moe.experts(
        x, F.linear(x, router, biases[0]), moe.Weights(gate_up, down, *biases[1:]), moe.Settings(2, normalise, clamped=True)
    )
    clamped = Experts(ExpertWeights(router, gate_up, down, 2, normalise, "clamped_swiglu", *biases))(x)
    assert error(more.float().sum(0), clamped) < TOLERANCE
    assert parts.shape == (2, tokens, 96)
    assert error(parts.float().sum(0), want) < TOLERANCE


@pytest.mark.parametrize(("tokens", "e", "inner"), [(1, 4, 24), (37, 5, 64)])
def test_experts_in_float8_say_what_their_rounded_weights_say(tokens: int, e: int, inner: int) -> None:
    torch.manual_seed(e)
    x, router = rand(tokens, 96), rand(e, 96)
    biases = (rand(e), 4 * rand(e, 2 * inner), rand(e, 96))
    exact = moe.Weights(rand(e, 2 * inner, 96) / 10, rand(e, 96, inner) / 10, *biases[1:])
    weights = moe.in_float8(exact)
    assert weights.gate_up_scales is not None
    assert weights.down_scales is not None
    gate_up = weights.gate_up.float() * weights.gate_up_scales.view(e, -1, 1)
    down = weights.down.float() * weights.down_scales.view(e, -1, 1)
    assert error(gate_up, exact.gate_up) < FP8_TOLERANCE
    parts = moe.experts(x, F.linear(x, router, biases[0]), weights, moe.Settings(2, True, clamped=True))
    rounded = norm_activation.quantize_rows(x)
    rows = rounded.values.float() * rounded.scales
    chosen, shares = moe.route(F.linear(x, router, biases[0]), 2, True)
    want = torch.zeros(tokens, 96, device=DEVICE)
    for token, (mine, weight) in enumerate(zip(chosen.tolist(), shares, strict=True)):
        for expert, share in zip(mine, weight, strict=True):
            both = gate_up[expert] @ rows[token] + biases[1][expert].float()
            hidden = act_mul(both[None].to(x.dtype), "clamped_swiglu").float()
            hidden = (q := norm_activation.quantize_rows(hidden.to(x.dtype))).values.float() * q.scales
            want[token] += share * (down[expert] @ hidden[0] + biases[2][expert].float())
    assert error(parts.float().sum(0), want) < FP8_TOLERANCE


def test_a_router_that_says_nothing_chooses_experts_that_exist() -> None:
    experts, _ = moe.route(torch.full((2, 5), torch.nan, device=DEVICE), 3, normalise=True)
    assert 0 <= int(experts.min()) <= int(experts.max()) < 5


def test_quantised_rows_times_their_scales_are_the_rows() -> None:
    x = rand(6, 700) * torch.tensor([1e-3, 1, 50, 1, 1, 1], device=DEVICE, dtype=HALF)[:, None]
    q = norm_activation.quantize_rows(x)
    assert error(rows_of(q), x) < FP8_TOLERANCE
    assert float(q.values.float().abs().max()) == 448
    weight = rand(700)
    normed = norm_activation.add_rms_norm(x.clone(), None, weight, 1e-5, quantize=True)
    assert error(rows_of(normed), F.rms_norm(x.float(), (700,), weight.float(), 1e-5)) < FP8_TOLERANCE


def test_widened_pages_are_the_pages_asked_for() -> None:
    cache = rand(7, 2, 3, 4, 24).to(torch.float8_e4m3fn)
    pages = torch.tensor([6, 0, 3, 3], device=DEVICE, dtype=torch.int32)
    out = torch.full((5, 2, 3, 4, 24), 9.0, device=DEVICE, dtype=HALF)
    widen_pages(cache, pages, out)
    assert torch.equal(out[:4].float(), cache.float()[pages.long()])
    assert bool((out[4] == 9).all())


# ---------------- state
def joined(rows: list[dict[str, float]]) -> tuple[SamplingState, torch.Tensor]:
    """A device state in which slot i has the parameters rows[i], through apply_plan."""
    state, table = SamplingState(len(rows) + 1, DEVICE), torch.zeros(len(rows) + 1, 8, dtype=torch.int32, device=DEVICE)
    default = {"kv_len": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    new_slots = np.array([(i, *(default | r).values()) for i, r in enumerate(rows)], JOIN)
    page_grants = np.array([(0, 0, 5), (1, 3, 9), (len(rows) - 1, 7, 2)], GRANT)
    words = np.concatenate([new_slots.view(np.int32), page_grants.view(np.int32)])
    apply_plan(torch.from_numpy(words.copy()).to(DEVICE), len(new_slots), len(page_grants), state, table)
    assert table[0, 0] == 5
    assert table[1, 3] == 9
    assert int(table.sum()) == 16
    return state, table


def test_joins_arrive_bit_for_bit() -> None:
    big = (1 << 63) - 12345
    state, _ = joined([{"kv_len": 3, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "seed": big}, {}])
    assert int(state.seed[0]) == big
    assert int(state.kv_len[0]) == 3
    assert int(state.top_k[0]) == 40
    assert [float(t[0]) for t in (state.temperature, state.top_p, state.min_p)] == pytest.approx([0.7, 0.9, 0.1])


def test_decode_inputs_follow_the_page_table() -> None:
    state, table = joined([{"kv_len": 2}, {"kv_len": 14}, {"kv_len": 28}])
    state.last_token[:3] = torch.tensor([11, 12, 13], device=DEVICE)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    ids, positions, kv_index, kv_lens = decode_inputs(slots, state, table, 4)
    assert ids.tolist() == [13, 11, 12]
    assert positions.tolist() == [28, 2, 14]
    assert kv_index.tolist() == [2 * 4 + 0, 5 * 4 + 2, 9 * 4 + 2]
    assert kv_lens.tolist() == [29, 3, 15]


# ---------------- sampling
def draw(logits: torch.Tensor, rows: list[dict[str, float]], position: int = 7) -> list[int]:
    state, _ = joined(rows)
    n = len(rows)
    slots = torch.arange(n, dtype=torch.int32, device=DEVICE)
    tokens = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    lens = torch.full((n,), position, dtype=torch.int32, device=DEVICE)
    sample(logits, slots, lens, slots.flip(0), state, tokens, advance=True)
    assert state.last_token[:n].tolist() == tokens.flip(0).tolist()
    assert state.kv_len[:n].tolist() == [int(r.get("kv_len", 0)) + 1 for r in rows]
    return tokens.flip(0).tolist()


def test_greedy_rows_take_the_first_of_the_largest() -> None:
    logits = rand(3, 9000)
    logits[1, 4097] = logits[1, 8000] = 100
    assert draw(logits, [{}, {}, {}]) == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}], ids=str
)
@pytest.mark.parametrize("where", [slice(None), 4500])
def test_a_row_without_finite_logits_draws_no_token(value: float, params: dict[str, float], where: slice | int) -> None:
    logits = rand(2, 5000)
    logits[0, where] = value
    state, _ = joined([params, {}])
    slots = torch.arange(2, dtype=torch.int32, device=DEVICE)
    tokens = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    sample(logits, slots, torch.full_like(slots, 7), slots, state, tokens, advance=True)
    assert tokens.tolist() == [NOT_A_NUMBER, int(logits[1].argmax())]
    assert 0 <= int(state.last_token[0]) < 5000, "the slot goes on with a token of the vocabulary"


def test_a_row_draws_the_same_token_whatever_stands_beside_it() -> None:
    logits = rand(4, 6000)
    rows = [{"temperature": 0.8, "seed": i, "top_k": 5 * i} for i in range(4)]
    together = draw(logits, rows)
    assert together == [draw(logits[i : i + 1].expand(2, -1), [rows[i], rows[i]])[0] for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "params",
    [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.6}, {"top_k": 30, "top_p": 0.9, "min_p": 0.05}],
)
def test_filters_keep_exactly_the_tokens_that_the_sampler_of_the_cpu_keeps(
    params: dict[str, float], dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    logits = (torch.randn(60, device=DEVICE) * 2).to(dtype)
    n = 700 if DEVICE.type == "cpu" else 20_000
    settings = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    drawn = set(draw(logits.expand(n, -1).contiguous(), [settings | {"seed": i} for i in range(n)])) if n > 700 else set()
    rows = SamplingRows(
        temperature=np.full(20_000, settings["temperature"], np.float32),
        top_k=np.full(20_000, settings["top_k"], np.int32),
        top_p=np.full(20_000, settings["top_p"], np.float32),
        min_p=np.full(20_000, settings["min_p"], np.float32),
        seed=np.arange(20_000, dtype=np.uint64),
        positions=np.full(20_000, 7, np.int64),
    )
    expected = set(cpu_sample(logits.cpu().float().expand(20_000, -1), rows).tolist())
    if drawn:
        assert drawn == expected
    else:  # the interpreter is slow: compare the bound instead of drawing thousands of times
        assert kept(logits, settings) == expected


def kept(logits: torch.Tensor, settings: dict[str, float]) -> set[int]:
    """The tokens at or above the bound that the kernel finds."""
    from minisgl.model.kernels.sampling import _filter_bounds

    state, _ = joined([settings, settings])
    slots = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    bounds = torch.empty(2, device=DEVICE)
    both = logits.expand(2, -1).contiguous()
    low_bit = 16 if logits.dtype == torch.bfloat16 else 0
    _filter_bounds[(2,)](
        both,
        60,
        60,
        slots,
        state.temperature,
        state.top_k,
        state.top_p,
        state.min_p,
        bounds,
        LOW_BIT=low_bit,
        BLOCK=64,
        PDL=False,
    )
    return set((logits.float() >= bounds[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("vocab", [100, 9000])
def test_the_same_seed_draws_the_token_that_the_sampler_of_the_cpu_draws(vocab: int) -> None:
    torch.manual_seed(4)
    n = 24
    logits = torch.randn(n, vocab, device=DEVICE) * 2
    rng = np.random.default_rng(5)
    rows = [
        {"temperature": t, "seed": int(rng.integers(1 << 62)), "top_k": k, "top_p": p, "min_p": m}
        for t, k, p, m in zip([0.2, 1.0, 5.0] * 8, [0, 0, 50] * 8, [1.0, 0.8] * 12, [0.0, 0.0, 0.0, 0.01] * 6, strict=True)
    ]
    columns = {k: np.array([r[k] for r in rows]) for k in rows[0]}
    settings = SamplingRows(
        temperature=columns["temperature"].astype(np.float32),
        top_k=columns["top_k"].astype(np.int32),
        top_p=columns["top_p"].astype(np.float32),
        min_p=columns["min_p"].astype(np.float32),
        seed=columns["seed"].astype(np.uint64),
        positions=np.full(n, 7, np.int64),
    )
    assert draw(logits, rows) == cpu_sample(logits.cpu(), settings).tolist()


def test_drawn_tokens_are_distributed_as_softmax() -> None:
    torch.manual_seed(5)
    n = 400 if DEVICE.type == "cpu" else 100_000
    logits = torch.randn(8, device=DEVICE)
    drawn = draw(logits.expand(n, -1).contiguous(), [{"temperature": 0.7, "seed": i} for i in range(n)])
    counts, wanted = torch.bincount(torch.tensor(drawn), minlength=8), n * torch.softmax(logits.cpu() / 0.7, 0)
    assert ((counts - wanted) ** 2 / wanted).sum() < 24.3  # chi-squared, 7 degrees of freedom: one sampler of a thousand


def _specialised(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, set[str]]]:
    """The kernels of a module with the arguments that Triton must not specialise on."""
    for kernel in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for call in (d for d in kernel.decorator_list if isinstance(d, ast.Call)):
            yield kernel, {name for k in call.keywords if k.arg == "do_not_specialize" for name in ast.literal_eval(k.value)}


def test_every_argument_exempt_from_specialisation_exists() -> None:
    """Triton ignores a name that no argument has, and compiles anew in the middle of serving."""
    exempt = 0
    for path in Path(norm_activation.__file__).parent.glob("*.py"):
        for kernel, names in _specialised(ast.parse(path.read_text(encoding="utf-8"))):
            assert names <= {argument.arg for argument in kernel.args.args}, f"{path.name}: {kernel.name}"
            exempt += len(names)
    assert exempt > 30
