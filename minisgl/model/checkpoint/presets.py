"""Declares published models by their sizes alone, to be filled with random weights: for measurements without their files.

The sizes are those of the config.json of each model on the Hugging Face hub (Qwen/Qwen3-*, meta-llama/Llama-3.*).  No torch.
"""

from __future__ import annotations

from typing import Any

from minisgl.config import ModelSpec, RopeScaling
from minisgl.errors import UserError
from minisgl.model.common.registry import HF_ARCHS

_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
_QWEN3 = {"architecture": "Qwen3ForCausalLM", "max_context": 40_960, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_EXPERTS = {"num_experts": 128, "experts_per_token": 8, "expert_size": 768, "norm_topk": True}
_QWEN3_MOE = _QWEN3 | _EXPERTS | {"architecture": "Qwen3MoeForCausalLM"}
_LLAMA = {"architecture": "LlamaForCausalLM", "max_context": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 5e5}


def random_shape(name: str) -> ModelSpec:
    """The spec of a published model's shape: format "random", dtype bfloat16, no BOS or EOS, so that only lengths end a text.

    `LLM(random_shape("qwen3-0.6b"))` serves it; see random_weights.  Raises UserError listing the names.
    """
    if name not in SHAPES:
        raise UserError(f"shape {name!r:.80} is not known. Known shapes: {', '.join(SHAPES)}.")
    return SHAPES[name]


def _spec(name: str, family: dict[str, Any], sizes: tuple[int, ...], *, tied: bool = False, **more: Any) -> ModelSpec:
    """`sizes`: the values of _SIZES; `family` and `more`: further fields."""
    fixed = {"path": "", "format": "random", "dtype": "bfloat16", "bos_id": None, "eos_ids": (), "rope_scaling": None}
    qk_norm = HF_ARCHS[family["architecture"]].qk_norm
    fields = fixed | family | dict(zip(_SIZES, sizes, strict=True)) | more
    return ModelSpec(name=name, tie_embeddings=tied, qk_norm=qk_norm, **fields)


def _llama3(factor: float) -> RopeScaling:
    """The rope scaling of Llama 3.1 and 3.2."""
    return RopeScaling("llama3", factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192.0)


SHAPES = {
    spec.name: spec
    for spec in (
        _spec("qwen3-0.6b", _QWEN3, (1024, 3072, 28, 16, 8, 128, 151_936), tied=True),
        _spec("qwen3-8b", _QWEN3, (4096, 12_288, 36, 32, 8, 128, 151_936)),
        _spec("qwen3-14b", _QWEN3, (5120, 17_408, 40, 40, 8, 128, 151_936)),
        _spec("qwen3-32b", _QWEN3, (5120, 25_600, 64, 64, 8, 128, 151_936)),
        _spec("qwen3-30b-a3b", _QWEN3_MOE, (2048, 6144, 48, 32, 4, 128, 151_936)),
        _spec("llama-3.1-8b", _LLAMA, (4096, 14_336, 32, 32, 8, 128, 128_256), rope_scaling=_llama3(8.0)),
        _spec("llama-3.2-1b", _LLAMA, (2048, 8192, 16, 32, 8, 64, 128_256), tied=True, rope_scaling=_llama3(32.0)),
    )
}
