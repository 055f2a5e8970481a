"""Chooses the arithmetic of a CPU worker, by the flags and by what this machine can run.  Runs in the workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minisgl.config import EngineConfig, ModelSpec
from minisgl.model.common.memory import can_attend
from minisgl.model.common.shard import Shard
from minisgl.model.cpu.attention import TorchAttention
from minisgl.model.cpu.attention_c import KV_DTYPE, KernelAttention
from minisgl.model.cpu.build import NoKernels
from minisgl.model.cpu.kernels import Kernels
from minisgl.model.cpu.layers import CpuLayers
from minisgl.model.cpu.quantized_layers import QuantizedLayers

_WEIGHTS = {
    "int8": "8 bits",
    "q4": "4 bits, the table of tokens and the head in 8",
    "auto": "the 4 bits of a file that has them, 8 bits for the rest",
}


@dataclass(frozen=True, slots=True)
class CpuArithmetic:
    """The layers and the attention of a worker.  text: a description for the user."""

    dtype: torch.dtype  # of the weights as they are opened, and of the residual stream
    kv_dtype: torch.dtype
    layers: CpuLayers
    run: Kernels | None  # for attention; None: torch
    text: str
    torch_threads: int  # 1 next to C kernels, which leave torch too little work to share

    @classmethod
    def choose(cls, engine: EngineConfig, spec: ModelSpec, threads: int) -> CpuArithmetic:
        """Quantised layers for "auto" without a dtype, or for a kind of quantisation.  Builds the C kernels for them.

        Where they cannot be built, "auto" is float32, which is faster in torch, and a kind is computed in torch.
        """
        kind, dtype = engine.quantization, getattr(torch, "float32" if engine.dtype == "auto" else engine.dtype)
        plain = f"weights in {str(dtype).removeprefix('torch.')}, torch"
        if not engine.eight_bits:
            return cls(dtype, dtype, CpuLayers(dtype), None, plain, threads)
        text = f"weights in {_WEIGHTS[kind]}, " + "experts in float32, " * (spec.num_experts > 0)
        try:
            run = Kernels(threads)
        except NoKernels as e:
            slower = f", several times slower than 8 bits on C kernels: {e}"
            if kind == "auto":
                return cls(dtype, dtype, CpuLayers(dtype), None, plain + slower, threads)
            return cls(torch.float32, torch.float32, QuantizedLayers(kind, None), None, f"{text}in torch{slower}", threads)
        layers = QuantizedLayers(kind, run)
        if not can_attend(spec, engine.page_size):
            text += "C kernels, but attention in torch: its kernel needs heads and pages that are multiples of 16"
            return cls(torch.float32, torch.float32, layers, None, text, threads)
        return cls(torch.float32, KV_DTYPE, layers, run, text + "C kernels", threads if spec.num_experts else 1)

    @property
    def lazy(self) -> bool:
        """Whether the layers take matrices as they are stored, see `open_weights`."""
        return isinstance(self.layers, QuantizedLayers)

    def attention(self, spec: ModelSpec, shard: Shard, num_pages: int, page_size: int) -> TorchAttention | KernelAttention:
        """Attention over a new cache of `num_pages` pages."""
        if self.run is None:
            return TorchAttention(spec, shard, num_pages, page_size, self.kv_dtype)
        return KernelAttention(spec, shard, num_pages, page_size, self.run)
