"""Builds the ModelSpec of a directory in Hugging Face's layout: config.json next to safetensors.  No torch, no transformers."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.files import INDEX, MAX_HEADER, is_id, read_json, weight_files
from minisgl.model.checkpoint.hf_layers import (
    activation,
    attention,
    experts,
    nope_layers,
    refuse_other_models,
    text_part,
    windows,
)
from minisgl.model.checkpoint.hf_rope import positions
from minisgl.model.checkpoint.metadata import HF_SAMPLING, Metadata, check, sampling_defaults
from minisgl.model.checkpoint.quant_spec import weight_format
from minisgl.model.common.registry import HF_ARCHS, Arch

DTYPES = ("float32", "float16", "bfloat16")
_HEAD = re.compile(r'lm_head\.(weight|qweight|weight_packed)"')
_PART = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def spec_from_directory(path: str, name: str | None = None, *, weights: bool = True) -> ModelSpec:
    """Read the JSON files of a checkpoint.  Raises UserError if it is incomplete or cannot be served faithfully.

    `weights=False`: the weight files may be absent.
    """
    source = os.path.join(path, "config.json")
    if not os.path.isfile(source):
        raise UserError(f"--model {path}: {_no_config(path)}")
    config = Metadata(source, read_json(source))
    archs = config.get("architectures")
    arch = archs[0] if isinstance(archs, list) and archs else None
    if not isinstance(arch, str) or arch not in HF_ARCHS:
        code = "Python code in the checkpoint (auto_map), which is never run" if config.get("auto_map") else "not supported"
        raise UserError(f"{source}: architecture {arch!r:.80} is {code}. Supported: {', '.join(HF_ARCHS)}.")
    if weights:
        _check_weights(path)
    return check(source, _spec(path, name, config, arch))


def _spec(path: str, name: str | None, outer: Metadata, architecture: str) -> ModelSpec:
    """`outer`: the full config.json; the keys of the decoder may be an object inside it."""
    arch = HF_ARCHS[architecture]
    config = text_part(outer, arch)
    refuse_other_models(config)
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers")
    head_dim = config.size("head_dim", hidden // heads if arch.head_dim == 0 else None)
    rope = positions(config, arch, head_dim)
    name = name or os.path.basename(os.path.normpath(path))
    return ModelSpec(
        name=name,
        path=path,
        format="safetensors",
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=config.size("vocab_size"),
        rms_norm_eps=config.number("rms_norm_eps", arch.rms_norm_eps),
        activation=activation(config, arch),
        **_generation(path, outer, config, name),
        **_storage(path, outer, config, arch),
        **rope,
        nope_layers=nope_layers(config, arch, layers),
        windows=windows(config, arch, layers, rope["max_context"]),
        **attention(config, arch),
        **experts(config, arch, layers),
    )


def _generation(path: str, outer: Metadata, config: Metadata, name: str) -> dict[str, Any]:
    """The fields of ModelSpec for special tokens and sampling.

    Every id that ends a text: generation_config.json first, then config.json, then the tokenizer's own EOS.
    """
    file = os.path.join(path, "generation_config.json")
    generation = Metadata(file, read_json(file, optional=True))
    key = "eos_token_id"
    eos = (*generation.token_ids(key), *outer.token_ids(key), *_tokenizer_eos(path), *config.token_ids(key))
    return {
        "bos_id": next(iter(config.token_ids("bos_token_id")), None),
        "eos_ids": tuple(dict.fromkeys(eos)),
        "generation": sampling_defaults(generation, HF_SAMPLING, model=(name,)),
    }


def _storage(path: str, outer: Metadata, config: Metadata, arch: Arch) -> dict[str, Any]:
    """The fields of ModelSpec for the way in which the weights are stored."""
    quantization = outer.get("quantization_config")
    declared = config.get("quantization_config")
    mxfp4 = arch.sinks and isinstance(declared, dict) and declared.get("quant_method") == "mxfp4"
    return {
        "dtype": _dtype(config if config.get("dtype") or config.get("torch_dtype") else outer),
        "tie_embeddings": outer.flag("tie_word_embeddings", arch.tied or bool(arch.text)) and not _has_head(path),
        "weight_format": None if mxfp4 else weight_format(outer.source, quantization),
        "expert_format": "mxfp4" if mxfp4 else "",
        "weight_prefix": "language_model." if arch.text else "",
    }


def _has_head(path: str) -> bool:
    """Whether a checkpoint has an lm_head.  It is used whatever the configuration says, which is wrong where they differ."""
    index = os.path.join(path, INDEX)
    if os.path.isfile(index):
        return any(_HEAD.search(f'{name}"') for name in read_json(index).get("weight_map") or ())
    for file in filter(os.path.isfile, weight_files(path)):
        with open(file, "rb") as f:  # a header of JSON behind its length, 8 bytes
            size = int.from_bytes(f.read(8), "little")
            if _HEAD.search(f.read(min(size, MAX_HEADER, os.path.getsize(file))).decode(errors="replace")):
                return True
    return False


def _dtype(config: Metadata) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    if value not in DTYPES:
        raise UserError(f"{config.source}: dtype {value!r:.80} is not supported (known: {', '.join(DTYPES)}).")
    return str(value)


def _no_config(path: str) -> str:
    ggufs = sorted(glob.glob("*.gguf", root_dir=path))
    if not ggufs:
        return "the directory has no config.json, so it is no Hugging Face model. Check the path."
    file = os.path.join(path, ggufs[0])
    return f"the directory has no config.json. For a GGUF model give the file itself: --model {file}"


def _check_weights(path: str) -> None:
    files = weight_files(path)
    absent = [os.path.basename(f) for f in files if not os.path.isfile(f)]
    if absent:
        raise UserError(
            f"--model {path}: {len(absent)} of the {len(files)} files that its index names are missing ({absent[0]:.80}). "
            "Is the download complete?"
        )
    if files:
        parts = [match for match in map(_PART.search, files) if match]
        if parts and len(parts) < (total := int(parts[0][2])):
            raise UserError(
                f"--model {path}: {total - len(parts)} of its {total} weight files are missing. Is the download complete?"
            )
        return
    pickles = sorted(f for ext in ("*.bin", "*.pt", "*.pth") for f in glob.glob(ext, root_dir=path))
    if pickles:
        raise UserError(
            f"--model {path}: its weights are pickles ({pickles[0]}), which can run code when they are loaded; "
            "only safetensors are read. Convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)."
        )
    raise UserError(f"--model {path}: the directory has a config.json but no *.safetensors file.")


def _tokenizer_eos(path: str) -> list[int]:
    """The tokenizer names its EOS by text; the id is among the added tokens of either of two files."""
    tokenizer = read_json(path, "tokenizer_config.json", optional=True)
    eos = tokenizer.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(text, str):
        return []
    added = tokenizer.get("added_tokens_decoder")
    if isinstance(added, dict):
        return [int(i) for i, t in added.items() if is_id(i) and isinstance(t, dict) and t.get("content") == text]
    tokens = read_json(path, "tokenizer.json", optional=True).get("added_tokens")
    entries = [t for t in tokens if isinstance(t, dict)] if isinstance(tokens, list) else []
    return [t["id"] for t in entries if t.get("content") == text and type(t.get("id")) is int and t["id"] >= 0]
