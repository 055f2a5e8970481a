"""Our GGUF reader against files written with the gguf package, whole and damaged."""

from __future__ import annotations

import math
import re
import time
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA3_ROPE, Driver, config_for, save_architecture, save_llama, save_qwen2, save_qwen3

from minisgl.actors.spawn import make_runner
from minisgl.errors import UserError
from minisgl.model.checkpoint import weights as checkpoint
from minisgl.model.checkpoint.gguf_file import GGUFFile
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.gguf_blocks import from_gguf
from minisgl.model.common.rope import frequencies
from minisgl.model.common.weights import StoredWeight


def pairs_from_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter does to the query and key projections."""
    out = np.empty_like(weight)
    for head in range(len(weight) // head_dim):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = weight[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = weight[head * head_dim + head_dim // 2 + i]
    return out


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
}


def add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def write_gguf(path, model, *, arch="llama", divisors=None, overrides=None, kind=None, split=0) -> str:
    """Convert a small model of transformers to a GGUF file, as llama.cpp does; matrices quantised as `kind` where they fit.

    `split`: the most tensors of one file, where there are several.
    """
    c = model.config
    writer = gguf.GGUFWriter(str(path), arch, split_max_tensors=split)
    sizes = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
    }
    for key, value in {**sizes, **(overrides or {})}.items():
        add(writer, f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", c.rope_parameters["rope_theta"])
    if c.rope_parameters["rope_type"] == "yarn":
        writer.add_string(f"{arch}.rope.scaling.type", "yarn")
        writer.add_float32(f"{arch}.rope.scaling.factor", c.rope_parameters["factor"])
        writer.add_uint32(f"{arch}.rope.scaling.original_context_length", c.rope_parameters["original_max_position_embeddings"])
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}é" for i in range(c.vocab_size)])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 5)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        *parts, last = name.split(".")
        layer = f"blk.{parts[2]}." if "layers" in parts else ""
        stored = GGUF_NAMES[".".join(parts[3:]) if layer else parts[-1]]
        if stored in ("attn_q", "attn_k") and arch == "llama":  # Qwen's stay as they are
            data = pairs_from_halves(data, c.head_dim)
        if not (stored == "output" and c.tie_word_embeddings):
            data = np.ascontiguousarray(data)
            quantised = kind is not None and data.ndim == 2 and data.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
            data = gguf.quantize(data, kind) if quantised else data
            writer.add_tensor(f"{layer}{stored}.{last}", data, raw_dtype=kind if quantised else None)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def write_everything(path) -> None:
    """A file with every kind of value and several kinds of tensor."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_custom_alignment(64)
    for name, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -30000), ("uint32", 4 << 29)):
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    writer.add_int32("x.int32", -7)
    writer.add_uint64("x.uint64", 1 << 63)
    writer.add_int64("x.int64", -(1 << 62))
    writer.add_float32("x.float32", 0.25)
    writer.add_float64("x.float64", 1e300)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "naïve ☃")
    writer.add_array("x.strings", ["a", "", "ünïcode"])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.5, 1.5])
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 64)).astype(np.float32)
    writer.add_tensor("f32", matrix)
    writer.add_tensor("f16", matrix.astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.BF16):
        writer.add_tensor(kind.name, gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("vector", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_values_and_tensors_are_those_that_the_gguf_package_reads(tmp_path):
    write_everything(tmp_path / "a.gguf")
    ours, theirs = GGUFFile(str(tmp_path / "a.gguf")), gguf.GGUFReader(tmp_path / "a.gguf")
    assert ours.fields == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.fields["x.uint64"] == 1 << 63
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        info = ours.tensors[t.name]
        assert info.shape == tuple(int(n) for n in reversed(t.shape))
        assert (info.kind, info.offset, info.nbytes) == (t.tensor_type, t.data_offset, t.n_bytes)
        assert info.offset % 64 == 0
        values = gguf.dequantize(t.data, t.tensor_type)
        assert np.array_equal(ours.dequantize(t.name), values)
        if len(info.shape) > 1:
            assert np.array_equal(ours.dequantize(t.name, rows=(2, 5)), values[2:5])


def test_the_embedded_file_is_parsed_at_once():
    try:
        spec = resolve(None)
    except UserError as e:
        pytest.skip(str(e))
    start = time.process_time()
    file = GGUFFile(spec.path)
    assert time.process_time() - start < 0.5
    assert len(file.fields) == 33
    assert len(file.tensors) == 272
    assert len(file.fields["tokenizer.ggml.tokens"]) == 49152
    assert (spec.name, spec.vocab_size, spec.num_kv_heads) == ("SmolLM2-135M-Instruct", 49152, 3)
    assert spec.eos_ids == (2, 0, 4)  # <|im_end|>, <|endoftext|>, <reponame>


@pytest.mark.parametrize(("kind", "dtype"), [(None, "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")])
def test_a_gpu_computes_in_the_dtype_of_plain_matrices_and_in_bfloat16_where_they_are_quantised(kind, dtype, tmp_path):
    model = save_llama(tmp_path / "hf")
    quantised = None if kind is None else gguf.GGMLQuantizationType[kind]
    assert resolve(write_gguf(tmp_path / "tiny.gguf", model, kind=quantised)).dtype == dtype


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_model_gives_back_its_weights_and_its_spec(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 100)  # two rows, where a head has 16
    model = save_llama(tmp_path / "hf", tied=tied)
    spec = resolve(write_gguf(tmp_path / "tiny-model.Q8_0.gguf", model))
    assert spec.name == "tiny-model"
    assert spec.dtype == "float32"
    assert (spec.bos_id, spec.eos_ids) == (1, (2, 5))
    assert spec.tie_embeddings == tied
    original = resolve(str(tmp_path / "hf"))
    for field in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
        assert getattr(spec, field) == getattr(original, field)
    weights = open_weights(spec, torch.float32)
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            assert torch.equal(weights.take(name, tuple(tensor.shape)), tensor), name
    weights.finish()
    k = model.state_dict()["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(weights.take("model.layers.0.self_attn.k_proj.weight", (48, 48), rows=(16, 48)), k[16:])


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize(
    "matrix",
    [
        ("model.embed_tokens.weight", (203, 96), {"rows": (50, 120)}),
        ("model.layers.1.self_attn.q_proj.weight", (96, 96), {"rows": (32, 80)}),  # whose rows are stored in pairs
        ("model.layers.0.self_attn.o_proj.weight", (96, 96), {"cols": (32, 96)}),
    ],
)
def test_a_matrix_stays_as_its_file_has_it_until_a_layer_reads_it(kind, matrix, tmp_path, monkeypatch):
    name, shape, part = matrix
    spec = resolve(write_gguf(tmp_path / "m.gguf", save_llama(tmp_path / "hf", hidden=96, inner=96), kind=kind))
    whole = open_weights(spec, torch.float32).take(name, shape, **part)
    with monkeypatch.context() as patch:
        patch.setattr(GGUFFile, "data", None)  # so nothing can be read
        stored = open_weights(spec, torch.float32, lazy=True).take(name, shape, **part)
        cut = open_weights(spec, torch.float32, lazy=True)
    assert isinstance(stored, StoredWeight)
    assert stored.shape == tuple(whole.shape)
    assert torch.equal(stored.dequantize(), whole)
    assert torch.equal(from_gguf(stored.read(), stored.kind).values(), whole)
    assert isinstance(cut.take("model.layers.0.self_attn.o_proj.weight", (96, 96), cols=(16, 96)), torch.Tensor)  # in a block


def test_frequency_divisors_give_the_rotation_of_the_original(tmp_path):
    model = save_llama(tmp_path / "hf", rope=LLAMA3_ROPE)
    original = resolve(str(tmp_path / "hf"))
    plain = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    spec = resolve(write_gguf(tmp_path / "m.gguf", model, divisors=divisors))
    assert torch.allclose(frequencies(original)[0], model.model.rotary_emb.inv_freq)
    assert torch.allclose(frequencies(spec)[0], frequencies(original)[0])
    open_weights(spec, torch.float32)


def yarn(factor: float, original: int) -> list[float]:
    """What each frequency of a head of 16 is divided by: ggml_rope_yarn_corr_dims and rope_yarn of ggml, by the letter."""
    start, end = (16 * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10000.0)) for turns in (32, 1))
    low, high = max(0, math.floor(start)), min(15, math.ceil(end))
    mixes = [1 - min(1, max(0, (i - low) / max(0.001, high - low))) for i in range(8)]
    return [1 / ((1 - mix) / factor + mix) for mix in mixes]


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}


