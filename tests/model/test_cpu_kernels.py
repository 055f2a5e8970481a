"""The C kernels of the CPU against slow references, for every instruction set that this machine can compile and run."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import fake_spec
from tiny_models import needs_compiler

from minisgl.model.common.functional import act_mul
from minisgl.model.common.gguf_blocks import BITS, FLOATS, Groups, from_gguf
from minisgl.model.common.interfaces import QKNorm
from minisgl.model.common.rope import Rope
from minisgl.model.common.shard import Shard
from minisgl.model.common.slots import StepBatch
from minisgl.model.cpu import build
from minisgl.model.cpu.attention_c import KernelAttention
from minisgl.model.cpu.kernels import Kernels, Norm, PackedWeight
from minisgl.model.cpu.packing import interleave, quantise, round_trip, tile

SETS = {"native": ("-march=native",), "plain": ()}
if platform.machine() == "x86_64":
    SETS["avx2"] = ("-march=x86-64-v3",)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs_compiler) for name in SETS])
def run(request: pytest.FixtureRequest, libraries: None) -> Kernels:
    flags = build.processor()
    if request.param == "avx2" and not {"avx2", "fma", "f16c", "bmi2"} <= set(flags.split()):
        pytest.skip("this processor has no AVX2")
    return Kernels(2, SETS[request.param])


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: torch.Tensor, bits: int, **kwargs: Any) -> tuple[PackedWeight, torch.Tensor]:
    """A matrix for the kernel, and what it stands for."""
    groups = quantise(weight, bits)
    return PackedWeight(tile([groups]), *weight.shape, **kwargs), groups.values()[:, : weight.shape[1]]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """A number on the edge may be rounded either way, by 3e-5 of the largest of its group."""
    assert got.shape == expected.shape
    assert (got - expected).norm() <= tolerance * expected.norm() + 1e-12, (got - expected).abs().max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 48, 64), (3, 37, 96), (8, 16, 32), (19, 70, 256), (150, 33, 64)])
def test_a_product_is_that_of_the_rounded_matrix_and_the_rounded_rows(
    run: Kernels, bits: int, rows: int, outputs: int, inputs: int
) -> None:
    x = rand(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    x[:, 0] *= 20
    x[-1, :32] = 0  # a group without a scale
    weight, values = packed(rand(outputs, inputs, seed=1) + 0.3, bits, bias=(bias := rand(outputs, seed=2)))
    expected = (round_trip(x).double() @ values.double().T + bias).float()
    got = run.linear(weight, x, None, None)
    for mine, theirs in zip(got, expected, strict=True):  # row by row: their sizes differ
        close(mine, theirs)


@pytest.mark.parametrize("inputs", [40, 100])
def test_inputs_need_not_fill_the_last_group(run: Kernels, inputs: int) -> None:
    weight, values = packed(rand(20, inputs), 8)
    x = rand(5, inputs, seed=1)
    close(run.linear(weight, x, None, None), round_trip(x)[:, :inputs] @ values.T)


@pytest.mark.parametrize("rows", [1, 6])
def test_a_norm_and_what_is_added_before_it_are_part_of_the_product(run: Kernels, rows: int) -> None:
    x, delta, scale = rand(rows, 96), rand(rows, 96, seed=1), rand(96, seed=2)
    weight, values = packed(rand(32, 96, seed=3), 8)
    both = x + delta
    normed = torch.nn.functional.rms_norm(both, (96,), scale, 1e-3)
    got = run.linear(weight, x, delta, Norm(scale.data_ptr(), 1e-3))
    assert torch.equal(x, both)  # the residual stream
    close(got, round_trip(normed) @ values.T, 2e-3)  # a number on the edge may be rounded either way


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gate_and_up_are_one_product(run: Kernels, bits: int, activation: str) -> None:
    gate, up = quantise(rand(48, 64), bits), quantise(rand(48, 64, seed=1), bits)
    x = rand(11, 64, seed=2) * 3
    both = PackedWeight(interleave(tile([gate]), tile([up])), 96, 64, gated=activation)
    expected = act_mul(round_trip(x) @ torch.cat((gate.values(), up.values())).T, activation)
    close(run.linear(both, x, None, None), expected, 1e-5)


def test_a_row_does_not_depend_on_its_neighbours(run: Kernels) -> None:
    x = rand(21, 128)
    for bits in (4, 8):
        weight, _ = packed(rand(40, 128, seed=1), bits)
        together = run.linear(weight, x, None, None)
        for rows in (1, 2, 5, 9):
            assert torch.equal(run.linear(weight, x[-rows:].contiguous(), None, None), together[-rows:])


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0]
)
def test_the_numbers_of_a_file_are_kept(kind: gguf.GGMLQuantizationType) -> None:
    raw = gguf.quantize(rand(24, 96).numpy(), kind)
    values = from_gguf(torch.from_numpy(raw), int(kind)).values()
    assert torch.equal(values, torch.from_numpy(gguf.dequantize(raw, kind)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_rounds_as_torch_does(run: Kernels, bits: int, dtype: torch.dtype) -> None:
    """Bitwise, whatever tiles the matrices share, and of columns of a larger matrix, as a rank has them."""
    widths = (64, 96) if bits == 4 else (64, 96, 40)
    for inputs in widths:
        parts = [(rand(n, inputs, seed=n) * 3 + 0.2).to(dtype) for n in (5, 16, 37)]
        parts[0][1] = 0
        parts[1][2, :32] = 7e-6  # a step that is subnormal
        of_rank = torch.cat((parts[1], parts[1]), 1)[:, inputs:]
        kind = FLOATS[dtype]
        expected = tile([quantise(w, bits) for w in parts])
        assert torch.equal(run.pack([(w, kind) for w in (parts[0], of_rank, parts[2])], inputs, bits), expected)
    gate, up = (rand(48, 64, seed=s).to(dtype) for s in (1, 2))
    expected = interleave(tile([quantise(gate, bits)]), tile([quantise(up, bits)]))
    assert torch.equal(run.pack([(gate, kind), (up, kind)], 64, bits, in_turns=True), expected)


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0]
)
def test_packing_keeps_the_numbers_of_a_file(run: Kernels, kind: gguf.GGMLQuantizationType) -> None:
    parts = [torch.from_numpy(gguf.quantize(rand(n, 96, seed=n).numpy(), kind)) for n in (9, 40)]
    expected = tile([from_gguf(p, int(kind)) for p in parts])
    assert torch.equal(run.pack([(p, int(kind)) for p in parts], 96, BITS[int(kind)]), expected)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.08), (8, 0.006)])
def test_rounding_a_matrix_costs_what_its_bits_allow(bits: int, most: float) -> None:
    weight = rand(64, 128)
    values = quantise(weight, bits).values()
    assert 0 < (values - weight).norm() / weight.norm() < most
    assert quantise(torch.zeros(16, 32), bits).values().count_nonzero() == 0


def test_tiles_have_the_layout_that_the_kernel_documents() -> None:
    numbers = torch.arange(16 * 32, dtype=torch.int32).remainder(16).to(torch.uint8).view(16, 1, 32)
    block = tile([Groups(numbers, torch.full((16, 1), 2.0).half(), torch.full((16, 1), -1.0).half())])[0, 0]
    assert len(block) == 320
    for output, k in ((0, 0), (3, 5), (15, 31), (7, 16)):
        byte = int(block[k % 16 // 4 * 64 + output * 4 + k % 4])
        assert (byte >> 4 if k >= 16 else byte & 15) == numbers[output, 0, k]
    assert block[256:288].view(torch.float16).tolist() == [2.0] * 16
    assert block[288:].view(torch.float16).tolist() == [-1.0] * 16


@dataclass
class Case:
    heads: int = 6
    kv_heads: int = 2
    dim: int = 32
    page_size: int = 16
    chunks: tuple[tuple[int, int], ...] = ((0, 20), (37, 21))  # (tokens before, tokens)
    decodes: tuple[int, ...] = (300, 129, 128, 17, 1)  # contexts
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    qk_norm: bool = False
    rotary: int = 0


CASES = {
    "groups of 3": Case(),
    "one head for each": Case(heads=2),
    "groups of 11": Case(heads=22, dim=16),
    "pages of 48": Case(page_size=48),
    "window": Case(window=40),
    "window within a page": Case(window=5),
    "soft cap": Case(softcap=2.0),
    "sinks": Case(sinks=True, window=24),
    "norms of heads": Case(qk_norm=True),
    "partly rotated": Case(rotary=16),
    "decode only": Case(chunks=()),
    "prompts only": Case(decodes=()),
}


class Scene:
    """A cache with some history, and one step over it."""

    def __init__(self, c: Case, run: Kernels) -> None:
        self.c, g = c, np.random.default_rng(0)
        contexts = [a + n for a, n in c.chunks] + list(c.decodes)
        counts = [n for _, n in c.chunks] + [1] * len(c.decodes)
        longest = -(-max(contexts) // c.page_size)
        self.pages = g.permutation(len(contexts) * longest).reshape(len(contexts), longest).astype(np.int32)
        self.spec = replace(
            fake_spec(),
            num_heads=c.heads,
            num_kv_heads=c.kv_heads,
            head_dim=c.dim,
            windows=(c.window,),
            attn_softcap=c.softcap,
            sinks=c.sinks,
            rotary_dim=c.rotary,
        )
        self.norm = QKNorm(rand(c.dim, seed=5), rand(c.dim, seed=6), 1e-3) if c.qk_norm else None
        self.sinks = rand(c.heads, seed=7) if c.sinks else None
        self.attention = KernelAttention(self.spec, Shard.of(self.spec), self.pages.size, c.page_size, run)
        self.qkv = [rand(n, (c.heads + 2 * c.kv_heads) * c.dim, seed=10 + i) for i, n in enumerate(contexts)]
        self.contexts, self.counts = contexts, counts
        for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):  # what the cache holds before
            if context > count:
                self.step([row], [context - count], [context - count])

    def step(self, rows: list[int], contexts: list[int], counts: list[int]) -> torch.Tensor:
        """The last `counts` of `contexts` tokens of each row; those of one token that are not alone decode."""
        n_chunks = len(self.c.chunks) if len(rows) > 1 else 1
        positions = [np.arange(c - n, c) for c, n in zip(contexts, counts, strict=True)]
        size = self.c.page_size
        batch: Any = object.__new__(StepBatch)
        for name, value in {
            "chunk_lens": np.array(counts[:n_chunks], np.int32),
            "kv_lens": np.array(contexts, np.int32),
            "pages": self.pages[rows],
            "kv_index": np.concatenate(
                [self.pages[r][p // size].astype(np.int64) * size + p % size for r, p in zip(rows, positions, strict=True)]
            ),
        }.items():
            object.__setattr__(batch, name, value)
        self.attention.plan(batch)
        qkv = torch.cat([self.qkv[r][p] for r, p in zip(rows, positions, strict=True)])
        rotation = Rope(self.spec, torch.float32).at(torch.from_numpy(np.concatenate(positions)))
        return self.attention(0, qkv, rotation, self.norm, sinks=self.sinks)

    def expected(self, row: int, count: int) -> torch.Tensor:
        """Of the last `count` tokens, in float64, from keys and values as half precision holds them."""
        c = self.c
        x = self.qkv[row].view(-1, c.heads + 2 * c.kv_heads, c.dim).double()
        q, k, v = x.split((c.heads, c.kv_heads, c.kv_heads), 1)
        if self.norm is not None:
            q = torch.nn.functional.rms_norm(q, (c.dim,), self.norm.q.double(), self.norm.eps)
            k = torch.nn.functional.rms_norm(k, (c.dim,), self.norm.k.double(), self.norm.eps)
        cos, sin = Rope(self.spec, torch.float64).at(torch.arange(len(x)))
        r = cos.shape[-1]
        q, k = (torch.cat((y[..., :r] * cos + y[..., :r].roll(r // 2, -1) * sin, y[..., r:]), -1) for y in (q, k))
        k, v = (y.float().half().double().repeat_interleave(c.heads // c.kv_heads, 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.spec.scale
        if c.softcap:
            scores = c.softcap * torch.tanh(scores / c.softcap)
        age = torch.arange(len(x))[:, None] - torch.arange(len(x))
        scores.masked_fill_((age < 0) | ((age >= c.window) if c.window else False), -torch.inf)
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks.double()[:, None, None].expand(-1, len(x), 1)), -1)
        weights = scores.softmax(-1)[..., : len(x)]
        return torch.einsum("hqk,khd->qhd", weights, v)[-count:].flatten(1).float()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_is_that_of_the_formula(run: Kernels, case: Case) -> None:
    scene = Scene(case, run)
    rows = list(range(len(scene.contexts)))
    got = scene.step(rows, scene.contexts, scene.counts).split(scene.counts)
    for row, mine in zip(rows, got, strict=True):
        close(mine, scene.expected(row, scene.counts[row]), 3e-4)  # a key may be rounded to either neighbour


def test_attention_of_a_row_does_not_depend_on_its_neighbours(run: Kernels) -> None:
    scene = Scene(Case(chunks=((0, 1),), decodes=(300, 129, 17)), run)
    together = scene.step([0, 1, 2, 3], scene.contexts, scene.counts)
    for row in range(4):
        assert torch.equal(scene.step([row], [scene.contexts[row]], [1])[0], together[row])


@needs_compiler
def test_the_second_start_compiles_nothing(libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_kernels()

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    build.load_kernels()
    with pytest.raises(AssertionError, match="again"):  # other flags are another library
        build.load_kernels(("-O1",))


@pytest.mark.parametrize(("compiler", "named"), [("no-such-compiler", "apt install gcc"), ("false", "could not compile")])
def test_a_missing_or_broken_compiler_is_named(
    compiler: str, named: str, libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(build.NoKernels, match=named):
        build.load_kernels()
    assert not list(build.cache_directory().glob("tmp*"))
