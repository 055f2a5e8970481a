"""Opens the weights of a checkpoint of any format; a rank reads the rows or columns that it owns.  Runs in the workers.

A model takes each tensor by its Hugging Face name and the shape it expects.  Files are memory-mapped, so the ranks of one
machine share the page cache.  Next to the tensors already taken, only a piece of one tensor is in private memory.
"""

from __future__ import annotations

import torch

from minisgl.config import ModelSpec
from minisgl.model.checkpoint.gguf_weights import GGUFWeights
from minisgl.model.checkpoint.random_weights import RandomWeights
from minisgl.model.checkpoint.safetensors_weights import SafetensorsWeights
from minisgl.model.checkpoint.weights import Weights

__all__ = ["Weights", "open_weights"]


def open_weights(spec: ModelSpec, dtype: torch.dtype, *, lazy: bool = False) -> Weights:
    """Open the checkpoint that `spec` was read from; tensors come out as `dtype`, on the CPU.

    Quantised tensors are dequantised to float32, then rounded to `dtype`.

    `lazy`: the matrices of the linear layers keep their stored form.  Floating-point ones keep their dtype; those in a block
    type of minisgl.model.checkpoint.gguf_blocks are shapes without data, from which the stored rows can be read later.
    """
    match spec.format:
        case "random":
            return RandomWeights(dtype, torch.device("cpu"))
        case "gguf":
            return GGUFWeights(spec, dtype, lazy)
    return SafetensorsWeights(spec, dtype, lazy)
