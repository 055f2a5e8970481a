"""Lists the architectures that can be served, one entry each.  Imports no torch: resolving a model must be quick.

An entry names the class that computes the model and the defaults of its config.json; see docs/adding-a-model.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisgl.model.common.interfaces import Build, Model


@dataclass(frozen=True, slots=True)
class Arch:
    """The facts about an architecture that no config.json has, and the defaults of the keys that one may omit.

    sliding: the layers that have a window: "" none, "all", "late" (from `max_window_layers` on), "nope" (those that do not
    rotate), "period" (all but each `period`-th).  A `layer_types` in config.json overrides it, except for "all".
    switched: windows only with `use_sliding_window`.
    text: the model_type of `text_config`, where the checkpoint is of a model that also takes images.  Only its text part is
    served, whose weights have names in `language_model.`.
    The defaults are those of the configuration class in transformers.
    """

    model: str = "llama.Llama"  # module and class in minisgl.model.architectures
    qk_norm: bool = False
    qkv_bias: bool = False
    activation: str = "silu"
    sliding: str = ""
    switched: bool = False
    window: int = 0
    period: int = 1
    nope_period: int = 0  # each `nope_period`-th layer does not rotate, unless `no_rope_layers` says otherwise
    head_dim: int | None = 0  # 0: hidden size over heads; None: config.json must have it
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    local_rope_theta: float = 0.0  # of layers with a window; 0: `rope_theta`
    tied: bool = False
    query_pre_attn_scalar: float = 0.0  # n: queries times keys are scaled by n ** -0.5; 0: by the head size
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    text: str = ""
    sizes: tuple[tuple[str, int], ...] = ()  # keys that config.json may omit
    experts: str = ""  # "" for none; "mixtral", "qwen" or "gpt-oss": the names of their sizes in config.json
    sinks: bool = False


_GEMMA3 = Arch(
    "gemma.Gemma",
    qk_norm=True,
    activation="gelu_tanh",
    sliding="period",
    window=4096,
    period=6,
    head_dim=256,
    rope_theta=1e6,
    local_rope_theta=10_000.0,
    tied=True,
    query_pre_attn_scalar=256,
    sizes=(
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("max_position_embeddings", 131_072),
        ("vocab_size", 262_208),
    ),
)

# By `architectures[0]` of config.json.
HF_ARCHS = {
    "LlamaForCausalLM": Arch(),
    "MistralForCausalLM": Arch(sliding="all", window=4096),
    "Mistral3ForConditionalGeneration": Arch(sliding="all", window=4096, text="mistral"),  # Mistral Small 3.1 and 3.2
    "MinistralForCausalLM": Arch(sliding="period", window=4096),
    "Qwen2ForCausalLM": Arch(qkv_bias=True, sliding="late", switched=True, window=4096),
    "Qwen3ForCausalLM": Arch(qk_norm=True, sliding="late", switched=True, window=4096, head_dim=None),
    "Qwen3MoeForCausalLM": Arch(
        "moe.Qwen3Moe", qk_norm=True, sliding="all", switched=True, window=4096, head_dim=None, experts="qwen"
    ),
    "MixtralForCausalLM": Arch("moe.Mixtral", sliding="all", rms_norm_eps=1e-5, rope_theta=1e6, experts="mixtral"),
    "Gemma2ForCausalLM": Arch(
        "gemma.Gemma",
        activation="gelu_tanh",
        sliding="period",
        window=4096,
        period=2,
        head_dim=256,
        tied=True,
        query_pre_attn_scalar=256,
        attn_softcap=50.0,
        logit_softcap=30.0,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(_GEMMA3, text="gemma3_text"),
    "GptOssForCausalLM": Arch(
        "gpt_oss.GptOss",
        activation="clamped_swiglu",
        sliding="period",
        window=128,
        period=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=150_000.0,
        sinks=True,
        experts="gpt-oss",
    ),
    "Phi3ForCausalLM": Arch("phi3.Phi3", sliding="all", rms_norm_eps=1e-5),
    "SmolLM3ForCausalLM": Arch("smollm3.SmolLM3", sliding="nope", switched=True, nope_period=4, rope_theta=2e6, tied=True),
}
# `general.architecture` of a GGUF file -> the same model's Hugging Face class
GGUF_ARCHS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def model_class(architecture: str) -> Callable[[Build], Model]:
    """The class that computes `architecture`.  Imports it now, which needs torch.  Runs in the workers."""
    module, name = HF_ARCHS[architecture].model.split(".")
    built: Callable[[Build], Model] = getattr(importlib.import_module(f"minisgl.model.architectures.{module}"), name)
    return built
