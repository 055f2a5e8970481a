"""The bytes that a model takes, from its sizes alone, are those of the tensors that a rank builds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if not torch.cuda.is_available():
    import interpreter  # noqa: F401  before the kernels
from tiny_models import ARCHITECTURES, config_for, needs_compiler, save_architecture

from minisgl.commands.fit.predict import ITEM_BYTES, MatrixBytes, in_blocks, in_dtype, in_fp8, largest_step, weight_bytes
from minisgl.config import EngineConfig, ModelSpec
from minisgl.model.checkpoint.gguf_spec import stored_types
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.interfaces import Build
from minisgl.model.common.memory import host_pages, token_bytes
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import Shard
from minisgl.model.cpu.kernels import Kernels
from minisgl.model.cpu.layers import CpuLayers
from minisgl.model.cpu.quantized_layers import QuantizedLayers
from minisgl.model.cuda.layers import CudaLayers
from minisgl.model.cuda.memory import Ledger, graph_bytes

CPU = torch.device("cpu")
NOT_WEIGHTS = ("rope", "local_rope", "parallel", "spec")


def tensors(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor below an object but rotary tables, in closures, too."""
    if id(thing) in seen or isinstance(thing, (str, int, float, type, Shard, ModelSpec)):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    parts: list[Any] = []
    if isinstance(thing, (list, tuple)):
        parts = list(thing)
    elif callable(thing) and getattr(thing, "__closure__", None):
        parts = [cell.cell_contents for cell in thing.__closure__]
    names = {*getattr(thing, "__dict__", {}), *(n for c in type(thing).__mro__ for n in getattr(c, "__slots__", ()))}
    parts += [getattr(thing, n, None) for n in names if n not in NOT_WEIGHTS]
    for part in parts:
        yield from tensors(part, seen)


def built_bytes(spec: ModelSpec, shard: Shard, layers: Any, dtype: torch.dtype, lazy: bool = False) -> int:
    """Bytes of the tensors of a model that is built as a rank builds it."""
    parallel = Parallel()
    parallel.rank, parallel.size = shard.rank, shard.size
    weights = open_weights(spec, dtype, lazy=lazy)
    model = model_class(spec.architecture)(Build(spec, shard, weights, parallel, layers))
    sizes: dict[int, int] = {}
    for t in tensors(model, set()):
        if t.layout == torch.strided:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        else:  # a matrix in oneDNN's layout
            sizes[-id(t)] = t.numel() * t.element_size()
    return sum(sizes.values())


