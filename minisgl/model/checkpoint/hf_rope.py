"""Reads the rotary positions of a model from its config.json, as transformers' configuration classes do.  No torch."""

from __future__ import annotations

from typing import Any

from minisgl.config import RopeScaling
from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import Metadata, rope_scaling
from minisgl.model.common.registry import Arch

LAYER_TYPES = ("sliding_attention", "full_attention")
_PART = "partial_rotary_factor"


def positions(config: Metadata, arch: Arch, head_dim: int) -> dict[str, Any]:
    """The fields of ModelSpec for the context and the rotary positions.  Raises UserError naming the key that is at fault."""
    context = config.size("max_position_embeddings")
    parameters = _parameters(config, arch)
    scaling = rope_scaling(parameters.source, _stretched(config, arch, parameters.values), context)
    return {
        "max_context": reach(scaling, context),
        "rope_theta": parameters.number("rope_theta", config.number("rope_theta", arch.rope_theta)),
        "rope_scaling": scaling,
        "local_rope_theta": _local_theta(config, arch),
        "rotary_dim": _rotated(config, arch, parameters, head_dim),
    }


def _parameters(config: Metadata, arch: Arch) -> Metadata:
    """The rotary parameters of the layers that see all of a text.

    They are in `rope_parameters`, or in `rope_scaling`, the older key, which overrides the newer one.  Only an architecture
    whose layers with a window rotate differently has them by the type of layer.
    """
    given, older = mapping(config, "rope_parameters"), mapping(config, "rope_scaling")
    source = f"{config.source} ({'rope_scaling' if older else 'rope_parameters'})"
    typed = {key for key in given if key in LAYER_TYPES}
    if not arch.local_rope_theta:
        if typed or any(key in LAYER_TYPES for key in older):
            raise UserError(f"{source}: parameters for each type of layer are not supported in this architecture.")
        absent = config.get("rope_parameters") is None
        return Metadata(source, older or (dict(arch.rope) if absent else given))
    if given.keys() - typed:
        beside = ", ".join(sorted(given.keys() - typed))
        raise UserError(f"{source}: {beside:.80} should be in full_attention or sliding_attention in this architecture.")
    parameters = Metadata(source, mapping(Metadata(source, given), "full_attention") | older)
    if parameters.values.get("truncate", True) is not True:
        raise UserError(
            f"{source}: truncate is {parameters.get('truncate')!r:.80}, which is not supported in this architecture."
        )
    return parameters


def _local_theta(config: Metadata, arch: Arch) -> float:
    """ModelSpec.local_rope_theta."""
    if not arch.local_rope_theta:
        return 0.0
    source = f"{config.source} (rope_parameters, sliding_attention)"
    local = Metadata(source, mapping(config, "rope_parameters").get("sliding_attention") or {})
    if local.values.get("rope_type", local.values.get("type", "default")) != "default":
        raise UserError(f"{source}: scaled rotary positions in layers with a window are not supported.")
    local.refuse(_PART, (1,), "rotating a part of a head is")
    return local.number("rope_theta", config.number("rope_local_base_freq", arch.local_rope_theta))


def _rotated(config: Metadata, arch: Arch, parameters: Metadata, head_dim: int) -> int:
    """ModelSpec.rotary_dim."""
    part = parameters.number(_PART, config.number(_PART, 1.0))
    rotated, source = int(head_dim * part), parameters.source if parameters.get(_PART) is not None else config.source
    if part != 1 and (rotated % 2 or not 0 < rotated <= head_dim):
        raise UserError(
            f"{source}: {_PART} is {part}: {rotated} dimensions of a head of {head_dim} cannot be rotated in pairs."
        )
    if part != 1 and not arch.partial_rotary:
        raise UserError(f"{source}: {_PART} is {part}: rotating a part of a head in this architecture is not supported.")
    return rotated if part != 1 else 0


def _stretched(config: Metadata, arch: Arch, parameters: Any) -> dict[str, Any]:
    """The rope scaling with what some checkpoints write otherwise."""
    scaling, original = dict(parameters), "original_max_position_embeddings"
    if config.get(original) is not None and not arch.local_rope_theta:  # outside of the scaling, and there it rules
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


def mapping(config: Metadata, key: str) -> dict[str, Any]:
    """The object under `key`, {} where there is none.  Raises UserError if it is something else."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{config.source}: {key} should be an object, is {value!r:.80}.")
    return value or {}
