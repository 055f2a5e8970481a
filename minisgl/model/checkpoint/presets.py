"""Published models by their sizes alone, to be filled with random weights: for measurements where the files are not at hand.

The sizes are those of the config.json of each model on the Hugging Face hub (Qwen/Qwen3-*, meta-llama/Llama-3.*).  No torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import rope_scaling
from minisgl.model.common.registry import QK_NORM_ARCHS

_LLAMA, _QWEN3, _QWEN3_MOE = "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"


def random_shape(name: str) -> ModelSpec:
    """The spec of a published model's shape: format "random", dtype bfloat16, no BOS or EOS, so that only lengths end a text.

    `LLM(random_shape("qwen3-0.6b"))` serves it; see random_weights.  Raises UserError listing the names.
    """
    if name not in _SHAPES:
        raise UserError(f"shape {name!r:.80} is not known. Known shapes: {', '.join(_SHAPES)}.")
    return _SHAPES[name]


def _spec(
    name: str,
    architecture: str,
    sizes: tuple[int, int, int, int, int, int, int],
    *,
    tied: bool,
    rope: Mapping[str, object],
    experts: tuple[int, int, int] = (0, 0, 0),
) -> ModelSpec:
    """`sizes`: hidden, inner, layers, heads, KV heads, head size, vocabulary; `experts`: how many, of a token, size of one."""
    hidden, inner, layers, heads, kv_heads, head_dim, vocab = sizes
    qwen = architecture in (_QWEN3, _QWEN3_MOE)
    return ModelSpec(
        name=name,
        path="",
        format="random",
        architecture=architecture,
        dtype="bfloat16",
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_context=40_960 if qwen else 131_072,
        rms_norm_eps=1e-6 if qwen else 1e-5,
        rope_theta=1e6 if qwen else 5e5,
        rope_scaling=rope_scaling(name, rope),
        tie_embeddings=tied,
        bos_id=None,
        eos_ids=(),
        qk_norm=architecture in QK_NORM_ARCHS,
        num_experts=experts[0],
        experts_per_token=experts[1],
        expert_size=experts[2],
        norm_topk=experts[0] > 0,
    )


def _llama3(factor: float) -> dict[str, object]:
    """The rope scaling of Llama 3.1 and 3.2."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_SHAPES = {
    spec.name: spec
    for spec in (
        _spec("qwen3-0.6b", _QWEN3, (1024, 3072, 28, 16, 8, 128, 151_936), tied=True, rope={}),
        _spec("qwen3-14b", _QWEN3, (5120, 17_408, 40, 40, 8, 128, 151_936), tied=False, rope={}),
        _spec("qwen3-32b", _QWEN3, (5120, 25_600, 64, 64, 8, 128, 151_936), tied=False, rope={}),
        _spec(
            "qwen3-30b-a3b",
            _QWEN3_MOE,
            (2048, 6144, 48, 32, 4, 128, 151_936),
            tied=False,
            rope={},
            experts=(128, 8, 768),
        ),
        _spec("llama-3.1-8b", _LLAMA, (4096, 14_336, 32, 32, 8, 128, 128_256), tied=False, rope=_llama3(8.0)),
        _spec("llama-3.2-1b", _LLAMA, (2048, 8192, 16, 32, 8, 64, 128_256), tied=True, rope=_llama3(32.0)),
    )
}
