"""Quantised weights of several ranks have the numbers and scales that one rank's have."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_architecture, save_llama

from minisgl.config import ModelSpec
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.gguf_blocks import Groups
from minisgl.model.common.interfaces import Build
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import GROUP, Shard, split
from minisgl.model.cpu import quantized_layers
from minisgl.model.cpu.quantized_layers import QuantizedLayers


def matrices(spec: ModelSpec, rank: int, size: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> list[Groups]:
    """What the products of one rank multiply by, in the order in which the model makes them."""
    found: list[Groups] = []
    monkeypatch.setattr(quantized_layers, "TorchLinear", lambda parts, inputs, bias: found.extend(parts))
    weights = open_weights(spec, torch.float32, lazy=True)
    model_class(spec.architecture)(Build(spec, Shard.of(spec, rank, size), weights, Parallel(), QuantizedLayers(kind, None)))
    return found


def assert_same_groups(spec: ModelSpec, size: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put together, side by side or on top of each other, the shards' numbers, scales and offsets are those of the whole."""
    whole = matrices(spec, 0, 1, kind, monkeypatch)
    ranks = [matrices(spec, rank, size, kind, monkeypatch) for rank in range(size)]
    assert whole
    for i, one in enumerate(whole):
        side = one.numbers.shape[1] != ranks[0][i].numbers.shape[1]
        for field in ("numbers", "scale", "offset"):
            parts, expected = [getattr(rank[i], field) for rank in ranks], getattr(one, field)
            assert parts == [None] * size if expected is None else torch.equal(torch.cat(parts, int(side)), expected)


@pytest.mark.parametrize("kind", ["int8", "q4"])
@pytest.mark.parametrize("inner", [71, 96, 150, 320])
@pytest.mark.parametrize("size", [2, 3])
def test_shards_have_the_groups_of_the_whole(
    size: int, inner: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path, inner=inner)
    assert_same_groups(resolve(str(tmp_path)), size, kind, monkeypatch)


@pytest.mark.parametrize("name", ["mistral", "phi3", "gemma2"])
def test_shards_of_other_architectures_do_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_architecture(tmp_path, name, layers=1)
    assert_same_groups(resolve(str(tmp_path)), 2, "int8", monkeypatch)


def test_the_embedded_model_has_the_groups_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_groups(replace(resolve(None), num_layers=1), 3, "auto", monkeypatch)


def test_cuts_lie_between_groups_wherever_every_rank_gets_one(tmp_path: Path) -> None:
    save_llama(tmp_path)
    spec, rng = resolve(str(tmp_path)), random.Random(0)
    for _ in range(300):
        group, kv_heads, head_dim = rng.randrange(1, 9), rng.randrange(1, 17), rng.choice([8, 16, 64, 80, 96, 128])
        sizes: dict[str, Any] = {"num_heads": group * kv_heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        one = replace(spec, **sizes, intermediate_size=rng.randrange(1, 2000))
        size = rng.randrange(1, one.num_heads + 1)
        shards = [Shard.of(one, rank, size) for rank in range(size)]
        for field, total in (("heads", one.num_heads), ("mlp", one.intermediate_size)):
            ranges = [getattr(s, field) for s in shards]
            assert [i for start, end in ranges for i in range(start, end)] == list(range(total))
        assert all(start < end for s in shards for start, end in (s.heads, s.kv_heads))
        if -(-one.intermediate_size // GROUP) >= size:
            assert all(s.mlp[0] % GROUP == 0 for s in shards)
        if head_dim % GROUP == 0:
            assert all(s.q_rows[0] % GROUP == 0 for s in shards)


@pytest.mark.parametrize(("n", "parts", "unit"), [(71, 3, 32), (71, 4, 32), (1536, 3, 32), (2880, 4, 32), (5, 2, 2)])
def test_a_split_in_units_is_even_up_to_one_unit(n: int, parts: int, unit: int) -> None:
    ranges = split(n, parts, unit)
    assert [i for start, end in ranges for i in range(start, end)] == list(range(n))
    assert max(end - start for start, end in ranges) - min(end - start for start, end in ranges[:-1]) <= unit
