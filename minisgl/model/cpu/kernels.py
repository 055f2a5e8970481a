"""Calls the C kernels on tensors: `Kernels`.  Arguments that stay the same are structures made once; calls pass addresses."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, addressof, c_float, c_int32, c_int64, c_void_p

import numpy as np
import torch

from minisgl.model.common.gguf_blocks import GROUP
from minisgl.model.common.memory import BLOCK_BYTES, LANES
from minisgl.model.cpu.build import load_kernels


class Weight(Structure):
    """A packed matrix: `Weight` of csrc/linear.c."""

    _fields_ = (
        ("blocks", c_void_p),
        ("bias", c_void_p),
        *((name, c_int32) for name in ("outputs", "groups", "inputs", "bits", "gated")),
    )


class Norm(Structure):
    """`Norm` of csrc/linear.c."""

    _fields_ = (("weight", c_void_p), ("eps", c_float))

    def __init__(self, weight: int, eps: float) -> None:
        super().__init__(weight, eps)
        self.address = addressof(self)


class Pack(Structure):
    """`Pack` of csrc/pack.c."""

    _fields_ = (
        ("rows", c_void_p),
        ("row_bytes", c_int64),
        ("blocks", c_void_p),
        *((name, c_int32) for name in ("kind", "n", "inputs", "groups", "bits", "first", "step", "shift")),
    )


class Layer(Structure):
    """The arguments of attention for one layer: `Layer` of csrc/attention.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("cache", "q_norm", "k_norm", "sinks")),
        *((name, c_float) for name in ("eps", "scale", "softcap")),
        *((name, c_int32) for name in ("page_size", "heads", "kv_heads", "dim", "window")),
    )


class Step(Structure):
    """The arguments of attention that all layers of a step share: `Step` of csrc/attention.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("slots", "cos", "sin", "items", "pages")),
        *((name, c_int32) for name in ("n_tokens", "n_items", "pages_per_row", "rotary")),
    )


class Kernels:
    """The loaded library, its threads and its scratch memory.  Not for use by two threads at a time."""

    def __init__(self, threads: int, flags: tuple[str, ...] = ("-march=native",)) -> None:
        """Builds the library unless it is cached.  Raises NoKernels."""
        library = load_kernels(flags)
        self.threads = threads
        self._linear = library.linear
        self._linear.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int32)
        self._linear.restype = None
        self._attention = library.attention
        self._attention.argtypes = (POINTER(Layer), POINTER(Step), c_void_p, c_void_p, c_int32)
        self._attention.restype = None
        self._pack = library.pack
        self._pack.argtypes, self._pack.restype = (POINTER(Pack), c_int32), None
        library.scratch_bytes.argtypes, library.scratch_bytes.restype = (c_int32, c_int32), c_int64
        self._group_scratch = int(library.scratch_bytes(1, 1))
        self._scratch = np.empty(0, np.uint8)
        self._scratch_at = 0

    def pack(
        self, parts: Sequence[tuple[torch.Tensor, int]], inputs: int, bits: int, *, in_turns: bool = False
    ) -> torch.Tensor:
        """Pack matrices on top of each other into blocks, as `tile` of packing.py; with `in_turns` two of them as `interleave`.

        A part is a matrix [n, inputs] of float32, float16 or bfloat16, or the stored rows u8[n, bytes] of a GGUF type with that
        many bits, and ggml's number of its type.
        """
        n_rows, groups, first = sum(len(rows) for rows, _ in parts), -(-inputs // GROUP), 0
        # Zero pages of the operating system, each written to once.
        blocks = torch.from_numpy(np.zeros((-(-n_rows // LANES), groups, BLOCK_BYTES[bits]), np.uint8))
        for i, (part, kind) in enumerate(parts):
            place = (0, len(parts), i) if in_turns else (first, 1, 0)
            rows = part.contiguous()
            source = (rows.data_ptr(), rows.stride(0) * rows.itemsize, blocks.data_ptr(), kind, len(rows))
            self._pack(Pack(*source, inputs, groups, bits, *place), self.threads)
            first += len(rows)
        return blocks

    def linear(self, weight: PackedWeight, x: torch.Tensor, delta: torch.Tensor | None, norm: Norm | None) -> torch.Tensor:
        """f32[T, K] -> f32[T, N].  A `delta` is added to x in place, then the norm applied."""
        n = x.shape[0]  # not len(x): a step makes two hundred of these calls, and a microsecond in each shows
        needed = n * weight.groups * self._group_scratch
        if needed > self._scratch.nbytes:
            self._scratch = np.empty(needed, np.uint8)
            self._scratch_at = self._scratch.ctypes.data
        y = torch.empty(n, weight.width)
        self._linear(
            weight.address,
            None if norm is None else norm.address,
            None if delta is None else delta.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            n,
            self._scratch_at,
            self.threads,
        )
        return y

    def attention(self, layer: Layer, step: Step, qkv: torch.Tensor, width: int) -> torch.Tensor:
        """qkv f32[T, (H + 2K) D], changed in place -> f32[T, width]."""
        out = torch.empty(qkv.shape[0], width)
        self._attention(layer, step, qkv.data_ptr(), out.data_ptr(), self.threads)
        return out


class PackedWeight:
    """A matrix in blocks u8[tiles, G, block bytes] (see packing.py) with its sizes; keeps the memory alive."""

    GATED = ("", "silu", "gelu_tanh")

    def __init__(
        self, blocks: torch.Tensor, outputs: int, inputs: int, *, bias: torch.Tensor | None = None, gated: str = ""
    ) -> None:
        """gated: the activation of a product whose tiles are those of gate and up in turns; "" for none."""
        self.blocks = blocks
        self.bias = None if bias is None else bias.float().contiguous()
        self.width, self.groups = outputs // 2 if gated else outputs, blocks.shape[1]
        bits = {v: k for k, v in BLOCK_BYTES.items()}[blocks.shape[2]]
        address = None if self.bias is None else self.bias.data_ptr()
        self._struct = Weight(blocks.data_ptr(), address, outputs, self.groups, inputs, bits, self.GATED.index(gated))
        self.address = addressof(self._struct)
        assert len(blocks) == -(-outputs // LANES)
