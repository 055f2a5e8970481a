"""Reads the `quantization_config` of a config.json into a WeightFormat.  No torch."""

from __future__ import annotations

from typing import Any

from minisgl.config import WeightFormat
from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import Metadata

_KNOWN = "fp8, fbgemm_fp8, compressed-tensors (8 bits, or 4 packed), gptq and awq (4 bits)"


def weight_format(source: str, config: Any) -> WeightFormat | None:
    """The storage format of the linear layers, None without quantisation.  Raises UserError for an unknown kind."""
    if config is None:
        return None
    if not isinstance(config, dict):
        raise UserError(f"{source}: quantization_config should be an object, is {config!r:.80}.")
    fields = Metadata(f"{source} (quantization_config)", config)
    method = fields.get("quant_method")
    makers = {"fp8": _fp8, "fbgemm_fp8": _fp8, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    if not isinstance(method, str) or method not in makers:
        raise UserError(f"{source}: quantised by {method!r:.80}, which cannot be read. Known: {_KNOWN}.")
    return makers[method](fields)


def _fp8(fields: Metadata) -> WeightFormat:
    """Block scales under `weight_scale_inv` (DeepSeek-V3, Qwen3), or under `weight_scale` one per tensor.

    FBGEMM's float8, in Meta's own Llama checkpoints, has a scale for each output channel there.
    """
    fields.refuse("fmt", ("e4m3", "float8_e4m3fn"), "float8 formats other than e4m3 are")
    if fields.get("weight_block_size") is None:
        return WeightFormat("scaled", scale="weight_scale")
    return WeightFormat("scaled", scale="weight_scale_inv", block=_block(fields, "weight_block_size"))


def _gptq(fields: Metadata) -> WeightFormat:
    """`desc_act` needs no setting: each checkpoint says in g_idx which group an input belongs to."""
    fields.refuse("bits", (4, 8), "GPTQ of other widths than 4 and 8 bits is")
    fields.refuse("checkpoint_format", ("gptq", "gptq_v2"), "GPTQ in another layout than gptq and gptq_v2 is")
    fields.refuse("is_marlin_format", (False,), "weights repacked for Marlin are")
    fields.refuse("dynamic", ({},), "settings that differ between layers are")
    offset = 0 if fields.get("checkpoint_format") == "gptq_v2" else 1
    return WeightFormat("gptq", bits=fields.size("bits"), group_size=_group_size(fields, "group_size"), zero_offset=offset)


def _awq(fields: Metadata) -> WeightFormat:
    fields.refuse("bits", (4,), "AWQ of other widths than 4 bits is")
    fields.refuse("version", ("gemm", "GEMM"), "AWQ in another layout than gemm is")
    fields.refuse("zero_point", (True,), "AWQ without zero points is")
    fields.refuse("backend", ("autoawq",), "AWQ made by another program than AutoAWQ is")
    key = "q_group_size" if fields.get("group_size") is None else "group_size"
    return WeightFormat("awq", bits=4, group_size=_group_size(fields, key))


def _compressed_tensors(fields: Metadata) -> WeightFormat:
    """The one scheme that all linear layers share; https://github.com/vllm-project/compressed-tensors."""
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise UserError(f"{fields.source}: config_groups is missing or damaged.")
    fields.refuse("sparsity_config", ({},), "sparse weights are")
    first, *others = [(g.get("format") or fields.get("format"), g.get("weights")) for g in groups.values()]
    if any(other != first for other in others):
        raise UserError(f"{fields.source}: config_groups store their weights in different ways, which is not supported.")
    layout, scheme = first
    if not isinstance(scheme, dict):
        raise UserError(f"{fields.source}: config_groups have no weights.")
    weights = Metadata(f"{fields.source} (weights)", scheme)
    weights.refuse("symmetric", (True,), "weights with zero points are")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if (layout, bits, kind) in (("float-quantized", 8, "float"), ("int-quantized", 8, "int"), ("naive-quantized", 8, "float")):
        scales = ("tensor", "channel", "block")
        weights.refuse("strategy", scales, "scales per tensor, channel or block only are read; others are")
        block = _block(weights, "block_structure") if strategy == "block" else None
        return WeightFormat("scaled", scale="weight_scale", block=block)
    if layout == "pack-quantized" and bits in (4, 8) and kind == "int":
        weights.refuse("strategy", ("channel", "group"), "scales per channel or group only are read; others are")
        return WeightFormat("packed", bits=bits, group_size=_group_size(weights, "group_size") if strategy == "group" else -1)
    raise UserError(
        f"{fields.source}: format {layout!r:.40} with {bits!r:.10} {kind!r:.10} bits cannot be read. Known: {_KNOWN}."
    )


def _block(fields: Metadata, key: str) -> tuple[int, int]:
    value = fields.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise UserError(f"{fields.source}: {key} is {value!r:.80}, which is not two positive integers.")
    return value[0], value[1]


def _group_size(fields: Metadata, key: str) -> int:
    return -1 if fields.get(key) == -1 else fields.size(key)
