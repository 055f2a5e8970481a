"""Unusual directories in Hugging Face's layout are equal to transformers or refused by the name of the field."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, Driver, config_for, save_architecture, save_llama, save_qwen3, save_random

from minisgl.actors.spawn import make_runner
from minisgl.errors import UserError
from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.cpu import runner as runner_module
from minisgl.model.cpu.sampler import sample

PROMPT = [int(t) for t in np.random.default_rng(1).integers(3, 203, 96)]
ABSENT = object()


def our_logits(path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Of the token after PROMPT, whose length is the served context: scaling that depends on the length is for that one."""
    seen: list[torch.Tensor] = []

    def spy(logits: torch.Tensor, rows: Any) -> Any:
        seen.append(logits.clone())
        return sample(logits, rows)

    monkeypatch.setattr(runner_module, "sample", spy)
    runner, driver = make_runner(config_for(path, max_context=len(PROMPT)), 0, ""), Driver(64, 4)
    runner.allocate(64)
    driver.join(1)
    runner.launch(driver.plan(prefill=[(1, PROMPT, True)])).result()
    return seen[0][0]


def their_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0, -1]
    return logits


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, why: object = "") -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), why


def change_json(path: Path, **changes: Any) -> None:
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ABSENT}))


# ---------------- names of tensors
NAMES: dict[str, Callable[[str], str]] = {
    "without a prefix": lambda n: n.removeprefix("model."),
    "compiled": lambda n: f"_orig_mod.{n}",
    "a compiled part": lambda n: n.replace("model.", "model._orig_mod.", 1),
    "distributed": lambda n: f"module.{n}",
    "distributed and compiled": lambda n: f"module._orig_mod.{n}",
    "of an adapter": lambda n: f"base_model.model.{n}",
    "text part": lambda n: n.replace("model.", "model.language_model.", 1),
    "text part, outside": lambda n: f"language_model.{n}",
    "text part, inside": lambda n: f"model.language_model.{n}",
}


@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize("save", [save_llama, save_qwen3])
def test_tensors_load_under_the_names_that_programs_give_them(
    how: str, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path, tied=save is save_qwen3)
    file = tmp_path / "model.safetensors"
    save_file({NAMES[how](name): tensor for name, tensor in load_file(file).items()}, file)
    assert_same(our_logits(tmp_path, monkeypatch), their_logits(model))


@pytest.mark.parametrize("name", ["gemma3, beside images", "mistral3, beside images"])
def test_a_model_beside_images_loads_under_its_older_and_newer_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = save_architecture(tmp_path, name, layers=2), tmp_path / "model.safetensors"

    def newer(name: str) -> str:
        return name.replace("language_model.model.", "model.language_model.") if name[0] == "l" else f"model.{name}"

    save_file({newer(name): tensor for name, tensor in load_file(file).items()}, file)
    assert_same(our_logits(tmp_path, monkeypatch), their_logits(model))


def test_two_names_of_one_tensor_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"] + 1}, file)
    with pytest.raises(UserError, match=r"norm\.weight and (model\.)?norm\.weight are two names of one tensor"):
        our_logits(tmp_path, monkeypatch)


@pytest.mark.parametrize("arch", ["llama", "gemma3, beside images"])
@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_the_file_is_used_though_the_config_ties_it(
    same: bool, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_architecture(tmp_path, arch, layers=2)
    change_json(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    table = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    head = "lm_head.weight" if arch == "llama" else "language_model.lm_head.weight"
    save_file({**tensors, head: table.clone() if same else table.flip(0).contiguous()}, file)
    theirs = getattr(transformers, json.loads((tmp_path / "config.json").read_text())["architectures"][0])
    assert_same(our_logits(tmp_path, monkeypatch), their_logits(theirs.from_pretrained(tmp_path).eval()))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"attention_bias": True}, "attention_bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "architectures"),
        ({"intermediate_size": 70}, "intermediate_size"),
        ({"num_key_value_heads": 6}, "num_key_value_heads"),
        ({"vocab_size": 204}, "vocab_size"),
    ],
)
def test_weights_of_another_model_are_refused_by_the_key_that_is_wrong(
    change: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path, tied=True)
    change_json(tmp_path, **change)
    with pytest.raises(UserError, match=key) as e:
        our_logits(tmp_path, monkeypatch)
    assert "complete?" not in str(e.value)


def test_a_part_of_several_files_that_is_missing_without_an_index_is_an_incomplete_download(tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"1 of its 2 weight files are missing\. Is the download complete\?"):
        resolve(str(tmp_path))


