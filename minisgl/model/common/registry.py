"""Lists the architectures that can be served, one entry each.  Imports no torch: resolving a model must be quick.

An entry names the class that computes the model and the defaults of its config.json; see docs/adding-a-model.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
    model_type: str = "llama"  # the configuration class in transformers that reads config.json
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_bias: bool | None = None  # None: the key is not read
    activation: str = "silu"
    sliding: str = ""
    switched: bool = False
    window: int = 0
    period: int = 1
    nope_period: int = 0  # each `nope_period`-th layer does not rotate, unless `no_rope_layers` says otherwise
    head_dim: int = 0  # 0: hidden size over heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    local_rope_theta: float = 0.0  # of layers with a window; 0: `rope_theta`
    rope: tuple[tuple[str, Any], ...] = ()  # the rotary parameters of a config.json without any
    partial_rotary: bool = False  # `partial_rotary_factor` is read
    tied: bool = False
    query_pre_attn_scalar: float = 0.0  # n: queries times keys are scaled by n ** -0.5; 0: by the head size
    attn_softcap: float | None = None  # None: the key is not read; 0: no cap
    logit_softcap: float | None = None
    text: str = ""
    experts: str = ""  # "" for none; "mixtral", "qwen" or "gpt-oss": the names of their sizes in config.json
    sinks: bool = False


_MISTRAL = Arch(model_type="mistral", sliding="all", window=4096)
_QWEN2 = Arch(model_type="qwen2", qkv_bias=True, sliding="late", switched=True, window=4096)
_GEMMA2 = Arch(
    "gemma.Gemma",
    model_type="gemma2",
    attention_bias=False,
    activation="gelu_tanh",
    sliding="period",
    window=4096,
    period=2,
    head_dim=256,
    tied=True,
    query_pre_attn_scalar=256,
    attn_softcap=50.0,
    logit_softcap=30.0,
)
_GEMMA3 = replace(
    _GEMMA2,
    model_type="gemma3_text",
    qk_norm=True,
    period=6,
    rope_theta=1e6,
    local_rope_theta=10_000.0,
    attn_softcap=None,
    logit_softcap=0.0,
)

# By `architectures[0]` of config.json.
HF_ARCHS = {
    "LlamaForCausalLM": Arch(attention_bias=False),
    "MistralForCausalLM": _MISTRAL,
    "Mistral3ForConditionalGeneration": replace(_MISTRAL, model_type="mistral3", text="mistral"),  # Mistral Small 3.1 and 3.2
    "MinistralForCausalLM": replace(_MISTRAL, model_type="ministral", sliding="period"),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": replace(_QWEN2, model_type="qwen3", qk_norm=True, qkv_bias=False, attention_bias=False, head_dim=128),
    "Qwen3MoeForCausalLM": Arch(
        "moe.Qwen3Moe",
        model_type="qwen3_moe",
        qk_norm=True,
        attention_bias=False,
        sliding="all",
        switched=True,
        window=4096,
        experts="qwen",
    ),
    "MixtralForCausalLM": Arch(
        "moe.Mixtral", model_type="mixtral", sliding="all", rms_norm_eps=1e-5, rope_theta=1e6, experts="mixtral"
    ),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(_GEMMA3, model_type="gemma3", text="gemma3_text"),
    "GptOssForCausalLM": Arch(
        "gpt_oss.GptOss",
        model_type="gpt_oss",
        attention_bias=True,
        activation="clamped_swiglu",
        sliding="period",
        window=128,
        period=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=150_000.0,
        rope=(("rope_type", "yarn"), ("factor", 32.0), ("truncate", False), ("original_max_position_embeddings", 4096)),
        sinks=True,
        experts="gpt-oss",
    ),
    "Phi3ForCausalLM": Arch("phi3.Phi3", model_type="phi3", sliding="all", rms_norm_eps=1e-5, partial_rotary=True),
    "SmolLM3ForCausalLM": Arch(
        "smollm3.SmolLM3",
        model_type="smollm3",
        attention_bias=False,
        sliding="nope",
        switched=True,
        nope_period=4,
        rope_theta=2e6,
        tied=True,
    ),
}
# `general.architecture` of a GGUF file -> the same model's Hugging Face class
GGUF_ARCHS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def model_class(architecture: str) -> Callable[[Build], Model]:
    """The class that computes `architecture`.  Imports it now, which needs torch.  Runs in the workers."""
    module, name = HF_ARCHS[architecture].model.split(".")
    built: Callable[[Build], Model] = getattr(importlib.import_module(f"minisgl.model.architectures.{module}"), name)
    return built
