"""What a config.json says about the layers of a model: rotary positions, windows, experts.  No torch.

Every function takes what is absent from the registry, as transformers takes it from its configuration classes, and
raises UserError naming the key for what cannot be served faithfully.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import Metadata, rope_scaling
from minisgl.model.common.registry import Arch

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES = ("sliding_attention", "full_attention")


def text_part(config: Metadata, arch: Arch) -> Metadata:
    """What config.json says about the decoder, with the sizes that may be left out."""
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


@dataclass(frozen=True, slots=True)
class Rotary:
    """`part`: share of a head's dimensions that is rotated; `max_context`: tokens that the scaled positions reach."""

    theta: float
    scaling: str
    local_theta: float
    part: float
    max_context: int


def rotary(config: Metadata, arch: Arch, context: int) -> Rotary:
    """From `rope_parameters` (transformers 5: all in one place, or by type of layer) or `rope_theta` and `rope_scaling`.

    `context`: max_position_embeddings.
    """
    new = _mapping(config, "rope_parameters")
    by_type = Metadata(f"{config.source} (rope_parameters)", new)
    local = _mapping(by_type, "sliding_attention")
    new = _mapping(by_type, "full_attention") or {k: v for k, v in new.items() if k not in _LAYER_TYPES}
    scaling = dict(new or _mapping(config, "rope_scaling"))
    parameters = Metadata(by_type.source, new)
    if local and local.get("rope_type", "default") != "default":
        raise UserError(f"{config.source}: scaled rotary positions in layers with a window are not supported.")
    if config.get("original_max_position_embeddings") is not None and scaling:  # Phi-3 has it outside, and there it rules
        scaling["original_max_position_embeddings"] = config.size("original_max_position_embeddings")
    if arch.model == "phi3.Phi3" and scaling.get("rope_type", scaling.get("type")) == "yarn":
        scaling = {**scaling, "rope_type": "longrope"}  # what its first checkpoints call it
    raw = rope_scaling(config.source, scaling, context)
    local_theta = Metadata(by_type.source, local).number(
        "rope_theta", config.number("rope_local_base_freq", arch.local_rope_theta)
    )
    return Rotary(
        theta=parameters.number("rope_theta", config.number("rope_theta", arch.rope_theta)),
        scaling=raw,
        local_theta=local_theta if arch.local_rope_theta else 0.0,
        part=parameters.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)),
        max_context=reach(scaling, context) if raw else context,
    )


def reach(scaling: dict[str, Any], context: int) -> int:
    """Tokens that a scaled model can take.

    YaRN and dynamic scaling are switched on by hand, in a config whose max_position_embeddings is still what the model was
    trained with; the other kinds come with the checkpoint, which says how far they reach.
    """
    factor = scaling.get("factor") or 1.0
    match scaling.get("rope_type", scaling.get("type")):
        case "yarn":
            return max(context, int(factor * (scaling.get("original_max_position_embeddings") or context)))
        case "dynamic":
            return int(factor * context)
    return context


def windows(config: Metadata, arch: Arch, layers: int, context: int) -> tuple[int, ...]:
    """ModelSpec.windows.  A window as wide as the `context` is none, unless it tells how a layer rotates."""
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
    wide = width >= context and not arch.local_rope_theta
    if not width or wide or (arch.switched and not config.flag("use_sliding_window")):
        return ()
    types = None if arch.sliding == "all" else config.get("layer_types")
    known = isinstance(types, list) and len(types) >= layers and all(kind in _LAYER_TYPES for kind in types)
    if types is not None and not known:
        raise UserError(
            f"{config.source}: layer_types is {types!r:.120}; it should name one of {', '.join(_LAYER_TYPES)} for each of the "
            f"{layers} layers (other kinds of attention are not supported)."
        )
    if types is not None:
        slides = [kind == "sliding_attention" for kind in types[:layers]]
    elif arch.sliding == "late":
        first = 0 if config.get("max_window_layers") == 0 else config.size("max_window_layers", 28)
        slides = [i >= first for i in range(layers)]
    elif arch.sliding == "nope":
        slides = [i in nope_layers(config, arch, layers) for i in range(layers)]
    else:
        period = config.size("sliding_window_pattern", arch.period)
        slides = [period == 1 or (i + 1) % period != 0 for i in range(layers)]
    return tuple(width if slide else 0 for slide in slides) if any(slides) else ()


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
    """ModelSpec.activation: Gemma's is `hidden_activation`, whatever an older `hidden_act` says.  gpt-oss' is in the code."""
    if arch.activation == "clamped_swiglu":
        config.refuse("swiglu_limit", (7, 7.0), "another bound of the activation is")
        config.refuse("swiglu_alpha", (1.702,), "another slope of the activation is")
        return arch.activation
    key = "hidden_activation" if arch.activation == "gelu_tanh" else "hidden_act"
    value = config.get(key)
    if value is None:
        return arch.activation
    if value not in _ACTIVATIONS:
        raise UserError(
            f"{config.source}: {key} is {value!r:.80}: activations other than {', '.join(_ACTIVATIONS)} are not supported."
        )
    return _ACTIVATIONS[value]


def attention_scale(config: Metadata, arch: Arch) -> float:
    """ModelSpec.attn_scale."""
    scalar = arch.query_pre_attn_scalar and config.number("query_pre_attn_scalar", arch.query_pre_attn_scalar)
    return scalar**-0.5 if scalar else 0.0


def optional(config: Metadata, key: str, default: float) -> float:
    """A positive number, or 0.0 where it is null; `default` where there is no such key."""
    return config.number(key, 0.0) if key in config.values else default


def experts(config: Metadata, arch: Arch, layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts; {} for dense models."""
    if not arch.experts:
        return {}
    if arch.experts != "qwen":
        return {
            "num_experts": config.size("num_local_experts", 8 if arch.experts == "mixtral" else 128),
            "experts_per_token": config.size("num_experts_per_tok", 2 if arch.experts == "mixtral" else 4),
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
