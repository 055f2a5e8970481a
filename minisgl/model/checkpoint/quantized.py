"""Dequantises linear layers of quantised safetensors, some rows and columns at a time, to float32.  Runs in the workers.

Every class reads the weight [out, in] of one layer: `shape`, and `read` of a rectangle.  Slices of the files are views of the
memory map, so only the bytes of a rectangle are touched; one that begins or ends within a packed word reads the whole word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from minisgl.config import WeightFormat
from minisgl.errors import UserError
from minisgl.model.checkpoint.files import SafetensorsFiles
from minisgl.model.common.shard import Range
from minisgl.model.common.weights import Quants

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds column 0, 1, ... of its eight (AutoAWQ, "gemm")


class Layer(Protocol):
    """The weight of one linear layer."""

    shape: tuple[int, int]

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        """f32[rows, cols] of the weight."""

    def quants(self, rows: Range, cols: Range) -> Callable[[torch.device], Quants] | None:
        """What reads the same as whole numbers on a device; None where inputs that share a scale are no neighbours."""


def layer_of(files: SafetensorsFiles, name: str, stored: WeightFormat | None) -> Layer | None:
    """The reader of the layer whose weight is called `name`; None where it is stored plainly."""
    if stored is None:
        return None
    stem = name.removesuffix(".weight")
    match stored.method:
        case "scaled" if name in files and files.dtype(name) in ("F8_E4M3", "I8"):
            return Scaled(files, name, stored)
        case "gptq" | "awq" if f"{stem}.qweight" in files:
            return Transposed(files, stem, stored)
        case "packed" if f"{stem}.weight_packed" in files:
            return Packed(files, stem, stored)
    return None


def unpack(  # noqa: PLR0917
    stored: Any, dim: int, shifts: tuple[int, ...], rows: Range, cols: Range, device: torch.device | None = None
) -> torch.Tensor:
    """`rows` and `cols` of a matrix of fields of 32 / len(shifts) bits, in the order of `shifts` in i32 words along `dim`.

    Only the words that hold them are read; they are taken apart on `device`.
    """
    words, span = _words((rows, cols)[dim], len(shifts))
    part = (stored[words, slice(*cols)] if dim == 0 else stored[slice(*rows), words]).to(device)
    bits = 32 // len(shifts)
    fields = [(part >> s) & ((1 << bits) - 1) for s in shifts]
    return torch.stack(fields, dim + 1).flatten(dim, dim + 1).narrow(dim, span[0], span[1] - span[0])


def _in_order(bits: int) -> tuple[int, ...]:
    return tuple(range(0, 32, bits))


def _words(span: Range, per: int) -> tuple[slice, Range]:
    """The words that hold the fields of `span`, and the place of `span` among the fields of those words."""
    first = span[0] // per
    return slice(first, -(-span[1] // per)), (span[0] - first * per, span[1] - first * per)


def _groups(files: SafetensorsFiles, index: str, inputs: int, size: int) -> tuple[int, torch.Tensor]:
    """(number of groups, i64[inputs] the group of each input).

    A group is a run of `size` neighbouring inputs (-1: all inputs), unless there is a tensor `index` that assigns them.
    """
    size = size if size > 0 else inputs
    groups = -(-inputs // size)
    if index not in files:
        return groups, torch.arange(inputs) // size
    group: torch.Tensor = files.get(index, (inputs,))[:].long()
    if inputs and not 0 <= int(group.min()) <= int(group.max()) < groups:
        raise UserError(f"--model {files.path}: {index} names groups outside of the {groups} that there are.")
    return groups, group


def _placed(
    group: torch.Tensor, size: int, order: torch.Tensor | None, cols: Range, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The number of the group that each `size` inputs share, and the order of the inputs, on a device; see `_order`."""
    groups = (group[slice(*cols)] if order is None else group[order])[::size]
    return groups.to(device), None if order is None else order.to(device)


