"""Reads the layers of a model from its config.json: rotary positions, sliding windows, experts.  No torch.

An absent key has the default of the registry's entry, which is that of transformers' configuration class.  Every function
raises UserError naming the key for a setting that cannot be served faithfully.
"""

from __future__ import annotations

from typing import Any

from minisgl.config import RopeScaling
from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import Metadata, rope_scaling
from minisgl.model.common.registry import Arch

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES = ("sliding_attention", "full_attention")


def text_part(config: Metadata, arch: Arch) -> Metadata:
    """The keys of config.json that describe the decoder, with defaults for the sizes that may be left out."""
    values = config.values
    if arch.text:
        values = _mapping(config, "text_config")
        if values.get("model_type") != arch.text:
            raise UserError(
                f"{config.source}: text_config is of type {values.get('model_type')!r:.80}; {arch.text} is supported."
            )
    sizes = dict(arch.sizes)
    given = {key: value for key, value in values.items() if value is not None or key not in sizes}
    return Metadata(f"{config.source} (text_config)" if arch.text else config.source, sizes | given)


def positions(config: Metadata, arch: Arch, layers: int, head_dim: int) -> dict[str, Any]:
    """The fields of ModelSpec for the context and the rotary positions.

    They are in `rope_parameters` (transformers 5: all in one place, or by type of layer), or in `rope_theta` and
    `rope_scaling`.
    """
    context = config.size("max_position_embeddings")
    source = f"{config.source} (rope_parameters)"
    by_type = Metadata(source, _mapping(config, "rope_parameters"))
    flat = {key: value for key, value in by_type.values.items() if key not in _LAYER_TYPES}
    parameters = Metadata(source, _mapping(by_type, "full_attention") or flat)
    local = Metadata(source, _mapping(by_type, "sliding_attention"))
    if local.values and local.values.get("rope_type", "default") != "default":
        raise UserError(f"{config.source}: scaled rotary positions in layers with a window are not supported.")
    local_theta = local.number("rope_theta", config.number("rope_local_base_freq", arch.local_rope_theta))
    stretched = _stretched(config, arch, dict(parameters.values or _mapping(config, "rope_scaling")))
    scaling = rope_scaling(config.source, stretched, context)
    part = parameters.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    reached = reach(scaling, context)
    return {
        "max_context": reached,
        "rope_theta": parameters.number("rope_theta", config.number("rope_theta", arch.rope_theta)),
        "rope_scaling": scaling,
        "local_rope_theta": local_theta if arch.local_rope_theta else 0.0,
        "rotary_dim": int(head_dim * part) if part < 1 else 0,
        "nope_layers": nope_layers(config, arch, layers),
        "windows": windows(config, arch, layers, reached),
    }


def _stretched(config: Metadata, arch: Arch, scaling: dict[str, Any]) -> dict[str, Any]:
    """The rope scaling of a config.json with what Phi-3's checkpoints write otherwise."""
    original = "original_max_position_embeddings"
    if config.get(original) is not None and scaling:  # outside of the scaling, and there it rules
        scaling[original] = config.size(original)
    if arch.model == "phi3.Phi3" and scaling.get("rope_type", scaling.get("type")) == "yarn":
        scaling["rope_type"] = "longrope"  # the name of its first checkpoints
    return scaling


def reach(scaling: RopeScaling | None, context: int) -> int:
    """The longest context of a model with rope scaling, in tokens.

    Users switch on YaRN and dynamic scaling by hand, and max_position_embeddings is still the context of the training.  The
    other kinds come with the checkpoint, whose max_position_embeddings includes them.
    """
    if scaling is not None and scaling.rope_type == "yarn":
        return max(context, int(scaling.factor * scaling.original_max_position_embeddings))
    return int(scaling.factor * context) if scaling is not None and scaling.rope_type == "dynamic" else context


def windows(config: Metadata, arch: Arch, layers: int, context: int) -> tuple[int, ...]:
    """ModelSpec.windows.  A window as wide as the `context` is none, unless layers with a window rotate differently."""
    if not arch.sliding:
        config.refuse("sliding_window", (), "sliding-window attention in this architecture is")
        config.refuse("use_sliding_window", (False,), "sliding-window attention in this architecture is")
        return ()
    config.refuse("use_bidirectional_attention", (False,), "attention to later tokens is")
    width = config.size("sliding_window") if config.get("sliding_window") else 0
    if "sliding_window" not in config.values:
        width = arch.window
    if arch.local_rope_theta and not width:
        raise UserError(f"{config.source}: sliding_window is null, and this architecture needs one.")
    narrow = 0 < width < context or arch.local_rope_theta > 0
    if not narrow or (arch.switched and not config.flag("use_sliding_window")):
        return ()
    sliding = _sliding_layers(config, arch, layers)
    return tuple(width if i in sliding else 0 for i in range(layers)) if sliding else ()


def _sliding_layers(config: Metadata, arch: Arch, layers: int) -> set[int]:
    """The layers with a window: those of `layer_types`, else by the rule of the architecture; see Arch.sliding."""
    types = None if arch.sliding == "all" else config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) < layers or any(kind not in _LAYER_TYPES for kind in types):
            raise UserError(
                f"{config.source}: layer_types is {types!r:.120}; it should name one of {', '.join(_LAYER_TYPES)} for each of "
                f"the {layers} layers (other kinds of attention are not supported)."
            )
        return {i for i in range(layers) if types[i] == "sliding_attention"}
    match arch.sliding:
        case "late":
            first = 0 if config.get("max_window_layers") == 0 else config.size("max_window_layers", 28)
            return set(range(first, layers))
        case "nope":
            return set(nope_layers(config, arch, layers))
    period = config.size("sliding_window_pattern", arch.period)
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
    config.refuse(key, tuple(_ACTIVATIONS), f"activations other than {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS.get(config.get(key), arch.activation)


def attention(config: Metadata, arch: Arch) -> dict[str, Any]:
    """The fields of ModelSpec for queries, keys, values and scores."""
    bias = config.flag("attention_bias")
    scalar = arch.query_pre_attn_scalar and config.number("query_pre_attn_scalar", arch.query_pre_attn_scalar)
    return {
        "qk_norm": arch.qk_norm,
        "qkv_bias": arch.qkv_bias or bias,
        "o_bias": bias,
        "attn_scale": scalar**-0.5 if scalar else 0.0,
        "attn_softcap": optional(config, "attn_logit_softcapping", arch.attn_softcap),
        "logit_softcap": optional(config, "final_logit_softcapping", arch.logit_softcap),
        "sinks": arch.sinks,
    }


def optional(config: Metadata, key: str, default: float) -> float:
    """A positive number, or 0.0 where it is null; `default` where there is no such key."""
    return config.number(key, 0.0) if key in config.values else default


def experts(config: Metadata, arch: Arch, layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts; {} for dense models."""
    if not arch.experts:
        return {}
    if arch.experts != "qwen":
        number, per_token = (8, 2) if arch.experts == "mixtral" else (128, 4)
        return {
            "num_experts": config.size("num_local_experts", number),
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


def _mapping(config: Metadata, key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{config.source}: {key} should be an object, is {value!r:.80}.")
    return value or {}
