"""Which attention backend does prefill and which decode, from --attention-backend and what this GPU can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minisgl.config import EngineConfig
from minisgl.errors import UserError
from minisgl.model.cuda.attention.base import AttentionSpec, Backend
from minisgl.model.cuda.attention.kv_cache import FP8


def find(name: str) -> type[Backend]:
    """The class of a backend.  The import of FlashInfer, which takes a second, is inside its module."""
    if name == "triton":
        from minisgl.model.cuda.attention.triton import TritonAttention

        return TritonAttention
    if name == "flashinfer":
        from minisgl.model.cuda.attention.flashinfer import FlashInferAttention

        return FlashInferAttention
    from minisgl.model.cuda.attention.torch import TorchReference

    return TorchReference


@dataclass(frozen=True, slots=True)
class Choice:
    """The backends of the two tasks, and a line for the user where a better one is missing."""

    prefill: str
    decode: str
    remark: str = ""


def choose(asked: str, heads: AttentionSpec, compile_flashinfer: Callable[[], None]) -> Choice:
    """The backends for `asked` (--attention-backend); "auto": FlashInfer for prefill where it can be had, Triton for the rest.

    `compile_flashinfer` makes FlashInfer's modules, if they are not there; it raises UserError where that cannot be done, and
    so does this if a backend was named that cannot do the work.
    """
    if asked != "auto":
        for task in ("prefill", "decode"):
            if (why := find(asked).refuses(heads, task)) is not None:
                raise UserError(f"--attention-backend {asked} cannot do {task} here: {why}. Use --attention-backend auto.")
        if asked == "flashinfer":
            compile_flashinfer()
        return Choice(asked, asked)
    why = find("flashinfer").refuses(heads, "prefill")
    if why is None:
        try:
            compile_flashinfer()
        except UserError as e:
            why = str(e)
    decode = "triton" if find("triton").refuses(heads, "decode") is None else "torch"
    if why is None:
        return Choice("flashinfer", decode)
    name = {"triton": "our Triton kernels", "torch": "plain torch, slowly"}[decode]
    return Choice(decode, decode, f"attention runs on {name}; prefill without FlashInfer, because {why}")


def check_float8(
    engine: EngineConfig, dtype: torch.dtype, capability: int, widths: Sequence[int] = (), *, experts: int = 0
) -> None:
    """Raises UserError where float8 was asked for and the GPU, or its library, cannot do it.

    `widths`: rows and columns of this rank's linear layers; `experts`: of each of the model's layers.
    """
    for flag, wanted in (
        (f"--quantization {engine.quantization}", engine.quantization == "fp8"),
        (f"--kv-cache-dtype {engine.kv_cache_dtype}", engine.kv_cache_dtype == "fp8"),
    ):
        if wanted and capability < 89:
            raise UserError(
                f"{flag}: this GPU has compute capability {capability / 10:.1f}, float8 needs 8.9 or newer. Leave the flag out."
            )
    if engine.quantization == "fp8" and dtype != torch.bfloat16:
        raise UserError(f"--quantization fp8 multiplies into bfloat16, and the model runs in {dtype}. Add --dtype bfloat16.")
    if engine.quantization == "fp8" and experts:
        raise UserError("--quantization fp8: the experts of a mixture of experts have no float8 kernel. Leave the flag out.")
    uneven = [width for width in widths if width % 16]
    if engine.quantization == "fp8" and uneven:
        raise UserError(
            f"--quantization fp8 needs layers whose sizes are multiples of 16, and with --tp {engine.tp} a rank has one of "
            f"{uneven[0]}. Use another --tp, or leave --quantization out."
        )


def kv_dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """--kv-cache-dtype: "auto" is the model's own."""
    return FP8 if name == "fp8" else dtype