def _order(group: torch.Tensor, size: int, cols: Range) -> tuple[int, torch.Tensor | None] | None:
    """(inputs of a group within `cols`, their order if they are no neighbours, see Quants); None: groups of several sizes.

    A cut through a group makes smaller ones, that share its scale.
    """
    inputs = len(group)
    size = size if 0 < size < inputs else inputs
    if torch.equal(group, torch.arange(inputs) // size):
        ends = [end for end in cols if end != inputs]
        return math.gcd(size, *ends), None
    whole = cols == (0, inputs) and bool((torch.bincount(group) == size).all())
    return (size, torch.argsort(group, stable=True)) if whole else None


class Scaled:
    """8-bit floats or integers and a scale for each block of `block` rows and columns: [out / rows, in / columns].

    A scale per tensor is a block as large as the weight, a scale per channel a block of one row.
    """

    def __init__(self, files: SafetensorsFiles, name: str, stored: WeightFormat) -> None:
        self._weight = files.get(name)
        self.shape = out, width = tuple(self._weight.get_shape())
        scale_name = f"{name.removesuffix('weight')}{stored.scale}"
        scale = files.get(scale_name)
        scales = scale[:].float() if scale.get_shape() else scale[...].float()
        block = stored.block or ((out, width) if scales.numel() == 1 else (1, width))
        expected = (-(-out // block[0]), -(-width // block[1]))
        if scales.numel() != expected[0] * expected[1]:
            raise UserError(
                f"--model {files.path}: {scale_name} has shape {tuple(scales.shape)}, the weight's {self.shape} and its "
                f"blocks of {tuple(block)} make it {expected}."
            )
        self._scales, self._block = scales.view(expected), block

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        values: torch.Tensor = self._weight[slice(*rows), slice(*cols)].float()
        row_blocks = torch.arange(*rows) // self._block[0]
        col_blocks = torch.arange(*cols) // self._block[1]
        return values.mul_(self._scales[row_blocks][:, col_blocks])

    def quants(self, rows: Range, cols: Range) -> None:
        return None


class Transposed:
    """GPTQ and AWQ: the weight is stored as [in, out], (q - zero) * scale, with a zero and a scale for each group of inputs.

    qzeros i32[groups, out / per], scales [groups, out], per = 32 / bits.  A word of GPTQ's qweight i32[in / per, out] holds
    neighbouring inputs, lowest bits first; one of AWQ's i32[in, out / per] neighbouring outputs in `AWQ_ORDER`.  A word of
    qzeros holds neighbouring outputs, in the same order.

    AutoGPTQ stored zero points less one ("gptq", `zero_offset` 1; a zero point of 0 wrapped around); "gptq_v2" stores them.
    """

    def __init__(self, files: SafetensorsFiles, stem: str, stored: WeightFormat) -> None:
        self._offset, self._bits, self._size, per = stored.zero_offset, stored.bits, stored.group_size, 32 // stored.bits
        self._shifts = tuple(4 * nibble for nibble in AWQ_ORDER) if stored.method == "awq" else _in_order(stored.bits)
        self._packed_dim = 1 if stored.method == "awq" else 0
        self._q = files.get(f"{stem}.qweight")
        height, width = self._q.get_shape()
        inputs, out = (height, width * per) if stored.method == "awq" else (height * per, width)
        self.shape = (out, inputs)
        self._groups, self._group = _groups(files, f"{stem}.g_idx", inputs, stored.group_size)
        self._zeros = files.get(f"{stem}.qzeros", (self._groups, -(-out // per)))
        self._scales = files.get(f"{stem}.scales", (self._groups, out))

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        q = unpack(self._q, self._packed_dim, self._shifts, cols, rows)
        zeros = unpack(self._zeros, 1, self._shifts, (0, self._groups), rows) + self._offset
        zeros &= (1 << 32 // len(self._shifts)) - 1
        group = self._group[slice(*cols)]
        scales = self._scales[:, slice(*rows)].float()
        values: torch.Tensor = (q - zeros[group]).float() * scales[group]
        return values.T

    def quants(self, rows: Range, cols: Range) -> Callable[[torch.device], Quants] | None:
        found = _order(self._group, self._size, cols)
        if found is None:
            return None
        size, order = found

        def read(device: torch.device) -> Quants:
            q = unpack(self._q, self._packed_dim, self._shifts, cols, rows, device).to(torch.uint8).T
            zeros = unpack(self._zeros, 1, self._shifts, (0, self._groups), rows, device) + self._offset
            zeros &= (1 << self._bits) - 1
            group, at = _placed(self._group, size, order, cols, device)
            scales = self._scales[:, slice(*rows)].to(device).float()
            return Quants(q if at is None else q[:, at], scales[group].T, zeros[group].float().T, self._bits, size, at)

        return read


class Packed:
    """compressed-tensors' pack-quantized: i32[out, in / per], lowest bits first, each value plus half the range.

    weight_scale [out, groups]; weight_g_idx [in], where it exists, names the group of each input.
    """

    def __init__(self, files: SafetensorsFiles, stem: str, stored: WeightFormat) -> None:
        self._bits, self._size = stored.bits, stored.group_size
        self._q = files.get(f"{stem}.weight_packed")
        out, inputs = map(int, files.get(f"{stem}.weight_shape", (2,))[:].tolist())
        self.shape = (out, inputs)
        files.get(f"{stem}.weight_packed", (out, -(-inputs * self._bits // 32)))
        groups, self._group = _groups(files, f"{stem}.weight_g_idx", inputs, stored.group_size)
        self._scales = files.get(f"{stem}.weight_scale", (out, groups))

    def read(self, rows: Range, cols: Range) -> torch.Tensor:
        q = unpack(self._q, 1, _in_order(self._bits), rows, cols) - (1 << (self._bits - 1))
        scales: torch.Tensor = self._scales[slice(*rows)].float()
        return q.float() * scales[:, self._group[slice(*cols)]]

    def quants(self, rows: Range, cols: Range) -> Callable[[torch.device], Quants] | None:
        found = _order(self._group, self._size, cols)
        if found is None:
            return None
        size, order = found

        def read(device: torch.device) -> Quants:
            q = unpack(self._q, 1, _in_order(self._bits), rows, cols, device).to(torch.uint8)
            group, at = _placed(self._group, size, order, cols, device)
            scales = self._scales[slice(*rows)].to(device).float()[:, group]
            zeros = torch.full_like(scales, float(1 << (self._bits - 1)))
            return Quants(q if at is None else q[:, at], scales, zeros, self._bits, size, at)

        return read
