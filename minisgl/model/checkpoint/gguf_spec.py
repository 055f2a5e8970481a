"""Builds the ModelSpec of a GGUF file from its metadata.  No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from minisgl.config import ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.gguf_file import GGUFFile
from minisgl.model.checkpoint.gguf_rope import refuse_others, rope_scaling_of
from minisgl.model.checkpoint.gguf_vocabulary import read_vocabulary
from minisgl.model.checkpoint.metadata import GGUF_SAMPLING, Metadata, check, sampling_defaults, shown
from minisgl.model.common.registry import GGUF_ARCHS, HF_ARCHS

_QUANT_SUFFIX = re.compile(r"[-._](I?Q\d\w*|T?Q\d_\w+|MXFP4\w*|BF16|F16|FP16|F32|FP32)$", re.IGNORECASE)
_F32, _F16 = 0, 1  # ggml types
_NAMES = {  # part of a model -> the file's tensor, without its layer
    **{f"{part}_proj": f"attn_{part}.weight" for part in "qkv"},
    "o_proj": "attn_output.weight",
    **{f"{part}_proj": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    "embed_tokens": "token_embd.weight",
    "lm_head": "output.weight",
}


def served_name(path: str) -> str:
    """The file's name without extension, part and quantisation: "SmolLM2-135M-Instruct.Q4_1.gguf" -> the model's name."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", os.path.basename(path).removesuffix(".gguf"))
    return _QUANT_SUFFIX.sub("", stem) or stem


def stored_types(spec: ModelSpec) -> Callable[[int, str], int]:
    """(layer, part) -> ggml's number of the type in which the file of `spec` has it; -1 without such a file."""
    tensors = GGUFFile(spec.path).tensors if spec.format == "gguf" else {}

    def kind(layer: int, part: str) -> int:
        found = tensors.get(_NAMES[part] if layer < 0 else f"blk.{layer}.{_NAMES[part]}")
        return -1 if found is None else found.kind

    return kind


def spec_from_gguf(path: str) -> ModelSpec:
    """Read the metadata of one file.  Raises UserError if it is damaged or describes a model that cannot be served."""
    file = GGUFFile(path)
    fields = Metadata(path, file.fields)
    arch = fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHS:
        known = ", ".join(GGUF_ARCHS)
        raise UserError(
            f"--model {path}: general.architecture {shown(arch)} is not supported. Supported in GGUF files: {known}."
        )
    fields.refuse(f"{arch}.expert_count", (0,), "mixtures of experts are")
    fields.refuse(f"{arch}.attention.sliding_window", (0,), "sliding-window attention is")

    hidden = fields.size(f"{arch}.embedding_length")
    heads = fields.size(f"{arch}.attention.head_count")
    layers = fields.size(f"{arch}.block_count")
    head_dim = fields.size(f"{arch}.attention.key_length", hidden // heads)
    fields.refuse(f"{arch}.attention.value_length", (head_dim,), "values of another size than the keys are")
    fields.refuse(f"{arch}.rope.dimension_count", (head_dim,), f"rotating only a part of a head of {head_dim} dimensions is")
    refuse_others(fields, arch, head_dim)
    for tensor in ("token_embd.weight", f"blk.{layers - 1}.attn_q.weight"):
        if tensor not in file.tensors:
            raise UserError(f"--model {path}: tensor {tensor} is missing.")
    embedding = file.tensors["token_embd.weight"]
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise UserError(f"--model {path}: token_embd.weight has shape {embedding.shape}, expected (vocabulary, {hidden}).")

    vocabulary = read_vocabulary(fields)
    names = (served_name(path), fields.get("general.basename"), fields.get("general.name"))
    spec = ModelSpec(
        name=served_name(path),
        path=path,
        format="gguf",
        architecture=GGUF_ARCHS[arch],
        dtype=_dtype(file),
        hidden_size=hidden,
        intermediate_size=fields.size(f"{arch}.feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.size(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_context=fields.size(f"{arch}.context_length"),
        rms_norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number(f"{arch}.rope.freq_base", 10000.0),
        rope_scaling=rope_scaling_of(file, fields, arch, head_dim),
        tie_embeddings="output.weight" not in file.tensors,
        bos_id=vocabulary.bos,
        eos_ids=vocabulary.ends,
        generation=sampling_defaults(fields, GGUF_SAMPLING, "general.sampling.", names),
        qk_norm=HF_ARCHS[GGUF_ARCHS[arch]].qk_norm,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,  # also in files of the llama architecture
        o_bias="blk.0.attn_output.bias" in file.tensors,
    )
    return check(path, spec)


def _dtype(file: GGUFFile) -> str:
    """The dtype that a GPU computes in: that of plain matrices; bfloat16 for quantised ones.

    No activation leaves bfloat16's range, and its rounding of the weights is finer than that of the blocks.
    """
    kinds = {t.kind for t in file.tensors.values() if len(t.shape) > 1}
    return "float32" if kinds == {_F32} else "float16" if kinds <= {_F32, _F16} else "bfloat16"
