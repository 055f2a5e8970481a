"""Weights of a checkpoint, one tensor at a time, only the rows or columns that a rank owns.  Runs in the workers.

A model asks for each tensor by its Hugging Face name and says which shape it expects; all formats answer alike.  Files are
memory-mapped, so ranks on one machine share the page cache and nobody holds a whole checkpoint in private memory; beside what
is handed out, only a piece of one tensor is in memory at a time.
"""

from __future__ import annotations

import torch

from minisgl.config import ModelSpec
from minisgl.model.checkpoint.gguf_weights import GGUFWeights
from minisgl.model.checkpoint.random_weights import RandomWeights
from minisgl.model.checkpoint.safetensors_weights import SafetensorsWeights
from minisgl.model.checkpoint.weights import Checkpoint


def open_weights(spec: ModelSpec, dtype: torch.dtype, *, lazy: bool = False) -> Checkpoint:
    """Open the checkpoint that `spec` was read from; tensors come out as `dtype`, on the CPU.

    Quantised ones are dequantised: to float32, then rounded to `dtype`.

    With `lazy`, the matrices of products come as they are stored: in another floating-point type, or as StoredWeights where the
    file has them in blocks of a kind of minisgl.model.common.gguf_blocks.
    """
    match spec.format:
        case "random":
            return RandomWeights(dtype, torch.device("cpu"))
        case "gguf":
            return GGUFWeights(spec, dtype, lazy)
    return SafetensorsWeights(spec, dtype, lazy)
