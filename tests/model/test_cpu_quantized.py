"""Quantised models on a CPU: how far from float32, independent of neighbours, and the same without a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import Driver, config_for, needs_compiler, save_architecture, save_qwen3

from minisgl.actors.spawn import make_runner
from minisgl.config import EngineConfig
from minisgl.errors import UserError
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.interfaces import Build
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import Shard
from minisgl.model.common.slots import SlotState
from minisgl.model.cpu import runner as runner_module
from minisgl.model.cpu.attention_c import KernelAttention
from minisgl.model.cpu.backend import CpuArithmetic
from minisgl.model.cpu.layers import CpuLayers
from minisgl.model.cpu.quantized_layers import QuantizedLayers
from minisgl.model.text.tokenizer import load_tokenizer
from minisgl.plan import StepPlan

TEXT = """The harbour was quiet when the first boats came in. Two men stood on the wall and counted the baskets of fish,
and a boy wrote the numbers into a book. It had rained for three days, and the road to the market was under water, so
most of the catch would have to be salted. "We could send it by train," said the older man, "if the station master opens
the goods shed before noon." Nobody believed that he would. In the end they carried the baskets up the hill, one after
the other, and sold them from the steps of the church to whoever passed by. By evening only a few crabs were left, and
the cats of the town sat in a circle around them, as patient as judges. A good price depends on many things: the
weather, the season, and the mood of the people who buy. The boy closed his book and added up the columns. They had
earned less than in the week before, but more than feared."""


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Keeper:
    """Stands in for the sampler: keeps logits, always says token 5."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, rows: object) -> Any:
        self.logits.append(logits.clone())
        return np.full(len(logits), 5, np.int32)


def logits_of(path: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], **engine: Any) -> list[list[torch.Tensor]]:
    """Of each prompt alone in the batch or all together: after the prompt, and after four more tokens."""
    keeper = Keeper()
    monkeypatch.setattr(runner_module, "sample", keeper)
    config = config_for(path, page_size=16, **engine)
    runner = make_runner(config, 0, "")
    runner.allocate(runner.max_pages())
    driver = Driver(runner.max_pages(), config.engine.page_size)
    slots = list(range(len(prompts)))
    for slot in slots:
        driver.join(slot)
    runner.launch(driver.plan(prefill=[(s, p, True) for s, p in zip(slots, prompts, strict=True)]))
    runner.launch(driver.plan(decode=slots))
    for _ in range(3):
        runner.launch(driver.plan(decode=None, same=slots))
    runner.close()
    return [[step[s] for step in keeper.logits] for s in slots]


def prompts(n: int) -> list[list[int]]:
    g = np.random.default_rng(3)
    return [g.integers(3, 200, int(g.integers(1, 40))).tolist() for _ in range(n)]


@pytest.mark.parametrize("kind", ["int8", "q4"])
def test_a_request_gets_the_same_logits_whatever_runs_beside_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_qwen3(tmp_path)
    ids = prompts(6)
    together = logits_of(tmp_path, monkeypatch, ids, quantization=kind, threads=2)
    for p, mine in zip(ids, together, strict=True):
        (alone,) = logits_of(tmp_path, monkeypatch, [p], quantization=kind)
        assert all(torch.equal(a, b) for a, b in zip(alone, mine, strict=True))


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "qwen3-moe", "gpt-oss", "smollm3"])
def test_eight_bits_are_near_float32_and_torch_does_the_same_as_c(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_architecture(tmp_path, name)
    ids = prompts(2)

    def run(**engine: Any) -> torch.Tensor:
        return torch.stack([x for row in logits_of(tmp_path, monkeypatch, ids, **engine) for x in row]).float()

    exact, c = run(), run(quantization="int8")
    monkeypatch.setenv("CC", "no-such-compiler")
    fallback = run(quantization="int8")
    assert 0 < (c - exact).norm() / exact.norm() < 0.12  # bfloat16 moves these models by up to 0.03
    assert 0 < (c - fallback).norm() / exact.norm() < 0.05  # rounding the other way moves later activations


@pytest.mark.parametrize("name", ["qwen3-moe", "phi3"])
def test_matrices_as_they_are_stored_give_what_their_copies_in_float32_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_architecture(tmp_path, name).bfloat16().save_pretrained(tmp_path)
    ids = prompts(2)
    lazy = logits_of(tmp_path, monkeypatch, ids, quantization="int8")
    monkeypatch.setattr(CpuArithmetic, "lazy", False)
    assert all(
        torch.equal(a, b)
        for x, y in zip(lazy, logits_of(tmp_path, monkeypatch, ids, quantization="int8"), strict=True)
        for a, b in zip(x, y, strict=True)
    )


def perplexity(layers: CpuLayers, attention: Any, lazy: bool) -> tuple[float, torch.Tensor]:
    """Of TEXT under the embedded model, and the logits."""
    spec = resolve(None)
    weights = open_weights(spec, torch.float32, lazy=lazy)
    with torch.inference_mode():
        model = model_class(spec.architecture)(Build(spec, Shard.of(spec, 0, 1), weights, Parallel(), layers))
        ids = np.array([1, *load_tokenizer(spec).encode(TEXT, False)], np.int32)
        state = SlotState(1, 512, 16)
        state.page_table[0] = np.arange(state.page_table.shape[1])
        prefill = np.zeros(1, StepPlan(1).prefill.dtype)
        prefill["n_ids"] = len(ids)
        batch = state.apply(StepPlan(1, prefill=prefill, ids=ids))
        attention.plan(batch)
        logits = model(torch.from_numpy(batch.ids), torch.from_numpy(batch.positions), None, attention)
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:].astype(np.int64)))
    return float(losses.exp()), logits


