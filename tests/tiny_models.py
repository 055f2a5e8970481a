"""Small random checkpoints and a driver that turns prompts into plans, for the tests of the model room."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minisgl.config import Config, EngineConfig
from minisgl.model.checkpoint.resolve import resolve
from minisgl.plan import BIAS, EXTRA, GRANT, JOIN, PREFILL, StepPlan

needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="there is no C compiler")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save_llama(
    path: Any,
    *,
    heads: int = 6,
    kv_heads: int = 3,
    tied: bool = False,
    rope: dict[str, Any] | None = None,
    layers: int = 2,
    hidden: int = 48,
    inner: int = 71,
    vocab: int = 203,
) -> Any:
    """Write a random LlamaForCausalLM to `path` and return it (transformers, float32, eval)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    sizes = _sizes(heads, kv_heads) | {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    sizes["vocab_size"] = vocab
    return save_random(path, LlamaForCausalLM, LlamaConfig(**sizes, tie_word_embeddings=tied, rope_parameters=rope))


def save_qwen3(path: Any, *, heads: int = 6, kv_heads: int = 3, tied: bool = False) -> Any:
    """Write a random Qwen3ForCausalLM to `path` and return it (transformers, float32, eval).

    Its eps is large enough to matter, and its theta is Qwen3's.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**_sizes(heads, kv_heads), rms_norm_eps=0.1, tie_word_embeddings=tied, rope_parameters=rope)
    return save_random(path, Qwen3ForCausalLM, config)


_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [1.5 + 0.7 * i for i in range(6)]}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 23}
# Name -> prefix of the classes in transformers, and what differs from `_sizes`.  Every window is shorter than a test's prompt.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "llama, more ranks than KV heads": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}),
    "mistral": ("Mistral", {"sliding_window": 21}),
    "ministral": ("Ministral", {"sliding_window": 13, "layer_types": _TYPES}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"rms_norm_eps": 0.1, "rope_parameters": _YARN, "use_sliding_window": False}),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe, windows": (
        "Qwen3Moe",
        {**_MOE, "norm_topk_prob": False, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 19},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 40}),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 18, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 0.05},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": 11,
            "query_pre_attn_scalar": 24,
            "layer_types": _TYPES,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gemma3, beside images": ("Gemma3", {"sliding_window": 11, "layer_types": _TYPES, "model_type": "gemma3_text"}),
    "mistral3, beside images": ("Mistral3", {"sliding_window": None, "model_type": "mistral"}),
    "gpt-oss": ("GptOss", {"sliding_window": 14, "num_local_experts": 5, "num_experts_per_tok": 2, "rope_parameters": _YARN}),
    "phi3": ("Phi3", {"sliding_window": 27, "hidden_size": 96}),
    "phi4-mini": (
        "Phi3",
        {
            "hidden_size": 96,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **_LONG},
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 15}),
}


def save_architecture(path: Any, name: str, *, layers: int = 3, seed: int = 0) -> Any:
    """Write a random model of `ARCHITECTURES` to `path` and return it (transformers, float32, eval).  `layers`: 3 at most."""
    import transformers

    prefix, settings = ARCHITECTURES[name]
    settings = {**_sizes(6, 3), "num_hidden_layers": layers, "max_position_embeddings": 512, **settings}
    for by_layer in {"layer_types", "no_rope_layers"} & set(settings):
        settings[by_layer] = settings[by_layer][:layers]
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if prefix == "Phi3":  # whose heads are hidden_size / heads wide
        del settings["head_dim"]
    elif prefix == "Qwen2":
        settings |= {"head_dim": 8, "num_key_value_heads": 2}
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    task = "CausalLM"
    if "model_type" in settings:  # also takes images
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        settings = {"text_config": settings, "vision_config": vision, "image_token_index": 2, "eos_token_id": [2, 0]}
        task = "ConditionalGeneration"
    config = getattr(transformers, f"{prefix}Config")(**settings, **how)
    return save_random(path, getattr(transformers, f"{prefix.removesuffix('Text')}For{task}"), config, seed)


def save_qwen2(path: Any) -> Any:
    """Write a random Qwen2ForCausalLM without windows to `path` and return it (transformers, float32, eval)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**{**_sizes(6, 3), "head_dim": 8}, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return save_random(path, Qwen2ForCausalLM, config)


def save_byte_tokenizer(path: Any) -> None:
    """Write a tokenizer.json in which every byte is a token, with the byte's value as its id."""
    from minisgl.model.text.tokenizer import load_tokenizer

    spec = replace(resolve(os.fspath(path)), format="random")
    load_tokenizer(spec)._backend.save(os.path.join(path, "tokenizer.json"))


def _sizes(heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 203,
        "hidden_size": 48,
        "intermediate_size": 71,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,  # hidden_size / heads with three heads only
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }


def save_random(path: Any, cls: Any, config: Any, seed: int = 0) -> Any:
    """Write a random model of the class `cls` of transformers to `path` and return it (float32, eval)."""
    import torch

    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # norms of one and biases of zero would hide that they are not applied
            if "norm" in name:
                p.uniform_(-0.5, 0.5).add_(0.0 if "Gemma" in cls.__name__ else 1.0)
            elif name.endswith(("bias", "sinks")):
                p.normal_(0, 0.5)
            elif ".mlp." in name and "GptOss" in cls.__name__:  # the bounds of its activation are far out
                p.mul_(3.0)
            elif "embed" in name and "Gemma" in cls.__name__:  # which scales it up: it would say the same token for ever
                p.mul_(0.03)
    model.save_pretrained(path)
    return model


def config_for(path: Any, **engine: Any) -> Config:
    engine = {
        "threads": 1,
        "quantization": "none",
        "page_size": 4,
        "max_running": 8,
        "kv_tokens": 512,
        "max_context": 128,
        **engine,
    }
    return Config(resolve(os.fspath(path)), EngineConfig(**engine))


class Driver:
    """Writes plans the way a scheduler does, with page tables scattered by `seed`."""

    def __init__(self, num_pages: int, page_size: int, seed: int = 0) -> None:
        self.page_size = page_size
        self.step = 0
        self.free = list(np.random.default_rng(seed).permutation(num_pages))
        self.kv_len: dict[int, int] = {}
        self.pages: dict[int, list[int]] = {}
        self.new_slots: list[tuple[Any, ...]] = []
        self.page_grants: list[tuple[int, int, int]] = []
        self.extras: list[tuple[Any, ...]] = []
        self.bias: list[tuple[int, float, int]] = []
        self.history: list[int] = []
        self.special: set[int] = set()  # slots that have extras

    def join(self, slot: int, *, kv_len: int = 0, pages: list[int] | None = None, **params: Any) -> None:
        p = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, **params}
        self.new_slots.append((slot, kv_len, p["temperature"], p["top_k"], p["top_p"], p["min_p"], p["seed"]))
        self._extra(slot, p)
        self.kv_len[slot] = kv_len
        self.pages[slot] = []
        for page in pages or []:
            self._grant(slot, page)

    def _extra(self, slot: int, p: dict[str, Any]) -> None:
        """presence, frequency, repetition, logprobs; bias: (token, value, until) rows; prompt, output: what penalties count."""
        names = ("presence", "frequency", "repetition", "logprobs", "bias", "prompt", "output")
        wanted = any(name in p for name in names)
        if not wanted and slot not in self.special:
            return
        (self.special.add if wanted else self.special.discard)(slot)
        bias, prompt, output = (list(p.get(name, ())) for name in names[4:])
        numbers = [p.get(name, default) for name, default in zip(names, (0.0, 0.0, 1.0, -1), strict=False)]
        self.extras.append((slot, *numbers, len(bias), len(prompt), len(output)))
        self.bias += bias
        self.history += prompt + output

    def plan(
        self,
        prefill: list[tuple[int, list[int], bool]] = (),  # type: ignore[assignment]
        decode: list[int] | None = (),  # type: ignore[assignment]
        same: list[int] = (),  # type: ignore[assignment]
        targets: list[int] = (),  # type: ignore[assignment]
    ) -> StepPlan:
        """`prefill`: (slot, ids, sample).  `decode=None` repeats the former batch, which the caller names as `same`.

        `targets`: of the rows whose `sample` has SCORE.
        """
        for slot, ids, _ in prefill:
            self._append(slot, len(ids))
        for slot in same if decode is None else decode:
            self._append(slot, 1)
        self.step += 1
        plan = StepPlan(
            self.step,
            new_slots=np.array(self.new_slots, JOIN),
            page_grants=np.array(self.page_grants, GRANT),
            prefill=np.array([(slot, int(sample), len(ids)) for slot, ids, sample in prefill], PREFILL),
            decode=None if decode is None else np.array(decode, np.int32),
            ids=np.array([t for _, ids, _ in prefill for t in ids], np.int32),
            extras=np.array(self.extras, EXTRA),
            bias=np.array(self.bias, BIAS),
            history=np.array(self.history, np.int32),
            targets=np.array(targets, np.int32),
        )
        self.new_slots, self.page_grants, self.extras, self.bias, self.history = [], [], [], [], []
        return StepPlan.unpack(plan.pack())  # read-only arrays, as in a worker

    def _append(self, slot: int, n: int) -> None:
        self.kv_len[slot] += n
        while len(self.pages[slot]) * self.page_size < self.kv_len[slot]:
            self._grant(slot, int(self.free.pop()))

    def _grant(self, slot: int, page: int) -> None:
        self.page_grants.append((slot, len(self.pages[slot]), page))
        self.pages[slot].append(page)
