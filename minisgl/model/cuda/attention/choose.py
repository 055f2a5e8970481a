"""Chooses the attention backends of prefill and decode.  Runs in the workers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

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