def test_without_a_compiler_the_default_computes_what_float32_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the kinds that are asked for are computed in torch."""
    save_qwen3(tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    default, exact, eight = (
        torch.stack([x for row in logits_of(tmp_path, monkeypatch, prompts(2), quantization=k) for x in row])
        for k in ("auto", "none", "int8")
    )
    assert torch.equal(default, exact)
    assert 0 < (eight - exact).norm() / exact.norm() < 0.12


@needs_compiler
def test_what_auto_chooses_for_the_embedded_model_keeps_its_perplexity() -> None:
    spec, shard = resolve(None), Shard.of(resolve(None), 0, 1)
    torch.set_num_threads(1)
    found = {}
    for kind in ("none", "auto"):
        arithmetic = CpuArithmetic.choose(EngineConfig(quantization=kind), spec, 1)
        found[kind] = perplexity(arithmetic.layers, arithmetic.attention(spec, shard, 32, 16), arithmetic.lazy)
    assert isinstance(arithmetic.layers, QuantizedLayers)
    assert isinstance(arithmetic.attention(spec, shard, 1, 16), KernelAttention)
    (exact, theirs), (quantised, mine) = found.values()
    # The file's 4 bits are what both compute with; with activations of one byte the logits would be 3 % apart.
    assert abs(quantised / exact - 1) < 0.001
    assert (mine - theirs).norm() / theirs.norm() < 0.002


@needs_compiler
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "4 bits of a file that has them, 8 bits for the rest, C kernels"),
        ({"quantization": "none"}, "in float32, torch"),
        ({"quantization": "int8"}, "8 bits, C"),
        ({"dtype": "bfloat16"}, "in bfloat16, torch"),
        ({"page_size": 8}, "multiples of 16"),
    ],
)
def test_the_start_says_which_arithmetic_was_chosen(settings: dict[str, Any], words: str) -> None:
    assert words in CpuArithmetic.choose(EngineConfig(**settings), resolve(None), 1).text


@needs_compiler
def test_the_start_says_that_experts_stay_in_float32(tmp_path: Path) -> None:
    save_architecture(tmp_path, "qwen3-moe")
    assert "experts in float32, C kernels" in CpuArithmetic.choose(EngineConfig(), resolve(str(tmp_path)), 1).text


def test_without_a_compiler_the_default_is_float32_and_the_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    default, asked = (CpuArithmetic.choose(EngineConfig(quantization=k), resolve(None), 1) for k in ("auto", "int8"))
    assert "float32, torch" in default.text
    assert not isinstance(default.layers, QuantizedLayers)
    assert "8 bits, in torch" in asked.text
    assert isinstance(asked.layers, QuantizedLayers)
    assert all("slower" in chosen.text and "no-such-compiler" in chosen.text for chosen in (default, asked))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quantization": "fp8"}, "fp8 needs a GPU"),
        ({"quantization": "int8", "dtype": "bfloat16"}, "leave out --dtype"),
        ({"quantization": "q4", "device": "cuda"}, "needs --device cpu"),
        ({"quantization": "q5"}, "one of auto, none, fp8, int8, q4"),
    ],
)
def test_a_quantization_that_the_device_does_not_have_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        EngineConfig(**settings)
