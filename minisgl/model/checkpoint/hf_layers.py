"""Reads the layers of a model from its config.json: sliding windows, activations, experts.  No torch.

An absent key has the default of the registry's entry, which is that of transformers' configuration class.  Every function
raises UserError naming the key for a setting that cannot be served faithfully.
"""

from __future__ import annotations

from typing import Any

from minisgl.errors import UserError
from minisgl.model.checkpoint.hf_defaults import default_sizes
from minisgl.model.checkpoint.hf_rope import LAYER_TYPES, mapping
from minisgl.model.checkpoint.metadata import Metadata
from minisgl.model.common.registry import HF_ARCHS, Arch

_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")  # one formula, several names
_ACTIVATIONS = {"silu": "silu", "swish": "silu", **dict.fromkeys(_TANH, "gelu_tanh")}
_MODEL_TYPES = {arch.model_type for arch in HF_ARCHS.values()}


def text_part(config: Metadata, arch: Arch) -> Metadata:
    """The keys of config.json that describe the decoder, with defaults for the sizes that may be left out."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in _MODEL_TYPES
    config.refuse("model_type", (arch.model_type,) if known else (kind, arch.model_type), "another architecture is")
    values = config.values
    if arch.text:
        values = mapping(config, "text_config")
        if values.get("model_type", arch.text) != arch.text:
            kind = values["model_type"]
            raise UserError(f"{config.source}: text_config is of type {kind!r:.80}; {arch.text} is supported (model_type).")
    sizes = default_sizes(arch)
    given = {key: value for key, value in values.items() if value is not None or key not in sizes or not arch.text}
    return Metadata(f"{config.source} (text_config)" if arch.text else config.source, sizes | given)


def refuse_other_models(config: Metadata) -> None:
    """Raises UserError naming a key that makes another model of any architecture."""
    config.refuse("mlp_bias", (False,), "biases in the MLP layers are")
    config.refuse("is_causal", (True,), "attention to later tokens is")
    config.refuse("use_bidirectional_attention", (False,), "attention to later tokens is")
    config.refuse("per_layer_config", ({},), "layers with settings of their own are")


def windows(config: Metadata, arch: Arch, layers: int, context: int) -> tuple[int, ...]:
    """ModelSpec.windows.  A window as wide as the `context` is none, unless layers with a window rotate differently."""
    types = _layer_types(config, layers) if arch.sliding not in ("", "all") else None
    on = not arch.switched or config.flag("use_sliding_window") or (arch.sliding == "nope" and types is not None)
    width = arch.window
    if "sliding_window" in config.values and (on or arch.local_rope_theta):
        width = 0 if config.get("sliding_window") is None else config.size("sliding_window")
    if arch.local_rope_theta and not width:
        raise UserError(f"{config.source}: sliding_window is null, and this architecture needs one.")
    narrow = 0 < width < context or arch.local_rope_theta > 0
    if not arch.sliding:
        why = "sliding-window attention in this architecture is"
        config.refuse("use_sliding_window", (False,), why)
        config.refuse("layer_types", (["full_attention"] * layers,), why)
        if narrow and config.get("use_sliding_window") is None:
            config.refuse("sliding_window", (), why)
        return ()
    if not narrow or not on:
        return ()
    sliding = (
        _sliding_layers(config, arch, layers) if types is None else {i for i in range(layers) if types[i] == LAYER_TYPES[0]}
    )
    return tuple(width if i in sliding else 0 for i in range(layers)) if sliding else ()


def _layer_types(config: Metadata, layers: int) -> list[str] | None:
    """`layer_types`, None where there is no such key."""
    types: list[str] | None = config.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
        raise UserError(
            f"{config.source}: layer_types is {types!r:.120}; it should name one of {', '.join(LAYER_TYPES)} for each of "
            f"the {layers} layers (other kinds of attention are not supported)."
        )
    return types


def _sliding_layers(config: Metadata, arch: Arch, layers: int) -> set[int]:
    """The layers with a window by the rule of the architecture; see Arch.sliding."""
    if arch.sliding == "all":
        config.refuse("layer_types", (["sliding_attention"] * layers,), "windows in some layers of this architecture only are")
    period = config.size("sliding_window_pattern", arch.period)
    if period != arch.period and not arch.local_rope_theta:
        raise UserError(f"{config.source}: sliding_window_pattern is {period}, and this architecture has no such setting.")
    match arch.sliding:
        case "late":
            first = 0 if config.get("max_window_layers") == 0 else config.size("max_window_layers", 28)
            return set(range(first, layers))
        case "nope":
            return set(nope_layers(config, arch, layers))
    return {i for i in range(layers) if period == 1 or (i + 1) % period}


def nope_layers(config: Metadata, arch: Arch, layers: int) -> tuple[int, ...]:
    """ModelSpec.nope_layers: SmolLM3's `no_rope_layers` has a 1 for every layer that *is* rotated."""
    if not arch.nope_period:
        return ()
    rotated = config.get("no_rope_layers")
    if rotated is None:
        every = config.size("no_rope_layer_interval", arch.nope_period)
        return tuple(i for i in range(layers) if (i + 1) % every == 0)
    if not isinstance(rotated, list) or len(rotated) < layers or not all(r in (0, 1) for r in rotated):
        raise UserError(f"{config.source}: no_rope_layers is {rotated!r:.80}, which is not a 0 or 1 for every layer.")
    return tuple(i for i in range(layers) if not rotated[i])


