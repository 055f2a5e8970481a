"""Quantised safetensors: each format written and read back by its definition, element by element, and as a whole model."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import config_for, save_llama, save_qwen3

from minisgl.actors.spawn import make_runner
from minisgl.errors import UserError
from minisgl.model.checkpoint import quantized
from minisgl.model.checkpoint import weights as checkpoint
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve

OUT, IN, GROUP = 48, 64, 16
LAYER = "model.layers.0.mlp.up_proj"
NAME = LAYER + ".weight"
FP8 = torch.float8_e4m3fn
AWQ_ORDER_MAP = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order_map: which column goes into each nibble


def words_of(values: list[int], bits: int) -> int:
    """The i32 whose fields, lowest bits first, are `values`."""
    word = sum(v << bits * i for i, v in enumerate(values))
    return word - (1 << 32) if word >= 1 << 31 else word


def packed(table: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Rows of small integers -> i32, each word holding 32 / bits neighbours of a row, permuted by `order`."""
    per = 32 // bits
    order = order or tuple(range(per))
    return torch.tensor(
        [[words_of([row[at + o] for o in order], bits) for at in range(0, len(row), per)] for row in table], dtype=torch.int32
    )


def transposed(table: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*table, strict=True)]


def random_ints(rows: int, cols: int, bits: int, seed: int) -> list[list[int]]:
    return torch.randint(0, 1 << bits, (rows, cols), generator=torch.Generator().manual_seed(seed)).tolist()


def random_scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) + 0.1


