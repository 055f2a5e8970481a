"""Linear layers of quantised safetensors, some rows and columns at a time, as float32.  Runs in the workers.

Every class reads one layer's weight [out, in]: `shape`, and `read` of a rectangle.  Slices of the files are views of the memory
map, so only what a rectangle needs is touched; a rectangle that begins or ends within a packed word takes the whole word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from minisgl.errors import UserError
from minisgl.model.common.shard import Range

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds column 0, 1, ... of its eight (AutoAWQ, "gemm")


class Tensors(Protocol):
    """The open files; `get` marks a tensor as used."""

    path: str

    def __contains__(self, name: object) -> bool: ...

    def dtype(self, name: str) -> str: ...

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """A lazy slice.  Raises UserError naming a tensor that is missing or not of that shape."""


class Layer(Protocol):
    """The weight of one linear layer."""

    shape: tuple[int, int]

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        """f32[rows, cols] of the weight."""


def layer_of(tensors: Tensors, name: str, settings: Mapping[str, Any]) -> Layer | None:
    """The reader of the layer whose weight is called `name`; None where it is stored plainly."""
    stem = name.removesuffix(".weight")
    match settings.get("method"):
        case "scaled" if name in tensors and tensors.dtype(name) in ("F8_E4M3", "I8"):
            return Scaled(tensors, name, settings)
        case "gptq" if f"{stem}.qweight" in tensors:
            return Gptq(tensors, stem, settings)
        case "awq" if f"{stem}.qweight" in tensors:
            return Awq(tensors, stem, settings)
        case "packed" if f"{stem}.weight_packed" in tensors:
            return Packed(tensors, stem, settings)
    return None


def unpack(words: torch.Tensor, dim: int, shifts: tuple[int, ...], span: Range) -> torch.Tensor:
    """Fields of 32 / len(shifts) bits out of i32 words, in the order of `shifts` along `dim`; `span` of them is kept."""
    bits = 32 // len(shifts)
    fields = [(words >> s) & ((1 << bits) - 1) for s in shifts]
    return torch.stack(fields, dim + 1).flatten(dim, dim + 1).narrow(dim, span[0], span[1] - span[0])


def _in_order(bits: int) -> tuple[int, ...]:
    return tuple(range(0, 32, bits))


def _words(span: Range, per: int) -> tuple[slice, Range]:
    """The words that hold the fields of `span`, and where these are among the fields of those words."""
    first = span[0] // per
    return slice(first, -(-span[1] // per)), (span[0] - first * per, span[1] - first * per)


class Scaled:
    """8-bit floats or integers and a scale for each block of `block` rows and columns: [out / rows, in / columns].

    A scale per tensor is a block as large as the weight, a scale per channel one of a single row.
    """

    def __init__(self, tensors: Tensors, name: str, settings: Mapping[str, Any]) -> None:
        self._weight = tensors.get(name)
        self.shape = out, width = tuple(self._weight.get_shape())
        scale_name = f"{name.removesuffix('weight')}{settings['scale']}"
        scale = tensors.get(scale_name)
        scales = scale[:].float() if scale.get_shape() else scale[...].float()
        block = settings["block"]
        if block is None:
            block = (out, width) if scales.numel() == 1 else (1, width)
        wanted = (-(-out // block[0]), -(-width // block[1]))
        if scales.numel() != wanted[0] * wanted[1]:
            raise UserError(
                f"--model {tensors.path}: {scale_name} has shape {tuple(scales.shape)}, the weight's {self.shape} and its "
                f"blocks of {tuple(block)} make it {wanted}."
            )
        self._scales, self._block = scales.view(wanted), block

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        values: torch.Tensor = self._weight[slice(*rows), slice(*cols)].float()
        row_blocks = torch.arange(*rows) // self._block[0]
        col_blocks = torch.arange(*cols) // self._block[1]
        return values.mul_(self._scales[row_blocks][:, col_blocks])


class _Grouped:
    """What GPTQ and AWQ share: the weight is transposed, (q - zero) * scale, with a zero and a scale for each group of inputs.

    qzeros i32[groups, out / per], scales [groups, out], per = 32 / bits.
    """

    def __init__(self, tensors: Tensors, stem: str, settings: Mapping[str, Any], packed_inputs: bool) -> None:
        self._bits: int = settings["bits"]
        per = self._per = 32 // self._bits
        self._q = tensors.get(f"{stem}.qweight")
        height, width = self._q.get_shape()
        inputs, out = (height * per, width) if packed_inputs else (height, width * per)
        self.shape = (out, inputs)
        size = settings["group_size"] if settings["group_size"] > 0 else inputs
        groups = -(-inputs // size)
        self._zeros = tensors.get(f"{stem}.qzeros", (groups, -(-out // per)))
        self._scales = tensors.get(f"{stem}.scales", (groups, out))
        self._group = torch.arange(inputs) // size
        index = f"{stem}.g_idx"
        if index in tensors:
            self._group = tensors.get(index, (inputs,))[:].long()
            if inputs and not 0 <= int(self._group.min()) <= int(self._group.max()) < groups:
                raise UserError(f"--model {tensors.path}: {index} names groups outside of the {groups} that there are.")

    def _dequantize(self, q: torch.Tensor, zeros: torch.Tensor, rows: Range, cols: Range) -> torch.Tensor:
        """q [in, out] of a rectangle -> f32 [out, in]."""
        group = self._group[slice(*cols)]
        scales = self._scales[:, slice(*rows)].float()
        values: torch.Tensor = (q - zeros[group]).float() * scales[group]
        return values.T


class Gptq(_Grouped):
    """qweight i32[in / per, out]; a word holds neighbouring inputs, lowest bits first.

    AutoGPTQ stored zero points less one ("gptq", `zero_offset` 1; a zero point of 0 wrapped around); "gptq_v2" stores them.
    """

    def __init__(self, tensors: Tensors, stem: str, settings: Mapping[str, Any]) -> None:
        super().__init__(tensors, stem, settings, packed_inputs=True)
        self._offset = settings["zero_offset"]

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        shifts = _in_order(self._bits)
        words, span = _words(cols, self._per)
        q = unpack(self._q[words, slice(*rows)], 0, shifts, span)
        words, span = _words(rows, self._per)
        zeros = unpack(self._zeros[:, words], 1, shifts, span)
        return self._dequantize(q, (zeros + self._offset) & ((1 << self._bits) - 1), rows, cols)


class Awq(_Grouped):
    """qweight i32[in, out / 8]; a word holds neighbouring outputs in `AWQ_ORDER`, and so do the zero points."""

    def __init__(self, tensors: Tensors, stem: str, settings: Mapping[str, Any]) -> None:
        super().__init__(tensors, stem, settings, packed_inputs=False)

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        shifts = tuple(4 * nibble for nibble in AWQ_ORDER)
        words, span = _words(rows, self._per)
        q = unpack(self._q[slice(*cols), words], 1, shifts, span)
        return self._dequantize(q, unpack(self._zeros[:, words], 1, shifts, span), rows, cols)


class Packed:
    """compressed-tensors' pack-quantized: i32[out, in / per], lowest bits first, each value plus half the range.

    weight_scale [out, groups]; weight_g_idx [in], if there is one, says which group an input belongs to.
    """

    def __init__(self, tensors: Tensors, stem: str, settings: Mapping[str, Any]) -> None:
        self._bits: int = settings["bits"]
        self._per = 32 // self._bits
        self._q = tensors.get(f"{stem}.weight_packed")
        out, inputs = tensors.get(f"{stem}.weight_shape", (2,))[:].tolist()
        self.shape = (int(out), int(inputs))
        tensors.get(f"{stem}.weight_packed", (out, -(-inputs // self._per)))
        size = settings["group_size"] if settings["group_size"] > 0 else inputs
        self._scales = tensors.get(f"{stem}.weight_scale", (out, -(-inputs // size)))
        self._group = torch.arange(inputs) // size
        index = f"{stem}.weight_g_idx"
        if index in tensors:
            self._group = tensors.get(index, (inputs,))[:].long()
            if inputs and not 0 <= int(self._group.min()) <= int(self._group.max()) < -(-inputs // size):
                raise UserError(f"--model {tensors.path}: {index} names groups that do not exist.")

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        words, span = _words(cols, self._per)
        q = unpack(self._q[slice(*rows), words], 1, _in_order(self._bits), span) - (1 << (self._bits - 1))
        scales: torch.Tensor = self._scales[slice(*rows)].float()
        return q.float() * scales[:, self._group[slice(*cols)]]