def activation(config: Metadata, arch: Arch) -> str:
    """ModelSpec.activation.  Gemma's `hidden_activation` overrides an older `hidden_act`; gpt-oss has no key for it."""
    if arch.activation == "clamped_swiglu":
        config.refuse("swiglu_limit", (7, 7.0), "another bound of the activation is")
        config.refuse("swiglu_alpha", (1.702,), "another slope of the activation is")
        return arch.activation
    key = "hidden_activation" if arch.activation == "gelu_tanh" else "hidden_act"
    known = [name for name, kind in _ACTIVATIONS.items() if kind == "silu" or not arch.experts]
    config.refuse(key, tuple(known), f"activations other than {', '.join(known)} are")
    return _ACTIVATIONS.get(config.get(key), arch.activation)


def attention(config: Metadata, arch: Arch) -> dict[str, Any]:
    """The fields of ModelSpec for queries, keys, values and scores."""
    bias = arch.attention_bias is not None and config.flag("attention_bias", arch.attention_bias)
    scalar = arch.query_pre_attn_scalar and config.number("query_pre_attn_scalar", arch.query_pre_attn_scalar)
    return {
        "qk_norm": arch.qk_norm,
        "qkv_bias": arch.qkv_bias or bias,
        "o_bias": bias,
        "attn_scale": scalar**-0.5 if scalar else 0.0,
        "attn_softcap": _softcap(config, "attn_logit_softcapping", arch.attn_softcap),
        "logit_softcap": _softcap(config, "final_logit_softcapping", arch.logit_softcap),
        "sinks": arch.sinks,
    }


def _softcap(config: Metadata, key: str, default: float | None) -> float:
    """A positive number, or 0.0 where it is null; `default` where there is no such key, None if the architecture has none."""
    if default is None:
        config.refuse(key, (), "a soft cap in this architecture is")
        return 0.0
    return config.number(key, 0.0) if key in config.values else default


def experts(config: Metadata, arch: Arch, layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts; {} for dense models."""
    if not arch.experts:
        return {}
    if arch.experts != "qwen":
        number, per_token = (8, 2) if arch.experts == "mixtral" else (128, 4)
        return {
            "num_experts": config.size("num_local_experts", config.size("num_experts", number)),
            "experts_per_token": config.size("num_experts_per_tok", per_token),
            "expert_size": config.size("intermediate_size"),
            "norm_topk": True,
        }
    dense, step = config.get("mlp_only_layers") or [], config.size("decoder_sparse_step", 1)
    if not isinstance(dense, list):
        raise UserError(f"{config.source}: mlp_only_layers is {dense!r:.80}, which is not a list of layers.")
    return {
        "num_experts": config.size("num_experts", config.size("num_local_experts", 128)),
        "experts_per_token": config.size("num_experts_per_tok", 8),
        "expert_size": config.size("moe_intermediate_size", 768),
        "norm_topk": config.flag("norm_topk_prob"),
        "dense_layers": tuple(i for i in range(layers) if i in dense or (i + 1) % step),
    }