# Every maker: -> (quantization_config, tensors of one layer, its weight by the definition: a function of (output, input)).
def gptq(bits=4, desc_act=False, v2=False, group=GROUP):
    q = random_ints(OUT, IN, bits, 0)
    groups = IN // group if group > 0 else 1
    zeros = random_ints(groups, OUT, bits, 1)
    scales = random_scales(groups, OUT).half()
    g_idx = [i // (IN // groups) for i in range(IN)]
    if desc_act:
        g_idx = [g_idx[i] for i in torch.randperm(IN, generator=torch.Generator().manual_seed(2)).tolist()]
    stored_zeros = [[z if v2 else (z - 1) % (1 << bits) for z in row] for row in zeros]
    tensors = {
        "qweight": packed(q, bits).T.contiguous(),
        "qzeros": packed(stored_zeros, bits),
        "scales": scales,
        "bias": torch.zeros(OUT),
    }
    if desc_act:
        tensors["g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act, "sym": False}
    if v2:
        config["checkpoint_format"] = "gptq_v2"
    return config, tensors, lambda o, i: (q[o][i] - zeros[g_idx[i]][o]) * float(scales[g_idx[i], o])


def awq():
    q, zeros = random_ints(OUT, IN, 4, 3), random_ints(IN // GROUP, OUT, 4, 4)
    scales = random_scales(IN // GROUP, OUT).half()
    order = AWQ_ORDER_MAP
    tensors = {"qweight": packed(transposed(q), 4, order), "qzeros": packed(zeros, 4, order), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return config, tensors, lambda o, i: (q[o][i] - zeros[i // GROUP][o]) * float(scales[i // GROUP, o])


def floats() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5)).to(FP8)


def block_fp8():
    w, rows, cols = floats(), 32, 48  # neither divides the weight
    scales = random_scales(-(-OUT // rows), -(-IN // cols))
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [rows, cols]}
    tensors = {"weight": w, "weight_scale_inv": scales}
    return config, tensors, lambda o, i: float(w[o, i].float()) * float(scales[o // rows, i // cols])


def tensor_fp8():
    w = floats()
    tensors = {"weight": w, "weight_scale": torch.tensor(0.37), "input_scale": torch.tensor(2.0)}
    return {"quant_method": "fp8", "activation_scheme": "static"}, tensors, lambda o, i: float(w[o, i].float()) * 0.37


def fbgemm():
    w, scales = floats(), random_scales(OUT, 1)
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []}
    return config, {"weight": w, "weight_scale": scales}, lambda o, i: float(w[o, i].float()) * float(scales[o, 0])


def compressed(form: str, **weights) -> dict:
    scheme = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}


def channel_fp8():
    w, scales = floats(), random_scales(OUT, 1).bfloat16()
    config = compressed("float-quantized", num_bits=8, type="float", strategy="channel")
    return config, {"weight": w, "weight_scale": scales}, lambda o, i: float(w[o, i].float()) * float(scales[o, 0])


def compressed_tensor_fp8():
    w, scale = floats(), torch.tensor([0.25])
    config = compressed("float-quantized", num_bits=8, type="float", strategy="tensor")
    return config, {"weight": w, "weight_scale": scale}, lambda o, i: float(w[o, i].float()) * 0.25


def int8():
    w = torch.randint(-127, 128, (OUT, IN), generator=torch.Generator().manual_seed(6)).to(torch.int8)
    scales = random_scales(OUT, 1)
    config = compressed("int-quantized", num_bits=8, type="int", strategy="channel")
    return config, {"weight": w, "weight_scale": scales}, lambda o, i: int(w[o, i]) * float(scales[o, 0])


def packed_int4(reordered=False):
    q, scales = random_ints(OUT, IN, 4, 8), random_scales(OUT, IN // GROUP).bfloat16()
    g_idx = [i // GROUP for i in range(IN)]
    tensors = {"weight_packed": packed(q, 4), "weight_scale": scales, "weight_shape": torch.tensor([OUT, IN])}
    if reordered:
        g_idx = [g_idx[i] for i in torch.randperm(IN, generator=torch.Generator().manual_seed(2)).tolist()]
        tensors["weight_g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    config = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP)
    return config, tensors, lambda o, i: (q[o][i] - 8) * float(scales[o, g_idx[i]])


FORMATS = {
    "gptq": gptq,
    "gptq 8 bits": lambda: gptq(bits=8),
    "gptq act-order": lambda: gptq(desc_act=True),
    "gptq one group": lambda: gptq(group=-1),
    "gptq v2": lambda: gptq(v2=True),
    "awq": awq,
    "fp8 blocks": block_fp8,
    "fp8 tensor": tensor_fp8,
    "fp8 fbgemm": fbgemm,
    "compressed fp8 channel": channel_fp8,
    "compressed fp8 tensor": compressed_tensor_fp8,
    "compressed int8": int8,
    "compressed int4": packed_int4,
    "compressed int4 act-order": lambda: packed_int4(reordered=True),
}
EACH = pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)


def write(path, config, tensors) -> None:
    """A directory with one quantised layer, which is no whole model but all that these tests read."""
    path.mkdir(exist_ok=True)
    model = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": IN,
        "intermediate_size": OUT,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
        "max_position_embeddings": 64,
        "torch_dtype": "bfloat16",
        "quantization_config": config,
    }
    (path / "config.json").write_text(json.dumps(model))
    save_file({f"{LAYER}.{kind}": t for kind, t in tensors.items()}, path / "model.safetensors")


@EACH
def test_a_layer_is_what_its_format_says(make, tmp_path, monkeypatch):
    config, tensors, element = make()
    write(tmp_path, config, tensors)
    spec = resolve(str(tmp_path))
    expected = torch.tensor([[element(o, i) for i in range(IN)] for o in range(OUT)], dtype=torch.float64)
    weights = open_weights(spec, torch.float32)
    whole = weights.take(NAME, (OUT, IN))
    assert (whole - expected).abs().max() <= 1e-6 * expected.abs().max()
    weights.finish()
    monkeypatch.setattr(checkpoint, "PIECE", 300)  # a few rows at a time
    half = open_weights(spec, torch.bfloat16)
    assert torch.equal(half.take(NAME, (OUT, IN)), whole.bfloat16())
    for span in ((0, 16), (5, 11), (17, 48), (13, 14)):  # within and across packed words, groups and blocks
        assert torch.equal(half.take(NAME, (OUT, IN), rows=span), whole[slice(*span)].bfloat16())
        part = half.take(NAME, (OUT, IN), cols=span)
        assert torch.equal(part, whole[:, slice(*span)].bfloat16())
        assert part.untyped_storage().nbytes() == part.nbytes


def test_no_word_outside_of_a_span_is_read():
    assert quantized._words((17, 30), 8) == (slice(2, 4), (1, 14))
    assert quantized._words((16, 32), 8) == (slice(2, 4), (0, 16))
    assert quantized._words((13, 14), 4) == (slice(3, 4), (1, 2))


def test_a_bias_that_is_not_zero_is_no_leftover_of_gptq(tmp_path):
    config, tensors, _ = gptq()
    write(tmp_path, config, {**tensors, "bias": torch.ones(OUT)})
    weights = open_weights(resolve(str(tmp_path)), torch.float32)
    weights.take(NAME, (OUT, IN))
    with pytest.raises(UserError, match=rf"no place for: {LAYER}\.bias"):
        weights.finish()


@pytest.mark.parametrize(
    ("make", "change", "complaint"),
    [
        (gptq, {"scales": torch.ones(3, OUT)}, r"up_proj\.scales has shape \(3, 48\), .* \(4, 48\)"),
        (gptq, {"qzeros": None}, r"lacks the tensor .*up_proj\.qzeros"),
        (gptq, {"g_idx": torch.full((IN,), 4, dtype=torch.int32)}, r"up_proj\.g_idx names groups outside"),
        (gptq, {"qweight": torch.zeros(4, OUT, dtype=torch.int32)}, r"up_proj\.qzeros has shape|up_proj\.weight has shape"),
        (awq, {"scales": None}, r"lacks the tensor .*up_proj\.scales"),
        (block_fp8, {"weight_scale_inv": torch.ones(2, 3)}, r"weight_scale_inv has shape \(2, 3\), .* \(2, 2\)"),
        (channel_fp8, {"weight_scale": None}, r"lacks the tensor .*up_proj\.weight_scale"),
        (packed_int4, {"weight_g_idx": torch.full((IN,), -1)}, r"weight_g_idx names groups"),
        (packed_int4, {"weight_shape": torch.tensor([OUT, 2 * IN])}, r"weight_packed has shape \(48, 8\), .* \(48, 16\)"),
    ],
)
def test_a_damaged_layer_is_refused_by_the_name_of_its_tensor(make, change, complaint, tmp_path):
    config, tensors, _ = make()
    write(tmp_path, config, {k: t for k, t in {**tensors, **change}.items() if t is not None})
    with pytest.raises(UserError, match=complaint):
        open_weights(resolve(str(tmp_path)), torch.float32).take(NAME, (OUT, IN))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes', which cannot be read. Known: fp8,"),
        ({}, "quantised by None"),
        ([], "should be an object"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits is 3: GPTQ of other widths"),
        ({"quant_method": "gptq", "bits": 4}, "group_size is missing"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "is 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:x": {}}}, "differ between layers"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False}, "without zero points"),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        (compressed("float-quantized", num_bits=8, type="float", strategy="token"), "strategy is 'token'"),
        (compressed("marlin-24", num_bits=4, type="int", strategy="group"), "format 'marlin-24' with 4 'int' bits"),
        (compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False), "with zero points"),
    ],
)
def test_a_quantisation_that_cannot_be_read_is_refused(config, complaint, tmp_path):
    write(tmp_path, config, {"weight": torch.zeros(1)})
    with pytest.raises(UserError, match=complaint) as e:
        resolve(str(tmp_path))
    assert "config.json" in str(e.value)


def quantise(path, weights: dict[str, torch.Tensor], config: dict, layer) -> None:
    """Replace the linear layers of a checkpoint by what `layer` makes of each, and its config."""
    out = {}
    for name, w in weights.items():
        if name.endswith("_proj.weight"):
            out |= {f"{name.removesuffix('weight')}{kind}": t.contiguous() for kind, t in layer(w).items()}
        else:
            out[name] = w
    save_file(out, path / "model.safetensors")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))


@pytest.mark.parametrize("save", [save_llama, save_qwen3])
def test_a_quantised_model_is_loaded_whole_and_in_parts(save, tmp_path):
    """Scales by channel; the columns of two ranks beside each other are the whole."""
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def layer(w: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = w.abs().amax(1, keepdim=True) / 448
        return {"weight": (w / scale).to(FP8), "weight_scale": scale}

    quantise(tmp_path, weights, channel_fp8()[0], layer)
    stored = load_file(tmp_path / "model.safetensors")
    spec = config_for(os.fspath(tmp_path)).model
    opened = open_weights(spec, torch.float32)
    for name in (n for n in weights if n.endswith("_proj.weight")):
        whole = stored[name].float() * stored[name.replace("weight", "weight_scale")]
        assert torch.equal(opened.take(name, tuple(whole.shape)), whole)
        n = whole.shape[1]
        parts = [opened.take(name, tuple(whole.shape), cols=span) for span in ((0, n // 3), (n // 3, n))]
        assert torch.equal(torch.cat(parts, 1), whole)
    make_runner(config_for(tmp_path), 0, "").close()