# ---------------- settings
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.7 * i for i in range(8)]}
_S, _F = "sliding_attention", "full_attention"
SETTINGS: dict[str, list[Any]] = {
    "hidden_act": ["swish", "gelu_new", "gelu_pytorch_tanh", "gelu", "relu", ABSENT],
    "hidden_activation": ["swish", "gelu_fast", "gelu", ABSENT],
    "attention_bias": [True, False, ABSENT],
    "mlp_bias": [True, False],
    "head_dim": [8, ABSENT],
    "num_key_value_heads": [1, 6],
    "intermediate_size": [40],
    "rms_norm_eps": [1e-2, ABSENT],
    "max_position_embeddings": [97, 2048, ABSENT],
    "rope_theta": [500, ABSENT],
    "rope_scaling": [
        None,
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"factor": 2.0},
        _YARN,
        {**_YARN, "beta_fast": 0},
        {**_YARN, "truncate": None},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "original_max_position_embeddings": 32},
        _LLAMA3,
        {**_LLAMA3, "low_freq_factor": 8.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0},
        {"rope_type": "longrope", "original_max_position_embeddings": 32, **_LONG},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {_F: {"rope_type": "linear", "factor": 2.0}, _S: {"rope_type": "default"}},
    ],
    "rope_parameters": [
        ABSENT,
        {},
        {"rope_theta": 500.0},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
        {_F: {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, _S: {"rope_type": "default", "rope_theta": 30.0}},
        {_F: {"rope_type": "default"}},
        {_F: {"rope_type": "default"}, _S: {"rope_type": "linear", "factor": 2.0}},
    ],
    "rope_local_base_freq": [50.0],
    "partial_rotary_factor": [0.5, 1.0, 0.3, 1.5],
    "original_max_position_embeddings": [32, 128, ABSENT],
    "sliding_window": [None, ABSENT, 5, 96, 97, 4096, 0],
    "use_sliding_window": [True, False, ABSENT],
    "max_window_layers": [0, 1, 3, ABSENT],
    "layer_types": [ABSENT, None, [_S, _F, _S], [_F, _S, _F], [_F] * 3, [_S] * 3, [_S, _F]],
    "sliding_window_pattern": [1, 2, 3],
    "no_rope_layers": [ABSENT, [1, 1, 0], [0, 0, 0]],
    "no_rope_layer_interval": [2],
    "attn_logit_softcapping": [None, 2.0, ABSENT],
    "final_logit_softcapping": [None, 0.5, ABSENT],
    "query_pre_attn_scalar": [24, ABSENT],
    "use_bidirectional_attention": [True],
    "is_causal": [False, True],
    "swiglu_limit": [3.0, ABSENT],
    "num_experts_per_tok": [1, 3],
    "norm_topk_prob": [True, False, ABSENT],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [0], ABSENT],
    "per_layer_config": [{}, {"0": {"num_key_value_heads": 1}}],
    "model_type": ["llama", "mistral"],
}


def compare(path: Path, config: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What became of a random checkpoint with the `changes`: "same", "refused", or "served", if by us alone."""
    changed = copy.deepcopy(config)
    inner = changed.get("text_config", changed)
    for key, value in changes.items():
        inner.pop(key, None)
        if value is not ABSENT:
            inner[key] = value
    (path / "config.json").write_text(json.dumps(changed))
    theirs, refusal = None, ""
    with contextlib.suppress(Exception):  # transformers serves no such model; the weights are those of the one before
        cls = getattr(transformers, config["architectures"][0])
        how = {"attn_implementation": "eager", "experts_implementation": "eager"}
        theirs = their_logits(save_random(path, cls, cls.config_class.from_pretrained(path, **how)))
    (path / "config.json").write_text(json.dumps(changed))
    try:
        ours = our_logits(path, monkeypatch)
    except UserError as e:
        refusal = str(e)
    if refusal:
        assert "complete?" not in refusal
        assert theirs is None or any(key in refusal for key in changes), (refusal, changes)
        return "refused"
    if theirs is None:
        return "served"
    assert_same(ours, theirs, changes)
    return "same"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_with_unusual_settings_is_equal_to_transformers_or_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_architecture(tmp_path, name)
    config, rng = json.loads((tmp_path / "config.json").read_text()), random.Random(name)
    read = [key for key in SETTINGS if key in config.get("text_config", config) or key.startswith("rope_")]
    for _ in range(5):
        keys = dict.fromkeys((rng.choice(read), rng.choice(list(SETTINGS))))  # no set: its order differs from run to run
        compare(tmp_path, config, {key: rng.choice(SETTINGS[key]) for key in keys}, monkeypatch)
    assert compare(tmp_path, config, {}, monkeypatch) == "same"


# Found by longer runs of the same.
@pytest.mark.parametrize(
    ("name", "changes", "outcome"),
    [
        ("mixtral", {"hidden_act": "gelu_new"}, "refused"),
        ("mixtral", {"hidden_act": "swish"}, "same"),
        ("mistral", {"layer_types": [_S, _F, _S]}, "refused"),
        ("mistral", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "refused"),
        ("llama", {"sliding_window": 8, "use_sliding_window": False}, "same"),
        ("llama", {"attn_logit_softcapping": 2.0}, "refused"),
        ("gemma3", {"attn_logit_softcapping": 2.0}, "refused"),
        ("ministral", {"sliding_window_pattern": 2, "layer_types": ABSENT}, "refused"),
        ("gpt-oss", {"rope_parameters": ABSENT}, "same"),
        ("gpt-oss", {"attention_bias": ABSENT}, "same"),
        ("qwen3", {"head_dim": ABSENT}, "same"),
        ("smollm3", {"use_sliding_window": False, "layer_types": [_S, _F, _S], "sliding_window": 9}, "same"),
        ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": _YARN}, "same"),
        ("llama", {"rope_scaling": {**_YARN, "beta_fast": 0}}, "same"),
        ("gemma3", {"rope_scaling": {**_YARN, "truncate": False}}, "refused"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "refused"),
        ("phi4-mini", {"original_max_position_embeddings": 128}, "same"),
    ],
)
def test_settings_that_transformers_reads_in_its_own_way(
    name: str, changes: dict[str, Any], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_architecture(tmp_path, name)
    assert compare(tmp_path, json.loads((tmp_path / "config.json").read_text()), changes, monkeypatch) == outcome
