"""How a quantised checkpoint stores its linear layers, from the `quantization_config` of its config.json.  No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import Metadata

_KNOWN = "fp8, fbgemm_fp8, compressed-tensors (8 bits, or 4 packed), gptq and awq (4 bits)"


def weight_format(source: str, config: Any) -> str:
    """Canonical JSON for .quantized; "" where there is no quantisation.  Raises UserError for an unknown kind.

    {"method": "scaled", "scale": suffix of the scales' tensor, "block": [rows, columns] per scale, null: by its shape}
    {"method": "gptq", "bits", "group_size", "zero_offset": what is added to stored zero points}
    {"method": "awq", "bits", "group_size"}
    {"method": "packed", "bits", "group_size"}; group_size -1 is one group for a whole row
    """
    if config is None:
        return ""
    if not isinstance(config, dict):
        raise UserError(f"{source}: quantization_config should be an object, is {config!r:.80}.")
    fields = Metadata(f"{source} (quantization_config)", config)
    method = fields.get("quant_method")
    makers = {"fp8": _fp8, "fbgemm_fp8": _fbgemm, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    if method not in makers:
        raise UserError(f"{source}: quantised by {method!r:.80}, which cannot be read. Known: {_KNOWN}.")
    return json.dumps(makers[method](fields))


def _fp8(fields: Metadata) -> dict[str, Any]:
    """Block scales under `weight_scale_inv` (DeepSeek-V3, Qwen3), or one per tensor under `weight_scale`."""
    fields.refuse("fmt", ("e4m3", "float8_e4m3fn"), "float8 formats other than e4m3 are")
    if fields.get("weight_block_size") is None:
        return {"method": "scaled", "scale": "weight_scale", "block": None}
    return {"method": "scaled", "scale": "weight_scale_inv", "block": _block(fields, "weight_block_size")}


def _fbgemm(fields: Metadata) -> dict[str, Any]:
    """FBGEMM's float8, of Meta's own Llama checkpoints: a scale for each output channel."""
    return {"method": "scaled", "scale": "weight_scale", "block": None}


def _gptq(fields: Metadata) -> dict[str, Any]:
    """`desc_act` needs no setting: each checkpoint says in g_idx which group an input belongs to."""
    fields.refuse("bits", (4, 8), "GPTQ of other widths than 4 and 8 bits is")
    fields.refuse("checkpoint_format", ("gptq", "gptq_v2"), "GPTQ in another layout than gptq and gptq_v2 is")
    fields.refuse("is_marlin_format", (False,), "weights repacked for Marlin are")
    fields.refuse("dynamic", ({},), "settings that differ between layers are")
    v2 = fields.get("checkpoint_format") == "gptq_v2"
    return {
        "method": "gptq",
        "bits": fields.size("bits"),
        "group_size": _group_size(fields, fields.get("group_size")),
        "zero_offset": 0 if v2 else 1,
    }


def _awq(fields: Metadata) -> dict[str, Any]:
    fields.refuse("bits", (4,), "AWQ of other widths than 4 bits is")
    fields.refuse("version", ("gemm", "GEMM"), "AWQ in another layout than gemm is")
    fields.refuse("zero_point", (True,), "AWQ without zero points is")
    fields.refuse("backend", ("autoawq",), "AWQ made by another program than AutoAWQ is")
    group = fields.get("group_size")
    return {
        "method": "awq",
        "bits": 4,
        "group_size": _group_size(fields, fields.get("q_group_size") if group is None else group),
    }


def _compressed_tensors(fields: Metadata) -> dict[str, Any]:
    """The settings of the one scheme that all linear layers share; https://github.com/vllm-project/compressed-tensors."""
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise UserError(f"{fields.source}: config_groups is missing or damaged.")
    fields.refuse("sparsity_config", ({},), "sparse weights are")
    formats = [{"format": g.get("format") or fields.get("format"), "weights": g.get("weights")} for g in groups.values()]
    if any(f != formats[0] for f in formats):
        raise UserError(f"{fields.source}: config_groups store their weights in different ways, which is not supported.")
    if not isinstance(formats[0]["weights"], dict):
        raise UserError(f"{fields.source}: config_groups have no weights.")
    weights = Metadata(f"{fields.source} (weights)", formats[0]["weights"])
    weights.refuse("symmetric", (True,), "weights with zero points are")
    bits, kind, layout = weights.get("num_bits"), weights.get("type"), formats[0]["format"]
    if (layout, bits, kind) in (("float-quantized", 8, "float"), ("int-quantized", 8, "int"), ("naive-quantized", 8, "float")):
        block = _block(weights, "block_structure") if weights.get("strategy") == "block" else None
        weights.refuse(
            "strategy", ("tensor", "channel", "block"), "scales per tensor, channel or block only are read; others are"
        )
        return {"method": "scaled", "scale": "weight_scale", "block": block}
    if layout == "pack-quantized" and bits in (4, 8) and kind == "int":
        weights.refuse("strategy", ("channel", "group"), "scales per channel or group only are read; others are")
        size = weights.get("group_size") if weights.get("strategy") == "group" else -1
        return {"method": "packed", "bits": bits, "group_size": _group_size(weights, size)}
    raise UserError(
        f"{fields.source}: format {layout!r:.40} with {bits!r:.10} {kind!r:.10} bits cannot be read. Known: {_KNOWN}."
    )


def _block(fields: Metadata, key: str) -> list[int]:
    value = fields.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise UserError(f"{fields.source}: {key} is {value!r:.80}, which is not two positive integers.")
    return value


def _group_size(fields: Metadata, value: Any) -> int:
    if value == -1:
        return -1
    return Metadata(fields.source, {"group_size": value}).size("group_size")


def settings_of(raw: str) -> Mapping[str, Any]:
    """What `weight_format` has written; {} for ""."""
    settings: dict[str, Any] = json.loads(raw or "{}")
    return settings
