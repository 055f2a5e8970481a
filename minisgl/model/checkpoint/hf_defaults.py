"""The sizes that a config.json may leave out: those of the configuration classes in transformers, by `model_type`."""

from __future__ import annotations

from minisgl.model.common.registry import Arch

_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "num_key_value_heads",
)
_MISTRAL = (4096, 14_336, 32, 32, 131_072, 32_000, 8)
_QWEN = (4096, 22_016, 32, 32, 32_768, 151_936, 32)
_SIZES = {
    "llama": (4096, 11_008, 32, 32, 2048, 32_000),  # as many KV heads as heads
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "mixtral": _MISTRAL,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "qwen3_moe": (2048, 6144, 24, 32, 32_768, 151_936, 4),
    "gemma2": (2304, 9216, 26, 8, 8192, 256_000, 4),
    "gemma3_text": (2304, 9216, 26, 8, 131_072, 262_208, 4),
    "gpt_oss": (2880, 2880, 36, 64, 131_072, 201_088, 8),
    "phi3": (3072, 8192, 32, 32, 4096, 32_064),
    "smollm3": (2048, 11_008, 36, 16, 32_768, 128_256, 4),
}


def default_sizes(arch: Arch) -> dict[str, int]:
    """The sizes of a config.json of this architecture that names none, by key."""
    kind = arch.text or arch.model_type
    sizes = dict(zip(_KEYS, _SIZES[kind], strict=False))
    if arch.head_dim:
        sizes["head_dim"] = arch.head_dim
    return sizes | ({"original_max_position_embeddings": 4096} if kind == "phi3" else {})
