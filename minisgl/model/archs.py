"""The architectures that can be served, by name.  No torch: resolving a model must be quick."""

from __future__ import annotations

HF_ARCHS = ("LlamaForCausalLM", "Qwen3ForCausalLM")  # `architectures` of config.json
QK_NORM_ARCHS = ("Qwen3ForCausalLM",)  # those that normalise queries and keys; see ModelSpec.qk_norm
GGUF_ARCHS = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # `general.architecture` -> the same model's Hugging Face class
