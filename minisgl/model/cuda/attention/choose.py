"""Chooses the attention backends of prefill and decode, and checks what the flags demand of the GPU.  Runs in the workers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minisgl.config import EngineConfig
from minisgl.errors import UserError
from minisgl.model.cuda.attention.base import AttentionSpec, Backend

_CLASSES = {"triton": "TritonAttention", "flashinfer": "FlashInferAttention", "torch": "TorchReference"}


@dataclass(frozen=True, slots=True)
class Choice:
    """The names of the two backends; `remark`: a line for the user where a better one is missing."""

    prefill: str
    decode: str
    remark: str = ""


def choose(name: str, heads: AttentionSpec, compile_flashinfer: Callable[[], None]) -> Choice:
    """The backends for --attention-backend `name`; "auto": FlashInfer for prefill where it is available, Triton for the rest.

    `compile_flashinfer` makes FlashInfer's modules if they are missing; it raises UserError where that is impossible.  Raises
    UserError if the named backend cannot do the work.
    """
    if name != "auto":
        for task in ("prefill", "decode"):
            if (why := find(name).refuses(heads, task)) is not None:
                raise UserError(f"--attention-backend {name} cannot do {task} here: {why}. Use --attention-backend auto.")
        if name == "flashinfer":
            compile_flashinfer()
        return Choice(name, name)
    why = find("flashinfer").refuses(heads, "prefill")
    if why is None:
        try:
            compile_flashinfer()
        except UserError as e:
            why = str(e)
    decode = "triton" if find("triton").refuses(heads, "decode") is None else "torch"
    if why is None:
        return Choice("flashinfer", decode)
    kernels = {"triton": "our Triton kernels", "torch": "plain torch, slowly"}[decode]
    return Choice(decode, decode, f"attention runs on {kernels}; prefill without FlashInfer, because {why}")


def find(name: str) -> type[Backend]:
    """The class of a backend.  Importing FlashInfer takes a second, so only its backend does it, when it is constructed."""
    found: type[Backend] = getattr(importlib.import_module(f"minisgl.model.cuda.attention.{name}"), _CLASSES[name])
    return found


def check_float8(
    engine: EngineConfig, dtype: torch.dtype, capability: int, widths: Sequence[int] = (), *, experts: int = 0
) -> None:
    """Raises UserError where a flag demands float8 and the GPU, or its library, cannot compute it.

    `widths`: rows and columns of this rank's linear layers; `experts`: experts in each of the model's layers.
    """
    for flag, value in (("--quantization", engine.quantization), ("--kv-cache-dtype", engine.kv_cache_dtype)):
        if value == "fp8" and capability < 89:
            has = f"this GPU has compute capability {capability / 10:.1f}, float8 needs 8.9 or newer"
            raise UserError(f"{flag} fp8: {has}. Leave the flag out.")
    if engine.quantization != "fp8":
        return
    if dtype != torch.bfloat16:
        raise UserError(f"--quantization fp8 multiplies into bfloat16, and the model runs in {dtype}. Add --dtype bfloat16.")
    if experts:
        raise UserError("--quantization fp8: the experts of a mixture of experts have no float8 kernel. Leave the flag out.")
    uneven = [width for width in widths if width % 16]
    if uneven:
        raise UserError(
            f"--quantization fp8 needs layers whose sizes are multiples of 16, and with --tp {engine.tp} a rank has one of "
            f"{uneven[0]}. Use another --tp, or leave --quantization out."
        )
