"""Reads from a GGUF file what changes attention and logits beside the sizes: rope scaling, factors, caps.  No torch.

Every key means what llama.cpp makes of it: `llama_model_base::load_hparams` in src/llama-model.cpp, and the constructor of
`llama_context` in src/llama-context.cpp.  A key that llama.cpp reads for other architectures only is refused, unless its value
changes nothing: who wrote it there expects it to count.
"""

from __future__ import annotations

import math
from typing import Any

from minisgl.config import RopeScaling
from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_file import GGUFFile
from minisgl.model.checkpoint.metadata import Metadata, shown

_F32 = 0  # ggml type
_ROPE_TYPES = ("none", "linear", "yarn")
_NEUTRAL: dict[str, tuple[float, ...]] = {  # behind "<architecture>.": key -> the values that change nothing
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),  # and that of the heads' size
    "attention.output_scale": (0.0, 1.0),
    "attention.value_scale": (0.0, 1.0),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "nextn_predict_layers": (0,),
    "n_deepstack_layers": (0,),
    "adapters.count": (0,),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}


def refuse_others(fields: Metadata, arch: str, head_dim: int) -> None:
    """Raises UserError naming a key that this architecture does not compute."""
    for name, neutral in _NEUTRAL.items():
        key = f"{arch}.{name}"
        value: Any = fields.get(key)
        usual = name == "attention.scale" and type(value) is float and math.isclose(value, head_dim**-0.5, rel_tol=1e-6)
        if value is not None and value not in neutral and not usual:
            known = " or ".join(map(str, neutral))
            raise UserError(
                f"{fields.source}: {key} is {shown(value)}, which is not supported in {arch} models (only {known})."
            )
    for name in ("rope.dimension_sections", "attention.sliding_window_pattern"):
        fields.refuse(f"{arch}.{name}", (0,), f"{name} in {arch} models is")


def rope_scaling_of(file: GGUFFile, fields: Metadata, arch: str, head_dim: int) -> RopeScaling | None:
    """The rope scaling; None without one.  Raises UserError for a kind that cannot be computed.

    A factor without a type is linear.  Llama 3.1's scaling is a tensor of divisors, one per frequency, on top of it.
    """
    prefix = f"{arch}.rope.scaling."
    kind = fields.get(prefix + "type")
    kind = "linear" if kind is None else kind
    if kind not in _ROPE_TYPES:
        raise UserError(f"{fields.source}: {prefix}type is {shown(kind)}, not supported (known: {', '.join(_ROPE_TYPES)}).")
    key = prefix + "factor" if fields.get(prefix + "factor") is not None else f"{arch}.rope.scale_linear"  # its old name
    factor = 1.0 if kind == "none" or fields.get(key) in (None, 0) else fields.number(key)
    amplitude = fields.number(prefix + "attn_factor", 1.0)
    divisors = _divisors(file, arch, head_dim)
    if kind == "yarn":
        if divisors:
            raise UserError(
                f"{fields.source}: {prefix}type is 'yarn' beside a tensor rope_freqs.weight, which is not supported."
            )
        original = fields.size(prefix + "original_context_length", fields.size(f"{arch}.context_length"))
        amplitude *= 1 + 0.1 * math.log(max(factor, 1.0))
        return RopeScaling("yarn", factor, float(original), amplitude, beta_fast=32.0, beta_slow=1.0)
    if divisors:
        return RopeScaling("divisors", attention_factor=amplitude, divisors=tuple(d * factor for d in divisors))
    return None if factor == amplitude == 1 else RopeScaling("linear", factor, attention_factor=amplitude)


def _divisors(file: GGUFFile, arch: str, head_dim: int) -> tuple[float, ...]:
    """The values of rope_freqs.weight; () without that tensor."""
    name = "rope_freqs.weight"
    if name not in file.tensors:
        return ()
    tensor = file.tensors[name]
    if arch != "llama" or tensor.shape != (head_dim // 2,) or tensor.kind != _F32:
        raise UserError(f"--model {file.path}: {name} should be {head_dim // 2} float32 values, in a llama model.")
    divisors = tuple(file.dequantize(name).tolist())
    if not all(1e-6 < d < 1e6 for d in divisors):
        raise UserError(f"--model {file.path}: {name} holds values that are no frequency divisors.")
    return divisors