@pytest.mark.parametrize(
    ("keys", "divided_by", "amplitude"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0, 1.0),
        ({"rope.scale_linear": 4.0}, 4.0, 1.0),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0, 1.0),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 4.0}, 1.0, 1.0),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.scaling.attn_factor": 1.25}, 8.0, 1.25),
        ({"rope.scaling.type": "linear"}, 1.0, 1.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0, 1.0),
        ({"rope.scaling.type": "none", "rope.scaling.attn_factor": 1.5}, 1.0, 1.5),
        ({"rope.scaling.type": "yarn"}, 1.0, 1.0),
        (YARN, yarn(4.0, 64), 1 + 0.1 * math.log(4)),
        ({**YARN, "rope.scaling.attn_factor": 0.5}, yarn(4.0, 64), 0.5 + 0.05 * math.log(4)),
        ({"rope.scaling.type": "yarn", "rope.scale_linear": 0.5}, yarn(0.5, 256), 1.0),
    ],
)
@pytest.mark.parametrize("divisors", [None, np.array([1, 1, 1, 2, 3, 4, 8, 8], np.float32)])
def test_rope_scaling_is_what_llama_cpp_makes_of_the_keys(keys, divided_by, amplitude, divisors, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", save_llama(tmp_path / "hf"), overrides=keys, divisors=divisors)
    if divisors is not None and keys.get("rope.scaling.type") == "yarn":
        with pytest.raises(UserError, match=r"llama\.rope\.scaling\.type is 'yarn' beside a tensor rope_freqs\.weight"):
            resolve(path)
        return
    found, factor = frequencies(resolve(path))
    plain = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16)
    expected = plain / torch.tensor(divided_by) / (1.0 if divisors is None else torch.from_numpy(divisors))
    assert torch.allclose(found, expected, rtol=1e-5)
    assert factor == pytest.approx(amplitude)


