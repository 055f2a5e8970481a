"""How much a rank allocates to load its shard: every allocation of torch and numpy counted, no clock and no resident set."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_gguf import write_gguf
from test_quantized import FP8, channel_fp8, quantise
from tiny_models import save_llama
from torch.profiler import ProfilerActivity, profile

from minisgl.model.architectures.llama import Llama
from minisgl.model.checkpoint import weights as checkpoint
from minisgl.model.checkpoint.gguf_file import GGUFFile
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.interfaces import Build
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.shard import Shard
from minisgl.model.cpu.layers import CpuLayers

LIMIT = 1.2
LAYERS = 12


def peak_and_kept(load: Callable[[], Any], path: str) -> tuple[int, int]:
    """(most bytes that were allocated at one time, bytes that were still allocated at the end) while `load` ran.

    Torch's allocator reports each allocation and release to its profiler; numpy's go through tracemalloc.  The two peaks are
    added, as if they had come at the same moment.  Torch also reports the memory map of `path`, which is no allocation.
    """
    with profile(profile_memory=True):
        """What it imports at its first use is not to be counted."""
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        kept = load()
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    mapped = os.path.getsize(path)
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    live = np.cumsum([n for n in sizes if abs(n) != mapped])
    del kept
    return int(live.max()) + numpy_peak, int(live[-1])


def loading(path: str, rank: int, size: int) -> Callable[[], Llama]:
    spec = resolve(path)

    def load() -> Llama:
        weights = open_weights(spec, torch.bfloat16)
        with torch.inference_mode():
            model = Llama(Build(spec, Shard.of(spec, rank, size), weights, Parallel(), CpuLayers(torch.bfloat16)))
        weights.finish()
        return model

    return load


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "hf"
    save_llama(path, layers=LAYERS, hidden=192, inner=384, vocab=4096)
    return path


def plain(original: Path, folder: Path) -> str:
    return str(original)


def file_of(path: str) -> str:
    return path if path.endswith(".gguf") else os.path.join(path, "model.safetensors")


def fp8(original: Path, folder: Path) -> str:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((original / name).read_bytes())

    def layer(w: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = w.abs().amax(1, keepdim=True) / 448
        return {"weight": (w / scale).to(FP8), "weight_scale": scale}

    quantise(folder, load_file(original / "model.safetensors"), channel_fp8()[0], layer)
    return str(folder)


def q8_0(original: Path, folder: Path) -> str:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(original)
    return write_gguf(folder / "m.gguf", model, kind=gguf.GGMLQuantizationType.Q8_0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("make", [plain, fp8, q8_0])
def test_loading_a_shard_never_takes_much_more_than_the_shard(make, rank, original, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 2048)  # in proportion to a model this small
    path = make(original, tmp_path)
    spec = resolve(path)
    shard = Shard.of(spec, rank, 2)
    hidden, rows = spec.hidden_size, 2 * shard.num_heads + 2 * shard.num_kv_heads
    per_layer = hidden * (spec.head_dim * rows + 3 * (shard.mlp[1] - shard.mlp[0]) + 2)
    size = 2 * (hidden * (2 * (shard.vocab[1] - shard.vocab[0]) + 1) + LAYERS * per_layer)
    weights = open_weights(spec, torch.bfloat16)
    assert file_of(path) in Path("/proc/self/maps").read_text()
    del weights
    peak, kept = peak_and_kept(loading(path, rank, 2), file_of(path))
    assert size <= kept < 1.02 * size
    assert peak < LIMIT * kept


def test_the_count_notices_a_tensor_that_is_read_whole(original, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 1 << 30)
    path = q8_0(original, tmp_path)
    peak, kept = peak_and_kept(loading(path, 0, 2), path)
    assert peak > LIMIT * kept


def test_a_rank_reads_no_row_and_no_block_of_another(original, tmp_path, monkeypatch):
    """Bytes of a GGUF file that are dequantised by both ranks together: each of a matrix once, those of a cut block twice."""
    path = q8_0(original, tmp_path)
    read = [0, 0]

    def count(raw: np.ndarray, kind: Any) -> np.ndarray:
        read[rank] += raw.nbytes
        return dequantize(raw, kind)

    dequantize = gguf.quants.dequantize
    monkeypatch.setattr("gguf.quants.dequantize", count)
    for rank in (0, 1):
        loading(path, rank, 2)()
    stored = sum(t.nbytes for t in GGUFFile(path).tensors.values() if len(t.shape) > 1 and t.kind)
    assert stored <= sum(read) < 1.1 * stored
    assert max(read) < 0.75 * stored  # 2 + 1 KV heads: two thirds of the attention, half of the rest


def test_the_embedded_model_is_loaded_within_the_limit():
    path = resolve(None).path
    peak, kept = peak_and_kept(loading(path, 1, 2), path)
    assert kept > 100e6
    assert peak < LIMIT * kept
