"""The tables of rotary positions against transformers', for every kind of scaling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from minisgl.model.checkpoint.resolve import resolve
from minisgl.model.common.rope import Rope, frequencies

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.7 * i for i in range(8)],
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn without truncation": {**YARN, "truncate": False},
    "yarn with its own turns": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn of DeepSeek": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn with a factor of attention": {**YARN, "attention_factor": 1.3},
    "yarn whose dimensions meet": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
    "longrope": {**LONG, "original_max_position_embeddings": 64},
    "longrope with a factor": {**LONG, "original_max_position_embeddings": 64, "factor": 16.0},
    "longrope with a factor of attention": {**LONG, "original_max_position_embeddings": 64, "attention_factor": 1.7},
}


def resolved(path: Path, config: Any, architecture: str) -> Any:
    """The ModelSpec of a checkpoint with this configuration."""
    (path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": [architecture]}))
    (path / "model.safetensors").write_bytes(b"")
    return resolve(str(path))


def assert_same_tables(spec: Any, theirs: Any, length: int, rotated: int) -> None:
    """cos and sin at all positions of a text of `length` tokens; `spec` serves a context of that length."""
    positions = torch.arange(length)
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours_cos, ours_sin = Rope(replace(spec, max_context=length), torch.float32).at(positions)
    assert ours_cos.shape == (length, 1, rotated)
    signed = torch.cat([-sin[0, :, : rotated // 2], sin[0, :, rotated // 2 :]], -1)
    torch.testing.assert_close(ours_cos[:, 0], cos[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours_sin[:, 0], signed, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers_within_the_original_context_and_beyond(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5000.0, **KINDS[kind]})
    spec = resolved(tmp_path, config, "LlamaForCausalLM")
    for length in (50, 64, 65, 256, 500):
        assert_same_tables(spec, LlamaRotaryEmbedding(config), length, 16)


@pytest.mark.parametrize("part", [0.5, 0.75, 1.0])
def test_a_part_of_the_head_is_rotated_with_frequencies_of_its_own(part: float, tmp_path: Path) -> None:
    rotated = int(16 * part)
    factors = {k: v[: rotated // 2] if isinstance(v, list) else v for k, v in LONG.items()}
    for rope in ({"rope_type": "default"}, factors):
        config = Phi3Config(
            **SIZES, original_max_position_embeddings=64, rope_parameters={**rope, "partial_rotary_factor": part}
        )
        spec = resolved(tmp_path, config, "Phi3ForCausalLM")
        assert (spec.rotary_dim or 16) == rotated
        for length in (64, 65, 256):
            assert_same_tables(spec, Phi3RotaryEmbedding(config), length, rotated)


def test_the_context_that_is_served_decides_between_short_and_long_factors(tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, **KINDS["longrope"]}
    spec = resolved(tmp_path, LlamaConfig(**SIZES, rope_parameters=rope), "LlamaForCausalLM")
    short, long = (frequencies(replace(spec, max_context=n))[0] for n in (64, 65))
    assert not torch.equal(short, long)
    assert torch.equal(long, frequencies(spec)[0])


@pytest.mark.parametrize(
    ("kind", "reach"), [("default", 256), ("linear", 256), ("dynamic", 512), ("yarn", 256), ("longrope", 256)]
)
def test_scaling_that_is_switched_on_by_hand_lengthens_the_context(kind: str, reach: int, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5000.0, **KINDS[kind]})
    assert resolved(tmp_path, config, "LlamaForCausalLM").max_context == reach
    if kind == "yarn":
        longer = LlamaConfig(**{**SIZES, "max_position_embeddings": 100}, rope_parameters={**YARN, "rope_theta": 5000.0})
        assert resolved(tmp_path, longer, "LlamaForCausalLM").max_context == 256
