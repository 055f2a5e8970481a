"""Reads typed values from the metadata of a checkpoint, and the parts that all formats share.  No torch.

A checkpoint is user input: every value is checked where it is read, and a bad one is a UserError naming the file and the key.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.config import ModelSpec, RopeScaling, SamplingDefaults
from minisgl.errors import UserError

MAX_SIZE = 1 << 31
MAX_CONTEXT = 1 << 28  # tokens
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {  # the numbers that a kind of scaling must have
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": (),
}


_MOST = {  # the last part of a key -> the largest size that is believed: work and memory grow with it before weights are read
    **dict.fromkeys(("num_hidden_layers", "block_count"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_count", "head_count_kv"), 1 << 12),
    **dict.fromkeys(("head_dim", "key_length"), 1 << 12),
    **dict.fromkeys(("hidden_size", "embedding_length"), 1 << 18),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "feed_forward_length"), 1 << 22),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), 1 << 12),
    **dict.fromkeys(("max_position_embeddings", "context_length"), MAX_CONTEXT),
    "vocab_size": 1 << 24,
}
_ROPE = "factor attention_factor attn_factor mscale mscale_all_dim beta_fast beta_slow low_freq_factor high_freq_factor "
_RANGES = {  # the last part of a key -> the numbers that are believed: with others cosines and scores are no numbers
    **dict.fromkeys(f"{_ROPE} short_factor long_factor".split(), (1e-4, 1e6)),
    **dict.fromkeys(("rope_theta", "freq_base", "rope_local_base_freq"), (1.001, 1e18)),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), (1e-4, 1e8)),
    "original_max_position_embeddings": (2.0, float(MAX_CONTEXT)),
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: Any) -> str:
    """A value for a message, in at most 80 characters; that of a long list is never written out."""
    return _SHORT.repr(value)[:80]


class Metadata:
    """Key-value pairs from the file `source`.  A null counts as absent."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; UserError if it is absent (and has no default) or something else."""
        most = _MOST.get(key.rpartition(".")[2], MAX_SIZE - 1)
        what = "a positive integer" + (f" up to {most}" if most < MAX_SIZE - 1 else "")
        value: int = self._checked(key, default, (int,), most + 1, what)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; UserError if it is absent (and has no default) or something else."""
        value = self._checked(key, default, (int, float), math.inf, "a positive number")
        least, most = _RANGES.get(key.rpartition(".")[2], (0.0, math.inf))
        if self.get(key) is not None and not least <= value <= most:
            raise UserError(f"{self.source}: {key} is {shown(value)}, and numbers from {least:g} to {most:g} are possible.")
        return float(value)

    def _checked(self, key: str, default: float | None, types: tuple[type, ...], end: float, what: str) -> Any:
        value = self.get(key)
        if value is None:
            if default is None:
                raise UserError(f"{self.source}: {key} is missing.")
            return default
        if type(value) not in types or not 0 < value < end:
            raise UserError(f"{self.source}: {key} is {shown(value)}, which is not {what}.")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive finite numbers; UserError if it is absent or something else."""
        value = self.get(key)
        if not isinstance(value, list):
            raise UserError(f"{self.source}: {key} is {shown(value)}, which is not a list of numbers.")
        return tuple(Metadata(self.source, {key: v}).number(key) for v in value)

    def strings(self, key: str) -> list[str]:
        """A list of strings; [] if absent, UserError if it is something else."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(s, str) for s in value)):
            raise UserError(f"{self.source}: {key} is {shown(value)}, which is not a list of strings.")
        return value or []

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false; UserError if it is something else."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise UserError(f"{self.source}: {key} is {shown(value)}, which is neither true nor false.")
        return default if value is None else value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; () if absent."""
        value = self.get(key)
        ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_SIZE for i in ids):
            raise UserError(f"{self.source}: {key} is {shown(value)}, which is not a token id or a list of them.")
        return ids

    def refuse(self, key: str, harmless: tuple[Any, ...], why: str) -> None:
        """UserError if `key` is set to anything but the `harmless` values: going on would give wrong answers silently."""
        value = self.get(key)
        if value is not None and value not in harmless:
            raise UserError(f"{self.source}: {key} is {shown(value)}: {why} not supported.")


# What generation_config.json and GGUF files call the parameters -> the fields of SamplingParams.
_SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "min_p")}
HF_SAMPLING = {**_SAMPLING, "repetition_penalty": "repetition_penalty"}
GGUF_SAMPLING = {"temp": "temperature", "penalty_repeat": "repetition_penalty", **_SAMPLING}
_LARGEST = {"top_p": 1.0, "min_p": 1.0, "top_k": MAX_SIZE - 1}
_NOT_ZERO = ("top_p", "repetition_penalty")
# What the cards of models recommend whose files do not: a pattern of a name -> values.
_CARDS = ((re.compile("smollm2", re.IGNORECASE), {"temperature": 0.2, "top_p": 0.9}),)
# For everything else: temperature and top_p of llama.cpp.  Its top_k and min_p are left out, since clients of OpenAI's API have
# no fields to switch them off: `temperature: 1, top_p: 1` shall be the model's own distribution.
_UNKNOWN = {"temperature": 0.8, "top_p": 0.95}


