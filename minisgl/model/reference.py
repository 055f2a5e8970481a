"""The yardstick: the served checkpoint in Hugging Face transformers, on this CPU.  For `minisgl selfcheck` and the scripts.

A GGUF file goes through transformers' own reader, safetensors through `from_pretrained`.  Quantised safetensors are filled with
what our loader makes of them: their readers in transformers need a GPU or packages of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minisgl.config import Config, ModelSpec
from minisgl.errors import UserError
from minisgl.model.safetensors_weights import SafetensorsWeights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder, file = os.path.split(spec.path)
    config = AutoConfig.from_pretrained(folder, gguf_file=file, **local)
    config.head_dim = spec.head_dim  # which transformers does not read from these files
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(spec.path, return_tensors=True, model_to_load=skeleton)["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, extra = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    if extra or set(missing) - {"lm_head.weight"}:
        raise UserError(f"transformers reads {spec.path} otherwise: {', '.join([*missing, *extra][:5])} do not match.")
    model.tie_weights()
    return model.eval()


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
    """For the sequences that the probe has written in `folder`: "<prompt>.<dtype>.hidden" and ".logits", in float32 and in the
    dtype that is checked, which tells how much of a difference is rounding.
    """
    with safe_open(os.path.join(folder, "probe.safetensors"), framework="pt") as probe:
        tokens = [probe.get_tensor(f"{i}.tokens").tolist() for i in range(len(prompts))]
    model = load_transformers(config.model, config.engine.threads or len(os.sched_getaffinity(0)))
    out: dict[str, torch.Tensor] = {}
    for kind in dict.fromkeys(["float32", config.dtype]):
        for p in model.parameters():  # but no buffer: the frequencies of rotary positions are always float32
            p.data = p.data.to(_DTYPES[kind])
        for i, prompt in enumerate(prompts):
            hidden, logits = states(model, [*prompt, *tokens[i][:-1]])
            out |= {f"{i}.{kind}.hidden": hidden.contiguous(), f"{i}.{kind}.logits": logits.contiguous()}
    save_file(out, os.path.join(folder, "reference.safetensors"))
