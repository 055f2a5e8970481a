"""Quantised checkpoints that are opened to stay packed: the same weights, in parts, and the same logits, as dequantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("on a GPU scripts/bench/packed.py does this", allow_module_level=True)
import interpreter  # noqa: F401  before the kernels
import test_gguf_quants
import test_quantized
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from test_gguf_quants import file_of  # noqa: F401  a fixture
from test_quantized import AWQ_ORDER_MAP, FORMATS, packed
from tiny_models import config_for, save_llama

from minisgl.commands.fit.predict import _PACKED as PREDICTED
from minisgl.commands.fit.predict import in_packed, matrices
from minisgl.config import Config, EngineConfig, engine_config
from minisgl.errors import UserError
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.activations import plain
from minisgl.model.common.interfaces import Build
from minisgl.model.common.parallel import Parallel
from minisgl.model.common.registry import model_class
from minisgl.model.common.shard import Shard
from minisgl.model.common.weights import QuantizedWeight, dequantized
from minisgl.model.cuda.layers import CudaLayers
from minisgl.model.cuda.packed_layers import PackedLinear

CPU = torch.device("cpu")
PACKED = [name for name in FORMATS if "gptq" in name or "int4" in name or name == "awq"]


def values(weight: object) -> torch.Tensor:
    assert isinstance(weight, QuantizedWeight)
    found = dequantized(weight.quants(CPU))
    assert found.shape == weight.shape
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_whole_numbers_of_a_layer_are_its_weight_and_so_are_those_of_its_parts(name: str, tmp_path: Path) -> None:
    config, tensors, _ = FORMATS[name]()
    test_quantized.write(tmp_path, config, tensors)
    shape = (test_quantized.OUT, test_quantized.IN)
    spec = resolve(str(tmp_path))
    whole = open_weights(spec, torch.float32).take(test_quantized.NAME, shape)
    weights = open_weights(spec, torch.float32, packed="auto")
    found = weights.take(test_quantized.NAME, shape)
    assert isinstance(found, QuantizedWeight) == (name in PACKED)
    if name not in PACKED:
        return
    assert torch.equal(found.dequantize(), whole)
    assert torch.allclose(values(found), whole, rtol=1e-6, atol=0)
    for rows in ((0, 16), (5, 11), (17, 48)):
        assert torch.allclose(values(weights.take(test_quantized.NAME, shape, rows=rows)), whole[slice(*rows)], rtol=1e-6)
    for cols in ((0, 32), (16, 64), (8, 24)):
        part = weights.take(test_quantized.NAME, shape, cols=cols)
        if "act-order" in name:
            assert torch.equal(part, whole[:, slice(*cols)])
        else:
            assert torch.allclose(values(part), whole[:, slice(*cols)], rtol=1e-6)


@pytest.mark.parametrize("kind", test_gguf_quants.SLOW, ids=lambda kind: kind.name)
def test_whole_numbers_of_a_block_type_are_its_weights(kind: Kind, file_of: Any) -> None:  # noqa: F811
    spec, _ = file_of(kind)
    shape = (test_gguf_quants.OUT, test_gguf_quants.IN)
    whole = open_weights(spec, torch.float32).take(test_gguf_quants.NAME, shape)
    weights = open_weights(spec, torch.float32, packed="auto")
    found = weights.take(test_gguf_quants.NAME, shape)
    stays = kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
    assert isinstance(found, QuantizedWeight) == stays == (int(kind) in PREDICTED)
    if stays:
        numbers = found.quants(CPU)
        assert PREDICTED[int(kind)] == (numbers.bits, numbers.group)
        bound = 1e-5 * float(whole.abs().max())
        assert torch.allclose(values(found), whole, atol=bound)
        assert torch.allclose(values(weights.take(test_gguf_quants.NAME, shape, rows=(5, 18))), whole[5:18], atol=bound)
        assert torch.allclose(values(weights.take(test_gguf_quants.NAME, shape, cols=(96, 416))), whole[:, 96:416], atol=bound)
        assert isinstance(weights.take(test_gguf_quants.NAME, shape, cols=(171, 342)), torch.Tensor)


def test_a_group_without_a_scale_is_minus_its_minimum(file_of: Any) -> None:  # noqa: F811
    from minisgl.model.checkpoint.gguf_quants import QUANTS

    _, raw = file_of(Kind.Q4_K)
    blocks = torch.from_numpy(raw.copy()).view(-1, 144)
    blocks[:, 4:16] = 0
    blocks[:, 8:12] = 5  # minima of the first four groups
    found = dequantized(QUANTS[12].read(blocks.view(test_gguf_quants.OUT, -1))).view(len(blocks), 8, 32)
    least = blocks[:, 2:4].contiguous().view(torch.float16).float()
    assert torch.allclose(found[:, :4], (-5 * least)[..., None].expand(-1, 4, 32), rtol=1e-6)
    assert not found[:, 4:].any()


def logits(spec: Any, how: str, shard: Shard | None = None) -> tuple[torch.Tensor, Any]:
    """Logits of a rank that sums over no other, with the queries in the place of attention; and the model."""
    shard = shard or Shard.of(spec)
    queries = shard.q_rows[1] - shard.q_rows[0]

    def attend(_: int, qkv: Any, *__: Any, **___: Any) -> torch.Tensor:
        rows = plain(qkv) if not hasattr(qkv, "parts") else qkv.float().half()
        return rows[:, :queries].contiguous()

    weights = open_weights(spec, torch.float16, device=CPU, packed=how)
    model = model_class(spec.architecture)(
        Build(spec, shard, weights, Parallel(), CudaLayers(torch.float16, CPU, no_partial_sums=True))
    )
    weights.finish()
    ids = torch.arange(5)
    return model(ids, ids, None, attend).float(), model


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_model_gives_the_same_logits_packed_and_dequantised(method: str, tmp_path: Path) -> None:
    save_llama(tmp_path, heads=4, kv_heads=2, hidden=64, inner=96)

    def layer(w: torch.Tensor) -> dict[str, torch.Tensor]:
        """Numbers from 1 to 15 with zeros of 8, for groups of 16."""
        groups = w.view(len(w), -1, 16)
        scale = (groups.abs().amax(-1) / 7).half()
        q = (groups / scale[..., None]).round().int().clamp(-7, 7).add(8).view(w.shape).tolist()
        out, n = len(w), scale.shape[1]
        if method == "awq":
            zeros = packed([[8] * out] * n, 4, AWQ_ORDER_MAP)
            return {"qweight": packed(test_quantized.transposed(q), 4, AWQ_ORDER_MAP), "qzeros": zeros, "scales": scale.T}
        return {"qweight": packed(q, 4).T, "qzeros": packed([[7] * out] * n, 4), "scales": scale.T}

    config = {"awq": test_quantized.awq, "gptq": test_quantized.gptq}[method]()[0]
    test_quantized.quantise(tmp_path, load_file(tmp_path / "model.safetensors"), config, layer)
    spec = config_for(tmp_path).model
    want, dense = logits(spec, "")
    got, model = logits(spec, "auto")
    assert isinstance(model.layers[0].attn.qkv, PackedLinear)
    assert not isinstance(dense.layers[0].attn.qkv, PackedLinear)
    assert float((got - want).norm() / want.norm()) < 4e-3
    found = [p.weight for la in model.layers for p in (la.attn.qkv, la.attn.o, la.mlp.gated, la.mlp.down)]
    size = in_packed(2, spec, lambda *_: -1)
    assert sum(w.units.nbytes + w.words.nbytes for w in found) == sum(map(size, matrices(spec, Shard.of(spec))))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("desc_act", [False, True])
def test_each_of_two_ranks_gives_the_same_logits_packed_and_dequantised(desc_act: bool, rank: int, tmp_path: Path) -> None:
    """The inner columns are cut within a group of 64; inputs in another order stay packed where a rank has all of them."""
    group = 64
    save_llama(tmp_path, heads=4, kv_heads=2, hidden=64, inner=192)

    def layer(w: torch.Tensor) -> dict[str, torch.Tensor]:
        out, inputs = w.shape
        random = torch.Generator().manual_seed(inputs)
        order = torch.randperm(inputs, generator=random) if desc_act else torch.arange(inputs)
        g_idx = torch.empty(inputs, dtype=torch.int32).index_copy_(0, order, (torch.arange(inputs) // group).int())
        zeros = torch.randint(0, 16, (inputs // group, out), generator=random)
        scales = (torch.rand(inputs // group, out, generator=random) * 0.004 + 0.004).half()
        q = (w.T / scales[g_idx] + zeros[g_idx]).round().int().clamp(0, 15).T.tolist()
        tensors = {"qweight": packed(q, 4).T, "qzeros": packed(((zeros - 1) % 16).tolist(), 4), "scales": scales}
        return tensors | ({"g_idx": g_idx} if desc_act else {})

    config = test_quantized.gptq(desc_act=desc_act, group=group)[0]
    test_quantized.quantise(tmp_path, load_file(tmp_path / "model.safetensors"), config, layer)
    spec = config_for(tmp_path).model
    shard = Shard.of(spec, rank, 2)
    assert shard.mlp[rank - 1] % group == 32
    want, _ = logits(spec, "", shard)
    got, model = logits(spec, "auto", shard)
    attn, mlp = model.layers[0].attn, model.layers[0].mlp
    assert [isinstance(p, PackedLinear) for p in (attn.qkv, mlp.gated, mlp.down)] == [True, True, not desc_act]
    assert float((got - want).norm() / want.norm()) < 4e-3


@pytest.mark.parametrize("form", ["awq", "gptq", "q4_k", "q8_0"])
def test_random_weights_are_packed_as_asked_with_the_deviation_of_dense_ones(form: str) -> None:
    weights = open_weights(random_shape("qwen3-0.6b"), torch.float16, device=CPU, packed=form)
    found = values(weights.take("model.layers.0.mlp.up_proj.weight", (3072, 1024), rows=(0, 64)))
    assert found.shape == (64, 1024)
    assert 0.018 < float(found.std()) < 0.022
    assert abs(float(found.mean())) < 2e-3
    assert isinstance(weights.take("model.norm.weight", (1024,)), torch.Tensor)


def test_packed_random_weights_are_asked_for_in_vain_elsewhere() -> None:
    with pytest.raises(UserError, match="--weight-format awq needs a GPU"):
        EngineConfig(device="cpu", weight_format="awq")
    with pytest.raises(UserError, match=r"--weight-format awq .*leave out --quantization"):
        EngineConfig(device="cuda", weight_format="awq", quantization="none")
    with pytest.raises(UserError, match=r"--weight-format awq .*--model random:SHAPE"):
        engine_config({"device": "cpu", "weight_format": "awq"}, "gguf")
    assert EngineConfig(device="cuda").packed == "auto"
    assert (
        EngineConfig(device="cuda", quantization="none").packed == EngineConfig(device="cuda", quantization="fp8").packed == ""
    )
    assert Config(random_shape("qwen3-0.6b"), EngineConfig(device="cuda", weight_format="q4_k")).engine.packed == "q4_k"
