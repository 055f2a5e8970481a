"""The architectures that can be served, by name.  No torch: resolving a model must be quick."""

from __future__ import annotations

HF_ARCHS = ("LlamaForCausalLM",)  # `architectures` of config.json
GGUF_ARCHS = {"llama": "LlamaForCausalLM"}  # `general.architecture` -> the same model's Hugging Face class
