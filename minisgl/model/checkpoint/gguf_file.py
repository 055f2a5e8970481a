"""Reads GGUF files, metadata and tensors, through one memory map.  No torch.

The reader of the `gguf` package makes several numpy objects for every element of every array: a vocabulary of 49k tokens
takes seconds there and tens of milliseconds here.  The package dequantises the blocks.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64 | n_kv x (key str, type u32, value)
    | n_tensors x (name str, n_dims u32, n_dims x u64, ggml type u32, offset u64) | padding to the alignment | tensor data

Every count is compared with the bytes that are left and a bound before it is used: a damaged file fails at once, by name.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minisgl.errors import UserError
from minisgl.model.checkpoint.metadata import shown

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MIN_KV_BYTES = 8 + 4 + 1  # an empty key and a one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8
MAX_DIMS = 4
# Far more than any model has.  Values in Python take many times their bytes in the file.
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_VALUES, MAX_TEXT = 1 << 21, 1 << 26  # elements of all arrays, bytes of all strings
MAX_PARTS = 65_535  # a u16


class Malformed(ValueError):
    """The bytes are not a GGUF file; the text says where."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in numpy's order (slowest first), `kind` its ggml type, `offset` and `nbytes` within file `part`."""

    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int
    part: int = 0


class _Cursor:
    """Reads little-endian values one after the other and refuses to run off the end."""

    def __init__(self, buf: mmap.mmap) -> None:
        self.buf = buf
        self.at = 0
        self.values_left, self.text_left = MAX_VALUES, MAX_TEXT

    def left(self) -> int:
        return len(self.buf) - self.at

    def take(self, n: int) -> int:
        """Advance by `n` bytes; returns where they begin."""
        if n > self.left():
            raise Malformed(f"it ends at byte {len(self.buf)}, within a value that begins at byte {self.at}")
        start = self.at
        self.at += n
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.buf, self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.buf, self.take(8))[0])

    def string(self) -> str:
        start = self.take(self.u64())
        self._spend(self.at - start)
        return self.buf[start : self.at].decode("utf-8", "replace")

    def _spend(self, text: int) -> None:
        self.text_left -= text
        if self.text_left < 0:
            raise Malformed(f"more than {MAX_TEXT >> 20} MiB of text before byte {self.at}")

    def strings(self, n: int) -> list[str]:
        """The hot loop: a vocabulary and its merges are 100k strings."""
        buf, at, end, unpack = self.buf, self.at, len(self.buf), _U64.unpack_from
        if n > self.left() // 8:
            raise Malformed(f"an array of {n} strings at byte {at} does not fit in the file")
        begin, most = at, self.text_left + 8 * n
        out = []
        for _ in range(n):
            if at + 8 > end:
                raise Malformed(f"it ends within an array of strings at byte {at}")
            start = at + 8
            at = start + unpack(buf, at)[0]
            if at > end or at - begin > most:
                raise Malformed(f"a string at byte {start} does not fit in the file, or in {MAX_TEXT >> 20} MiB of text")
            out.append(buf[start:at].decode("utf-8", "replace"))
        self.at = at
        self._spend(at - begin - 8 * n)
        return out

    def value(self, kind: int) -> Any:
        if kind != _ARRAY:
            return self.values(kind, 1)[0]
        kind, n = self.u32(), self.u64()
        self.values_left -= n
        if self.values_left < 0:
            raise Malformed(f"arrays of more than {MAX_VALUES} elements together, before byte {self.at}")
        return self.values(kind, n)

    def values(self, kind: int, n: int) -> list[Any]:
        """`n` values of one type, which is no array."""
        if kind == _STRING:
            return self.strings(n)
        if kind not in _SCALARS:
            raise Malformed(f"unknown value type {kind} before byte {self.at}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(n * dtype.itemsize)
        items: list[Any] = np.frombuffer(self.buf, dtype, n, start).tolist()
        return items


class GGUFFile:
    """An open file: `fields` maps keys to scalars and lists, `tensors` names to `TensorInfo`.

    A model may be split over files called name-00001-of-00003.gguf and so on.  The first has the keys and is the one to name.
    """

    def __init__(self, path: str) -> None:
        """Parse everything but the tensor data.  Raises UserError naming the file when it is damaged or no GGUF file."""
        self.path = path
        buf, self.fields, self.tensors = _open(path, 0)
        self._bufs = [buf]
        for part, file in enumerate(_other_parts(path, self.fields), 1):
            buf, fields, tensors = _open(file, part)
            place = (fields.get("split.no"), fields.get("split.count"))
            if place != (part, self.fields["split.count"]) or not self.tensors.keys().isdisjoint(tensors):
                raise UserError(f"--model {file}: not part {part + 1} of {path}: split.no, split.count or a tensor do not fit.")
            self._bufs.append(buf)
            self.tensors |= tensors
        expected = self.fields.get("split.tensors.count", len(self.tensors))
        if len(self._bufs) > 1 and expected != len(self.tensors):
            raise UserError(
                f"--model {path}: split.tensors.count is {shown(expected)}, its parts have {len(self.tensors)} tensors."
            )

    def data(self, name: str, rows: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, u8[rows, bytes per row]: a read-only view of the file.  A vector is one row."""
        info = self.tensors[name]
        raw = np.frombuffer(self._bufs[info.part], np.uint8, info.nbytes, info.offset).reshape(math.prod(info.shape[:-1]), -1)
        return raw if rows is None else raw[rows[0] : rows[1]]

    def dequantize(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> npt.NDArray[np.float32]:
        """A tensor as float32, or some rows and columns of a matrix; only blocks with these values are read.

        Raises UserError for a quantisation that the gguf package cannot read.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        kind = GGMLQuantizationType(info.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        raw = self.data(name, rows)
        start, end = cols or (0, info.shape[-1])
        first = start // block
        raw = raw[:, first * block_bytes : -(-end // block) * block_bytes]
        out: npt.NDArray[np.float32]
        try:  # the package expects contiguous rows, which a range of columns has not
            out = raw.view(np.float32) if kind == GGMLQuantizationType.F32 else dequantize(np.ascontiguousarray(raw), kind)
        except NotImplementedError as e:
            raise UserError(f"--model {self.path}: tensor {name} is stored as {kind.name}, which cannot be read.") from e
        out = out[:, start - first * block : end - first * block]
        return out.reshape(info.shape if rows is None and cols is None else out.shape)


def _open(path: str, part: int) -> tuple[mmap.mmap, dict[str, Any], dict[str, TensorInfo]]:
    """Map and parse one file."""
    try:
        with open(path, "rb") as f:
            if os.fstat(f.fileno()).st_size == 0:
                raise UserError(f"--model {path}: not a GGUF file: it is empty.")
            buf = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return buf, *_parse(buf, part)
    except OSError as e:
        raise UserError(f"--model {path}: cannot read it: {e.strerror}") from e
    except Malformed as e:
        raise UserError(f"--model {path}: not a usable GGUF file: {e}. If it was downloaded, download it again.") from e


def _other_parts(path: str, fields: dict[str, Any]) -> list[str]:
    """The files behind the first of a split model, all of which exist.  Names and keys are those of llama.cpp's gguf-split."""
    count, number = fields.get("split.count", 0), fields.get("split.no", 0)
    if not all(type(n) is int and 0 <= n <= MAX_PARTS for n in (count, number)):
        raise UserError(f"--model {path}: split.count is {shown(count)} and split.no {shown(number)}, not numbers of files.")
    if count <= 1:
        return []
    here = f"-{number + 1:05}-of-{count:05}.gguf"
    if not path.endswith(here):
        raise UserError(f"--model {path}: split.count is {count}, and the name of this part should end in {here}.")
    names = [f"{path.removesuffix(here)}-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    if number:
        raise UserError(f"--model {path}: part {number + 1} of {count}. Name the first part: --model {names[0]}")
    absent = next((n for n, name in enumerate(names) if not os.path.isfile(name)), 0)
    if absent:
        raise UserError(f"--model {path}: part {absent + 1} of {count} is missing: {names[absent]}. Is the download complete?")
    return names[1:]


def _parse(buf: mmap.mmap, part: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    c = _Cursor(buf)
    if buf[:4] != b"GGUF":
        raise Malformed(f"it begins with {bytes(buf[:4])!r} instead of b'GGUF'")
    c.take(4)
    version = c.u32()
    if version not in (2, 3):
        raise Malformed(f"it has version {version}; versions 2 and 3 (little-endian) are supported")
    n_tensors, n_fields = c.u64(), c.u64()
    if n_tensors * _MIN_TENSOR_BYTES + n_fields * _MIN_KV_BYTES > c.left():
        raise Malformed(f"its {n_fields} keys and {n_tensors} tensors cannot fit in {len(buf)} bytes")
    if n_fields > MAX_KEYS or n_tensors > MAX_TENSORS:
        raise Malformed(f"it has {n_fields} keys and {n_tensors} tensors; up to {MAX_KEYS} and {MAX_TENSORS} are read")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        key = c.string()
        if key in fields:
            raise Malformed(f"key {key[:64]!r} appears twice")
        try:
            fields[key] = c.value(c.u32())
        except Malformed as e:
            raise Malformed(f"key {key[:64]!r}: {e}") from e
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise Malformed(f"general.alignment is {shown(alignment)}, not a power of two")
    raw = [(c.string(), *_tensor_header(c)) for _ in range(n_tensors)]
    base = -(-c.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    stored = 0
    for name, shape, kind, offset in raw:
        if name in tensors:
            raise Malformed(f"tensor {name[:64]!r} appears twice")
        nbytes = _nbytes(name, shape, kind)
        end = base + offset + nbytes
        if offset % alignment or end > len(buf):
            raise Malformed(
                f"tensor {name[:64]!r} should end at byte {end}, the file has {len(buf)}: it is truncated or damaged"
            )
        stored += nbytes
        if stored > len(buf):
            raise Malformed(f"tensor {name[:64]!r} and those before it take {stored} bytes, the file has {len(buf)}")
        tensors[name] = TensorInfo(shape, kind, base + offset, nbytes, part)
    return fields, tensors


def _tensor_header(c: _Cursor) -> tuple[tuple[int, ...], int, int]:
    n_dims = c.u32()
    if not 1 <= n_dims <= MAX_DIMS:
        raise Malformed(f"a tensor with {n_dims} dimensions before byte {c.at}")
    dims = [c.u64() for _ in range(n_dims)]  # ggml's order: fastest first
    return tuple(reversed(dims)), c.u32(), c.u64()


def _nbytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise Malformed(f"tensor {name[:64]!r} has the unknown type {kind}") from None
    if 0 in shape or shape[-1] % block:
        raise Malformed(f"tensor {name[:64]!r} has shape {shape}, which is no multiple of blocks of {block}")
    return math.prod(shape) // block * int(block_bytes)