def predicted(spec: ModelSpec, shard: Shard, item: int, size: MatrixBytes, **more: Any) -> int:
    return sum(weight_bytes(spec, shard, item, size, **more).values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_weights_of_every_architecture_are_predicted_to_the_byte(name: str, tmp_path: Path) -> None:
    save_architecture(tmp_path, name)
    spec = config_for(tmp_path).model
    for size in (1, 2, 3):
        for rank in range(size):
            shard = Shard.of(spec, rank, size)
            layers = CudaLayers(torch.bfloat16, CPU)
            assert built_bytes(spec, shard, layers, torch.bfloat16) == predicted(spec, shard, 2, in_dtype(2))
    # Where a head is tied to the embedding, oneDNN's layout of it is a copy.
    found = built_bytes(spec, Shard.of(spec), CpuLayers(torch.float32), torch.float32)
    assert found == predicted(spec, Shard.of(spec), 4, in_dtype(4), separate_head=torch._C._has_mkldnn)


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-moe", "gemma3", "phi3"])
@pytest.mark.parametrize("kind", ["int8", "q4"])
def test_the_packed_weights_of_a_directory_are_predicted_to_the_byte(name: str, kind: str, tmp_path: Path) -> None:
    save_architecture(tmp_path, name)
    spec = config_for(tmp_path).model
    for size in (1, 2):
        for rank in range(size):
            shard = Shard.of(spec, rank, size)
            found = built_bytes(spec, shard, QuantizedLayers(kind, Kernels(1)), torch.float32, lazy=True)
            assert found == predicted(spec, shard, 4, in_blocks(kind, stored_types(spec)), separate_head=True)


@needs_compiler
@pytest.mark.parametrize("kind", ["auto", "int8", "q4"])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_packed_weights_of_the_embedded_model_are_predicted_to_the_byte(kind: str, tp: int) -> None:
    spec = replace(resolve(None), num_layers=2)
    for rank in range(tp):
        shard = Shard.of(spec, rank, tp)
        found = built_bytes(spec, shard, QuantizedLayers(kind, Kernels(1)), torch.float32, lazy=True)
        assert found == predicted(spec, shard, 4, in_blocks(kind, stored_types(spec)), separate_head=True)


def test_float8_takes_a_byte_for_a_number_and_four_for_an_output() -> None:
    spec = random_shape("qwen3-8b")
    plain = weight_bytes(spec, Shard.of(spec), 2, in_dtype(2))
    eight = weight_bytes(spec, Shard.of(spec), 2, in_fp8(2))
    assert eight["head"] == plain["head"]
    assert eight["mlp"] == plain["mlp"] // 2 + 4 * spec.num_layers * (2 * spec.intermediate_size + spec.hidden_size)


def test_a_page_of_the_cache_is_what_a_rank_allocates() -> None:
    from minisgl.model.cuda.attention.kv_cache import KVCache

    spec = random_shape("llama-3.2-1b")
    for rank in range(3):
        heads = Shard.of(spec, rank, 3).num_kv_heads
        cache = KVCache(
            layers=spec.num_layers, num_pages=1, page_size=16, kv_heads=heads, head_dim=64, dtype=torch.bfloat16, device=CPU
        )
        one = cache._cache.nbytes // 2  # there is a spare one
        assert one == 16 * token_bytes(spec, Shard.of(spec, rank, 3), 2)


def test_pages_of_the_host_are_a_share_of_what_is_free() -> None:
    engine = EngineConfig(tp=2, memory_fraction=0.5, max_running=10)
    assert host_pages(engine, 1000, 1024, 1 << 20) == (1 << 20) // 2 // 2 // 16384
    assert host_pages(engine, 1000, 1024, 1 << 40) == 10 * 1000 // 16
    assert host_pages(replace(engine, kv_tokens=100), 1000, 1024, 0) == 7
    assert host_pages(engine, 1000, 1024, 0) == 0


# What one H200 printed at its start, of docs/benchmarks.md: model, flags -> GiB of weights, of the largest step, of graphs, and
# the tokens of the KV cache.
RECORDED = [
    ("qwen3-14b", {}, (27.5, 1.4, 1.7, 640_624), 0.6),
    ("qwen3-14b", {"step_tokens": 16384}, (27.5, 2.5, 1.7, 634_048), 0.6),
    ("qwen3-0.6b", {"step_tokens": 16384}, (1.1, 0.7, 1.7, 1_143_504), 0.6),
    ("qwen3-14b", {"tp": 2}, (13.8, 1.7, 2.2, 1_422_032), 1.5),
]


@pytest.mark.parametrize(("name", "flags", "measured", "other"), RECORDED)
def test_the_ledger_of_a_gpu_is_predicted_as_it_was_measured(
    name: str, flags: dict[str, Any], measured: tuple[float, float, float, int], other: float
) -> None:
    spec = random_shape(name)
    engine = EngineConfig(**{"device": "cuda", "max_running": 256, "step_tokens": 8192, "memory_fraction": 0.9} | flags)
    shard, gib, kv = Shard.of(spec, 0, engine.tp), 1 << 30, ITEM_BYTES["fp8" if engine.kv_cache_dtype == "fp8" else "bfloat16"]
    size = in_fp8(2) if engine.quantization == "fp8" else in_dtype(2)
    weights, step = predicted(spec, shard, 2, size), largest_step(engine, spec, shard, 2)
    graphs = graph_bytes(engine, spec, 2)
    assert weights / gib == pytest.approx(measured[0], abs=0.06)
    assert step / gib == pytest.approx(measured[1], abs=0.1)
    assert graphs / gib == pytest.approx(measured[2], abs=0.06)
    page = 16 * token_bytes(spec, shard, kv)
    ledger = Ledger(int(139.8 * gib), int(other * gib), weights, step, page, 16, graphs)
    assert 16 * ledger.pages(0, 0.9, 0) == pytest.approx(measured[3], rel=0.005)
