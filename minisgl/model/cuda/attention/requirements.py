"""Says what a GPU, or a model on it, must have for each faster path.  No torch: `minisgl doctor` and `minisgl fit` ask, too."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from minisgl.config import EngineConfig
from minisgl.errors import UserError
from minisgl.model.cuda.flashinfer.modules import HEAD_DIMS

FLOAT8_CAPABILITY = 89
WORKSPACE_BYTES = 256 << 20  # of FlashInfer, for partial results; all wrappers share it (one stream, one after the other)
WIDENED_BYTES = 512 << 20  # the scratch cache of one layer: 131,072 tokens of 8 heads of 128


def flashinfer_lacks(head_dim: int, dtype: str, capability: int, *, sinks: bool, installed: bool | None = None) -> str | None:
    """Why FlashInfer's kernels cannot attend here; None if they can.  installed: None to look."""
    if capability < 80:
        return "it needs compute capability 8.0 or newer"
    if dtype == "float32":
        return "it has no kernels for float32"
    if sinks:
        return "its kernels are used without attention sinks"
    if head_dim not in HEAD_DIMS:
        return f"it has no kernels for a head size of {head_dim}"
    if installed is False or (installed is None and importlib.util.find_spec("flashinfer") is None):
        return "the package flashinfer-python is not installed"
    return None


def triton_lacks(head_dim: int, capability: int) -> str | None:
    """The same for our own kernels."""
    if head_dim > 256:
        return f"a head size of {head_dim} is above 256"
    return None if capability >= 80 else "it needs compute capability 8.0 or newer"


def check_float8(engine: EngineConfig, dtype: str, capability: int, widths: Sequence[int] = ()) -> None:
    """Raises UserError where a flag demands float8 and the GPU, or its library, cannot compute it.

    `widths`: rows and columns of this rank's linear layers.
    """
    for flag, value in (("--quantization", engine.quantization), ("--kv-cache-dtype", engine.kv_cache_dtype)):
        if value == "fp8" and capability < FLOAT8_CAPABILITY:
            has = f"this GPU has compute capability {capability / 10:.1f}, float8 needs 8.9 or newer"
            raise UserError(f"{flag} fp8: {has}. Leave the flag out.")
    if engine.quantization != "fp8":
        return
    if dtype != "bfloat16":
        raise UserError(f"--quantization fp8 multiplies into bfloat16, and the model runs in {dtype}. Add --dtype bfloat16.")
    uneven = [width for width in widths if width % 16]
    if uneven:
        raise UserError(
            f"--quantization fp8 needs layers whose sizes are multiples of 16, and with --tp {engine.tp} a rank has one of "
            f"{uneven[0]}. Use another --tp, or leave --quantization out."
        )
