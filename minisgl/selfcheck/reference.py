"""Computes the reference of `minisgl selfcheck` and of the scripts: the checkpoint in Hugging Face transformers, on this CPU.

A GGUF file is read by transformers' own reader, safetensors by `from_pretrained`.  Quantised safetensors are dequantised by
minisgl's loader: their readers in transformers need a GPU or further packages.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any
from unittest import mock

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

_FUSED = re.compile(r"\b([qkv]|gate|up)_proj$")  # parts of one product in minisgl's models, all in the same bits


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
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder, file = os.path.split(spec.path)
    # transformers parses the file for the configuration and again for the tensors, and makes the table of names again for every
    # module: 9 of 14 s with the embedded model, more with more layers.
    cached: dict[str, Any] = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **cached):
        config = AutoConfig.from_pretrained(folder, gguf_file=file, **local)
        config.head_dim = spec.head_dim  # transformers does not read it from GGUF files
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


def round_weights(model: Any, spec: ModelSpec, layers: QuantizedLayers) -> dict[int, float]:
    """Round the weights of `model`'s linear layers as `layers` does, by the readable `quantise`.

    Returns the largest change of a matrix, |w' - w| / |w|, by the bits.
    """
    weights = open_weights(spec, torch.float32, lazy=True)
    found = {n: m for n, m in model.named_modules() if PRODUCT.fullmatch(f"{n}.weight")}
    products: dict[str, list[tuple[Any, Weight]]] = {}
    for name, module in found.items():
        stored = module.weight
        if spec.format == "gguf":  # it may be stored in these bits already
            tied = spec.tie_embeddings and name == "lm_head"
            stored = weights.take("model.embed_tokens.weight" if tied else f"{name}.weight", tuple(stored.shape))
        product = _FUSED.sub("", name)
        products.setdefault(product, []).append((module, stored))
    changed: dict[int, float] = {}
    for parts in products.values():
        bits = layers.bits([stored for _, stored in parts])
        for module, _ in (part for part in parts if stored_bits(part[1]) != bits):
            w = module.weight.detach()
            rounded = quantise(w, bits).values()[:, : w.shape[1]]
            changed[bits] = max(changed.get(bits, 0.0), float((rounded - w).norm() / w.norm()))
            module.weight = torch.nn.Parameter(rounded, requires_grad=False)  # a tied embedding keeps its own
    return changed


def _halve(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Round to the 11 bits of half precision, with any exponent."""
    mantissa, exponent = torch.frexp(args[0])
    return (torch.ldexp((mantissa * 2048).round() / 2048, exponent), *args[1:])


def states(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 hidden states before the first layer and after each [L + 1, S, C], and logits [S, V].

    transformers' own `hidden_states` end in the final norm.
    """
    seen: list[torch.Tensor] = []
    decoder = getattr(model.model, "language_model", model.model)  # next to a vision model
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].float().clone()))
        for module in (*decoder.layers, decoder.norm)
    ]
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    for hook in hooks:
        hook.remove()
    return torch.cat(seen), logits


def reference(folder: str, config: Config, prompts: Sequence[Sequence[int]]) -> None:
    """Write "<prompt>.<kind>.hidden" and ".logits" for the sequences that the probe has written in `folder`.

    The kinds are float32 and the dtype that is checked: their distance is the cost of rounding.  Where a CPU computes with
    rounded weights the further kinds are "rounded", float32 with the same weights, and "half", where the inputs of every
    product are also rounded to half precision: that costs about the same as the engine's two-byte activations and its
    cache in half precision.  "changed.<bits>" f32[1] is the result of `round_weights`.
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
        for p in model.parameters():  # no buffers: the frequencies of rotary positions are always float32
            p.data = p.data.to(getattr(torch, kind))
        keep(kind)
    if config.engine.device == "cpu":
        layers = CpuArithmetic.choose(config.engine, config.model, threads).layers
        if isinstance(layers, QuantizedLayers):  # then the dtype is float32
            changed = round_weights(model, config.model, layers)
            out |= {f"changed.{bits}": torch.tensor([most]) for bits, most in changed.items()}
            keep("rounded")
            for name, module in model.named_modules():
                if PRODUCT.fullmatch(f"{name}.weight"):
                    module.register_forward_pre_hook(_halve)
            keep("half")
    save_file(out, os.path.join(folder, "reference.safetensors"))