@pytest.mark.parametrize(
    ("key", "value", "harmless"),
    [
        ("attention.scale", 0.3, 0.25),
        ("attention.clamp_kqv", 8.0, 0.0),
        ("attention.causal", False, True),
        ("attn_logit_softcapping", 50.0, 0.0),
        ("final_logit_softcapping", 30.0, 0.0),
        ("logit_scale", 0.0625, 1.0),
        ("embedding_scale", 12.0, 1.0),
        ("residual_scale", 0.22, 1.0),
        ("rope.scaling.yarn_ext_factor", 0.5, 1.0),
        ("rope.scaling.yarn_beta_fast", 16.0, 32.0),
        ("rope.scaling.yarn_beta_slow", 2.0, 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.1, 0.0),
        ("rope.scaling.attn_factor", 0.0, 1.0),
        ("rope.scaling.factor", -1.0, 1.0),
        ("rope.scaling.type", "longrope", "none"),
        ("expert_used_count", 2, 0),
        ("nextn_predict_layers", 1, 0),
    ],
)
def test_what_llama_cpp_computes_for_other_architectures_is_refused_by_its_key(key, value, harmless, tmp_path):
    model = save_llama(tmp_path / "hf")
    resolve(write_gguf(tmp_path / "m.gguf", model, overrides={key: harmless}))
    with pytest.raises(UserError, match=rf"m\.gguf: llama\.{re.escape(key)} is {value!r:.3}"):
        resolve(write_gguf(tmp_path / "m.gguf", model, overrides={key: value}))


@pytest.mark.parametrize(
    ("arch", "save"),
    [
        ("llama", save_llama),
        ("llama", partial(save_architecture, name="llama")),  # with biases
        ("qwen2", save_qwen2),
        ("qwen3", save_qwen3),
        ("qwen3", partial(save_architecture, name="qwen3")),  # with YaRN
    ],
)
def test_a_gguf_model_says_the_same_as_its_original(arch, save, tmp_path):
    model = save(tmp_path / "hf")
    answers = []
    for path in (tmp_path / "hf", write_gguf(tmp_path / "m.gguf", model, arch=arch)):
        runner = make_runner(config_for(path), 0, "")
        runner.allocate(runner.max_pages())
        driver = Driver(runner.max_pages(), 4)
        driver.join(0)
        tokens = [runner.launch(driver.plan(prefill=[(0, [5, 6, 7, 8], True)])).result().tokens[0]]
        tokens += [runner.launch(driver.plan(decode=[0])).result().tokens[0] for _ in range(8)]
        answers.append(tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"expert_count": 8}, "expert_count is 8"),
        ({"attention.sliding_window": 64}, "sliding-window"),
        ({"rope.dimension_count": 8}, "rotating only a part"),
        ({"attention.head_count_kv": 4}, "cannot be shared"),
        ({"block_count": 3}, r"blk\.2\.attn_q\.weight is missing"),
        ({"embedding_length": 32}, r"token_embd\.weight has shape"),
        ({"context_length": 0}, "context_length is 0"),
    ],
)
def test_a_model_that_would_be_silently_wrong_is_refused(overrides, complaint, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", save_llama(tmp_path / "hf"), overrides=overrides)
    with pytest.raises(UserError, match=complaint):
        resolve(path)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"'mamba' is not supported.*llama"):
        resolve(str(tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    path = write_gguf(folder / "m.gguf", save_llama(folder / "hf"))
    first = min(t.offset for t in GGUFFile(path).tensors.values())
    with open(path, "rb") as f:
        return f.read(), first, folder / "damaged.gguf"


def resolves_or_explains(path, raw: bytes) -> None:
    path.write_bytes(raw)
    start = time.process_time()
    complaint = str(path)
    try:
        resolve(str(path))
    except UserError as e:
        complaint = str(e)
    assert str(path) in complaint
    assert time.process_time() - start < 1


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_a_user_error_or_harmless(data, small_file):
    raw, header, path = small_file
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.one_of(st.binary(min_size=width, max_size=width), st.just(b"\xff" * width), st.just(bytes(width))))
        damaged[at : at + width] = value
    resolves_or_explains(path, bytes(damaged))


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_by_name(share, small_file):
    raw, _, path = small_file
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match=r"damaged\.gguf"):
        resolve(str(path))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="instead of b'GGUF'"):
        resolve(str(tmp_path / "zip.gguf"))