def sampling_defaults(
    fields: Metadata, names: Mapping[str, str], prefix: str = "", model: Sequence[object] = ()
) -> SamplingDefaults:
    """The sampling parameters that a checkpoint recommends.  Raises UserError for an impossible value.

    `names` maps the keys, each behind `prefix`, to fields of SamplingDefaults.  `do_sample: false` overrides all of them: it
    recommends greedy decoding.  Where the file says nothing about the shape of the distribution, the card of the model does
    (known by one of the names in `model`), and otherwise one choice for all.
    """
    source = os.path.basename(fields.source)
    if fields.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0, source=source)
    found: dict[str, Any] = {}
    for key, name in names.items():
        value = fields.get(prefix + key)
        if value is None:
            continue
        possible = type(value) in (int, float) and 0 <= value <= _LARGEST.get(name, 100.0)
        if not possible or (name == "top_k" and value != int(value)) or (name in _NOT_ZERO and value == 0):
            raise UserError(f"{fields.source}: {prefix}{key} is {shown(value)}, which is no {name}.")
        found[name] = int(value) if name == "top_k" else float(value)
    if found.keys() <= {"repetition_penalty"}:
        called = "\n".join(name for name in model if isinstance(name, str))
        card = next((values for pattern, values in _CARDS if pattern.search(called)), None)
        source = "model card" if card else "minisgl's choice; the model recommends none"
        found = (card or _UNKNOWN) | found
    return SamplingDefaults(**found, source=source)


def rope_scaling(source: str, scaling: Mapping[str, Any], max_context: int = 0) -> RopeScaling | None:
    """The checkpoint's rope scaling, None without one.  Raises UserError for an unknown kind.

    `max_context`: the checkpoint's max_position_embeddings, for kinds that depend on it and do not state it themselves.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        known = ", ".join(["default", *_ROPE_FIELDS])
        raise UserError(f"{source}: rope scaling of type {shown(kind)} is not supported (rope_type; known: {known}).")
    fields = Metadata(f"{source} (rope scaling)", scaling)
    values: dict[str, Any] = {name: fields.number(name) for name in _ROPE_FIELDS[kind]}
    if kind == "llama3":
        if (high := values["high_freq_factor"]) <= values["low_freq_factor"]:
            raise UserError(f"{source}: high_freq_factor is {high}, and should be above low_freq_factor.")
        values["original_max_position_embeddings"] = fields.number("original_max_position_embeddings", float(max_context))
    elif kind == "dynamic":  # the length of a text is compared with max_position_embeddings
        values["original_max_position_embeddings"] = max_context
    elif kind in ("yarn", "longrope"):
        original = fields.number("original_max_position_embeddings", float(max_context))
        factor = fields.number("factor", max_context / original if kind == "longrope" or "factor" in scaling else None)
        if kind == "yarn":
            betas = {"beta_fast": 32.0, "beta_slow": 1.0}  # also where they are 0
            values |= {key: fields.number(key) if fields.get(key) else default for key, default in betas.items()}
            values["truncate"] = bool(scaling.get("truncate", True))
            amplitude = _yarn_amplitude(factor, fields)
        else:
            values |= {name: fields.numbers(name) for name in ("short_factor", "long_factor")}
            amplitude = math.sqrt(1 + math.log(factor) / math.log(max(original, 2.0))) if factor > 1 else 1.0
        values |= {"factor": factor, "original_max_position_embeddings": original}
        values["attention_factor"] = fields.number("attention_factor", amplitude)
    return RopeScaling(kind, **values)


def _yarn_amplitude(factor: float, fields: Metadata) -> float:
    """The factor of cos and sin (YaRN, arXiv:2309.00071, section 3.4; the two `mscale` are DeepSeek's)."""
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return (growth * fields.number("mscale") + 1) / (growth * fields.number("mscale_all_dim") + 1)
    return growth + 1


def check(source: str, spec: ModelSpec) -> ModelSpec:
    """Check the relations between sizes that every supported architecture relies on.  Raises UserError; returns `spec`."""
    if spec.num_heads % spec.num_kv_heads:
        raise UserError(f"{source}: {spec.num_heads} attention heads cannot be shared by {spec.num_kv_heads} KV heads.")
    rotated = spec.rotary_dim or spec.head_dim
    if rotated % 2 or rotated > spec.head_dim:
        raise UserError(f"{source}: {rotated} dimensions of a head of {spec.head_dim} (head_dim) cannot be rotated in pairs.")
    if spec.max_context > MAX_CONTEXT:
        raise UserError(
            f"{source}: its rope_scaling makes the context {spec.max_context} tokens; up to {MAX_CONTEXT} are served."
        )
    scaling = spec.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic" and rotated <= 2:
        raise UserError(f"{source}: dynamic rope_scaling needs heads of more than two dimensions.")
    if spec.rope_scaling is not None and spec.rope_scaling.rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            if (n := len(getattr(spec.rope_scaling, name))) != rotated // 2:
                raise UserError(f"{source}: {name} of rope_scaling has {n} entries, {rotated} dimensions need {rotated // 2}.")
    if spec.experts_per_token > spec.num_experts:
        raise UserError(f"{source}: {spec.experts_per_token} experts of each token, and there are {spec.num_experts}.")
    bad = [i for i in (*spec.eos_ids, *([] if spec.bos_id is None else [spec.bos_id])) if i >= spec.vocab_size]
    if bad:
        key = "bos_token_id" if bad[0] == spec.bos_id else "eos_token_id"
        raise UserError(f"{source}: special token {bad[0]} is outside the vocabulary of {spec.vocab_size} tokens ({key}).")
    return spec
