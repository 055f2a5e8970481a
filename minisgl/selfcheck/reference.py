"""The yardstick: the served checkpoint in Hugging Face transformers, on this CPU.  For `minisgl selfcheck` and the scripts.

A GGUF file goes through transformers' own reader, safetensors through `from_pretrained`.  Quantised safetensors are filled with
what our loader makes of them: their readers in transformers need a GPU or packages of their own.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minisgl.config import Config, ModelSpec
from minisgl.errors import UserError
from minisgl.model.checkpoint.loader import open_weights
from minisgl.model.checkpoint.safetensors_weights import PRODUCT, SafetensorsWeights
from minisgl.model.common.gguf_blocks import stored_bits
from minisgl.model.common.host import usable_cores
from minisgl.model.common.weights import Weight
from minisgl.model.cpu.backend import CpuArithmetic
from minisgl.model.cpu.packing import quantise
from minisgl.model.cpu.quantized_layers import QuantizedLayers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOGETHER = re.compile(r"\b([qkv]|gate|up)_proj$")  # what our models compute in one product, all of it in the same bits


def load_transformers(spec: ModelSpec, threads: int) -> Any:
    """The checkpoint as a float32 model of transformers in eval mode."""
    import transformers

    torch.set_num_threads(threads)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if spec.format == "random":
        raise UserError("random weights have no reference: name a checkpoint with --model")
    if spec.format == "gguf":
        return _from_gguf(spec, local)
    config = transformers.AutoConfig.from_pretrained(spec.path, **local, experts_implementation="eager")
    source: dict[str, Any] = {"pretrained_model_name_or_path": spec.path, **local}
    if spec.weight_format:
        del config.quantization_config
        weights = SafetensorsWeights(spec, torch.float32)
        tensors = {name: weights.take(name, shape) for name, shape in weights.shapes().items()}
        source = {"pretrained_model_name_or_path": None, "state_dict": tensors, **local}
    model, report = getattr(transformers, spec.architecture).from_pretrained(
        **source, config=config, dtype=torch.float32, output_loading_info=True
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UserError(f"transformers reads {spec.path} otherwise: {', '.join(map(str, wrong[:5]))} do not match.")
    return model.eval()


def _from_gguf(spec: ModelSpec, local: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder, file = os.path.split(spec.path)
    with _read_once():
        config = AutoConfig.from_pretrained(folder, gguf_file=file, **local)
        config.head_dim = spec.head_dim  # which transformers does not read from these files
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(spec.path, return_tensors=True, model_to_load=skeleton)["tensors"]
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, extra = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    if extra or set(missing) - {"lm_head.weight"}:
        raise UserError(f"transformers reads {spec.path} otherwise: {', '.join([*missing, *extra][:5])} do not match.")
    model.tie_weights()
    return model.eval()


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses a GGUF file for the configuration and once more for the tensors, and has gguf make its table of names
    anew for every module: 9 of 14 s with the embedded model, more with more layers.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    plain = [getattr(gguf, name) for name in names]
    try:
        for name, made in zip(names, plain, strict=True):
            setattr(gguf, name, functools.cache(made))
        yield
    finally:
        for name, made in zip(names, plain, strict=True):
            setattr(gguf, name, made)


def round_weights(model: Any, spec: ModelSpec, layers: QuantizedLayers) -> dict[int, float]:
    """Give the products of `model` the weights that `layers` makes of theirs, by the readable `quantise`.

    Returns what that changes, by the bits rounded to: the largest |w' - w| / |w| of a matrix.
    """
    weights = open_weights(spec, torch.float32, lazy=True)
    found = {n: m for n, m in model.named_modules() if PRODUCT.fullmatch(f"{n}.weight")}
    products: dict[str, list[tuple[Any, Weight]]] = {}
    for name, module in found.items():
        stored = module.weight
        if spec.format == "gguf":  # which may have these bits already
            tied = spec.tie_embeddings and name == "lm_head"
            stored = weights.take("model.embed_tokens.weight" if tied else f"{name}.weight", tuple(stored.shape))
        product = _TOGETHER.sub("", name)
        products.setdefault(product, []).append((module, stored))
    changed: dict[int, float] = {}
    for parts in products.values():
        bits = layers.bits([stored for _, stored in parts])
        for module, _ in (part for part in parts if stored_bits(part[1]) != bits):
            w = module.weight.detach()
            rounded = quantise(w, bits).values()[:, : w.shape[1]]
            changed[bits] = max(changed.get(bits, 0.0), float((rounded - w).norm() / w.norm()))
            module.weight = torch.nn.Parameter(rounded, requires_grad=False)  # the table that it may be tied to stays
    return changed


def _halve(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The 11 bits of half precision, whatever the exponent."""
    mantissa, exponent = torch.frexp(args[0])
    return (torch.ldexp((mantissa * 2048).round() / 2048, exponent), *args[1:])


def states(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """f32: before the first layer and after each [L + 1, S, C], and logits [S, V].  (Its own hidden_states end in the norm.)"""
    seen: list[torch.Tensor] = []
    layers = getattr(model.model, "language_model", model.model).layers  # beside one that sees
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].float().clone()))]
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(
                lambda _, args, out: seen.append((out[0] if isinstance(out, tuple) else out).float().clone())
            )
        )
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    for hook in hooks:
        hook.remove()
    return torch.cat(seen), logits


def reference(folder: str, config: Config, prompts: Sequence[Sequence[int]]) -> None:
    """For the sequences that the probe has written in `folder`: "<prompt>.<kind>.hidden" and ".logits", in float32 and in the
    dtype that is checked, which tells how much of a difference is rounding.

    Where a CPU computes with rounded weights the further kinds are "rounded", float32 with the same weights, and "half", in
    which the rows of every product are also rounded to half precision: that costs about what the engine's activations of two
    bytes and cache in half precision do.  "changed.<bits>" f32[1] is what `round_weights` returns.
    """
    with safe_open(os.path.join(folder, "probe.safetensors"), framework="pt") as probe:
        tokens = [probe.get_tensor(f"{i}.tokens").tolist() for i in range(len(prompts))]
    threads = config.engine.threads or usable_cores()
    model = load_transformers(config.model, threads)
    out: dict[str, torch.Tensor] = {}

    def keep(kind: str) -> None:
        for i, prompt in enumerate(prompts):
            hidden, logits = states(model, [*prompt, *tokens[i][:-1]])
            out.update({f"{i}.{kind}.hidden": hidden.contiguous(), f"{i}.{kind}.logits": logits.contiguous()})

    for kind in dict.fromkeys(["float32", config.dtype]):
        for p in model.parameters():  # but no buffer: the frequencies of rotary positions are always float32
            p.data = p.data.to(_DTYPES[kind])
        keep(kind)
    if config.engine.device == "cpu":
        layers = CpuArithmetic.choose(config.engine, config.model, threads).layers
        if isinstance(layers, QuantizedLayers):  # then the dtype is float32
            changed = round_weights(model, config.model, layers)
            out |= {f"changed.{bits}": torch.tensor([most]) for bits, most in changed.items()}
            if changed:
                keep("rounded")
            else:
                out |= {name.replace(".float32.", ".rounded."): t.clone() for name, t in out.items() if ".float32." in name}
            for name, module in model.named_modules():
                if PRODUCT.fullmatch(f"{name}.weight"):
                    module.register_forward_pre_hook(_halve)
            keep("half")
    save_file(out, os.path.join(folder, "reference.safetensors"))
