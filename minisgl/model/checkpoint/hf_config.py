"""ModelSpec of a directory in Hugging Face's layout: config.json beside safetensors.  No torch, no transformers."""

from __future__ import annotations

import glob
import os

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.files import INDEX, read_json, weight_files
from minisgl.model.checkpoint.hf_layers import (
    activation,
    attention_scale,
    experts,
    nope_layers,
    optional,
    rotary,
    text_part,
    windows,
)
from minisgl.model.checkpoint.metadata import HF_SAMPLING, Metadata, check, sampling_defaults
from minisgl.model.checkpoint.quant_spec import weight_format
from minisgl.model.common.registry import HF_ARCHS

DTYPES = ("float32", "float16", "bfloat16")


def spec_from_directory(path: str, name: str | None = None, *, weights: bool = True) -> ModelSpec:
    """Read the JSON files of a checkpoint.  Raises UserError if it is incomplete or cannot be served faithfully.

    `weights=False`: they need not be there yet.
    """
    source = os.path.join(path, "config.json")
    if not os.path.isfile(source):
        raise UserError(f"--model {path}: {_no_config(path)}")
    config = Metadata(source, read_json(source))
    archs = config.get("architectures")
    arch = archs[0] if isinstance(archs, list) and archs else None
    if arch not in HF_ARCHS:
        if config.get("auto_map"):
            raise UserError(
                f"{source}: architecture {arch!r:.80} is Python code in the checkpoint (auto_map), which is never run. "
                f"Supported: {', '.join(HF_ARCHS)}."
            )
        raise UserError(f"{source}: architecture {arch!r:.80} is not supported. Supported: {', '.join(HF_ARCHS)}.")
    if weights:
        _check_weights(path)
    return check(source, _spec(path, name, config, arch))


def _spec(path: str, name: str | None, outer: Metadata, architecture: str) -> ModelSpec:
    arch = HF_ARCHS[architecture]
    config = text_part(outer, arch)
    config.refuse("mlp_bias", (False,), "biases in the MLP layers are")
    quantization = config.get("quantization_config")
    mxfp4 = arch.sinks and isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers, context = config.size("num_hidden_layers"), config.size("max_position_embeddings")
    head_dim = config.size("head_dim", hidden // heads if arch.head_dim == 0 else arch.head_dim)
    rope = rotary(config, arch, context)
    bias = config.flag("attention_bias")
    file = os.path.join(path, "generation_config.json")
    generation = Metadata(file, read_json(file) if os.path.isfile(file) else {})
    # Every id that ends a text: generation_config.json first, then config.json, then the tokenizer's own EOS.
    eos = (
        generation.token_ids("eos_token_id"),
        outer.token_ids("eos_token_id"),
        _tokenizer_eos(path),
        config.token_ids("eos_token_id"),
    )
    return ModelSpec(
        name=name or os.path.basename(os.path.normpath(path)),
        path=path,
        format="safetensors",
        architecture=architecture,
        dtype=_dtype(config if config.get("dtype") or config.get("torch_dtype") else outer),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=config.size("vocab_size"),
        max_context=rope.max_context,
        rms_norm_eps=config.number("rms_norm_eps", arch.rms_norm_eps),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        tie_embeddings=not _has_head(path) if arch.text else config.flag("tie_word_embeddings", arch.tied),
        bos_id=next(iter(config.token_ids("bos_token_id")), None),
        eos_ids=tuple(dict.fromkeys(i for ids in eos for i in ids)),
        generation=sampling_defaults(generation, HF_SAMPLING),
        weight_format="" if mxfp4 else weight_format(outer.source, outer.get("quantization_config")),
        qk_norm=arch.qk_norm,
        qkv_bias=arch.qkv_bias or bias,
        o_bias=bias,
        activation=activation(config, arch),
        rotary_dim=int(head_dim * rope.part) if rope.part < 1 else 0,
        local_rope_theta=rope.local_theta,
        nope_layers=nope_layers(config, arch, layers),
        windows=windows(config, arch, layers, rope.max_context),
        attn_scale=attention_scale(config, arch),
        attn_softcap=optional(config, "attn_logit_softcapping", arch.attn_softcap),
        logit_softcap=optional(config, "final_logit_softcapping", arch.logit_softcap),
        sinks=arch.sinks,
        expert_format="mxfp4" if mxfp4 else "",
        weight_prefix="language_model." if arch.text else "",
        **experts(config, arch, layers),
    )


def _has_head(path: str) -> bool:
    """Whether a checkpoint with images has an lm_head, about which its two configurations may disagree."""
    index = os.path.join(path, INDEX)
    if os.path.isfile(index):
        return any(str(name).endswith("lm_head.weight") for name in read_json(index).get("weight_map") or ())
    for file in weight_files(path):
        with open(file, "rb") as f:  # a header of JSON behind its length, 8 bytes
            if b'lm_head.weight"' in f.read(min(int.from_bytes(f.read(8), "little"), 1 << 27)):
                return True
    return False


def _dtype(config: Metadata) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    if value not in DTYPES:
        raise UserError(f"{config.source}: dtype {value!r:.80} is not supported (known: {', '.join(DTYPES)}).")
    return str(value)


def _no_config(path: str) -> str:
    ggufs = sorted(glob.glob("*.gguf", root_dir=path))
    if ggufs:
        return (
            f"the directory has no config.json. For a GGUF model give the file itself: --model {os.path.join(path, ggufs[0])}"
        )
    return "the directory has no config.json, so it is no Hugging Face model. Check the path."


def _check_weights(path: str) -> None:
    files = weight_files(path)
    absent = [os.path.basename(f) for f in files if not os.path.isfile(f)]
    if absent:
        raise UserError(
            f"--model {path}: {len(absent)} of the {len(files)} files that its index names are missing ({absent[0]}). "
            "Is the download complete?"
        )
    if files:
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
    """The tokenizer names its EOS by text; its id is among the added tokens of one file or the other."""
    source = os.path.join(path, "tokenizer_config.json")
    if not os.path.isfile(source):
        return []
    tokenizer = read_json(source)
    eos = tokenizer.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(text, str):
        return []
    added = tokenizer.get("added_tokens_decoder")
    if isinstance(added, dict):
        return [int(i) for i, t in added.items() if i.isdigit() and isinstance(t, dict) and t.get("content") == text]
    vocabulary = os.path.join(path, "tokenizer.json")
    tokens = read_json(vocabulary).get("added_tokens") if os.path.isfile(vocabulary) else None
    entries = [t for t in tokens if isinstance(t, dict)] if isinstance(tokens, list) else []
    return [t["id"] for t in entries if t.get("content") == text and isinstance(t.get("id"), int)]
