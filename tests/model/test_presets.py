"""Shapes of published models, and random weights through the whole engine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from minisgl import LLM, SamplingParams
from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import check
from minisgl.model.checkpoint.presets import random_shape
from minisgl.model.common.registry import HF_ARCHS
from minisgl.selfcheck.job import read_spec, with_tuples

BILLIONS = {  # parameters as published, embeddings included
    "qwen3-0.6b": 0.6,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.24,
}


def parameters(spec: ModelSpec) -> int:
    """Of the matrices; norms are nothing beside them."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    inner = spec.num_experts * spec.expert_size or spec.intermediate_size
    layer = spec.hidden_size * (heads + 3 * inner + spec.num_experts)
    return spec.num_layers * layer + spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2)


@pytest.mark.parametrize("name", BILLIONS)
def test_a_shape_has_the_published_number_of_parameters(name):
    spec = check(name, random_shape(name))
    assert (spec.name, spec.format, spec.dtype) == (name, "random", "bfloat16")
    assert spec.architecture in HF_ARCHS
    assert spec.qk_norm == name.startswith("qwen3")
    assert parameters(spec) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)
    assert read_spec(json.loads(json.dumps(asdict(spec)), object_hook=with_tuples)) == spec


def test_an_unknown_shape_is_refused_with_the_names_of_all():
    with pytest.raises(UserError, match=r"'gpt-5' is not known\. .*" + ", ".join(BILLIONS)):
        random_shape("gpt-5")


def test_shapes_need_no_torch():
    code = "import sys; from minisgl.model.checkpoint.presets import random_shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-3.2-1b", "qwen3-30b-a3b"])
def test_random_weights_are_served_like_a_checkpoint_and_repeatably(name):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 300}
    spec = replace(random_shape(name), **small)
    if spec.num_experts:
        spec = replace(spec, num_experts=6, experts_per_token=2, expert_size=24)
    params = SamplingParams(temperature=0, max_tokens=20)
    answers = []
    for tp in (1, 2):
        # In few bits two ranks differ by the rounding of activations, which decides between tokens of random weights.
        with LLM(spec, tp=tp, processes=tp > 1, quantization="none", kv_tokens=512, max_context=128) as engine:
            answers.append([a.token_ids for a in engine.generate([[1, 2, 3], [299] * 40], params)])
    assert [len(a) for a in answers[0]] == [20, 20]
    assert answers[0] == answers[1]
