"""Encodes messages as bytes and decodes them; refuses everything that is not a declared message with declared field types.

A frame:

    u8       PROTOCOL
    msgpack  [class name, field 0, field 1, ...]

A field is None, a bool, int, float, str or bytes, a tuple of fields, or one of two msgpack extensions:

    ext 1    a value type, such as SamplingParams: msgpack [class name, field 0, ...]
    ext 2    a numpy array of one dimension (copied, never aliased): three bytes of dtype, then the elements

There is no dict, no callable and no pickle.  The registry is closed: decoding looks the class name up among the declared
types and checks every field against its annotation, so arbitrary bytes become `BadMessage` and nothing else.  All processes of
a run come from one source tree, hence one version byte and no optional fields; the byte lets the server refuse an old client of
the batch socket with a sentence.
"""

from __future__ import annotations

import dataclasses as dc
import types
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy as np
from typing_extensions import dataclass_transform

PROTOCOL = 1
MAX_BYTES = 64 << 20  # larger frames are refused before they are parsed
_VALUE, _ARRAY = 1, 2  # msgpack extension codes
_DTYPES = {"<i4", "<i8", "<u8", "|u1", "<f4"}

T = TypeVar("T")
Kinds = dict[type, Any]  # admitted type -> the Kinds of its items ({} where it is not a tuple)


class BadMessage(ValueError):
    """The bytes are not a message of this protocol."""


# ---------------- declaration
class _Layout(NamedTuple):
    """A registered class: the names of its fields, and the types that each may have."""

    cls: type
    fields: tuple[tuple[str, Kinds], ...]

    def fault(self, values: tuple[Any, ...]) -> str | None:
        """Why these cannot be the values of the fields; None if they can."""
        name = self.cls.__name__
        if len(values) != len(self.fields):
            return f"{name} has {len(self.fields)} fields, got {len(values)}"
        for (field, kinds), value in zip(self.fields, values, strict=True):
            kind = type(value)
            if kind not in kinds or (kind is tuple and not _fit(kinds[tuple], value)):
                return f"{name}.{field} may not be {kind.__name__}"
        return None


_LAYOUTS: dict[str, _Layout] = {}


def _kinds(hint: Any) -> Kinds:
    """The types that an annotation admits."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, tuple):
        arms = {kind: items for arm in typing.get_args(hint) if arm is not ... for kind, items in _kinds(arm).items()}
        return {tuple: arms} if origin is tuple else arms
    if hint is float:
        return {float: {}, int: {}}
    return {type(None) if hint is None else origin or hint: {}}


def _fit(kinds: Kinds, items: Iterable[Any]) -> bool:
    """Whether all items, and what is in the tuples among them, have admitted types."""
    found = set(map(type, items))
    return found <= kinds.keys() and (tuple not in found or all(_fit(kinds[tuple], i) for i in items if type(i) is tuple))


def register(cls: type[T]) -> type[T]:
    """Enter a frozen dataclass in the registry under its class name."""
    if cls.__name__ in _LAYOUTS:
        raise TypeError(f"message {cls.__name__} is declared twice")
    hints = typing.get_type_hints(cls)
    fields = dc.fields(cls)  # type: ignore[arg-type]
    _LAYOUTS[cls.__name__] = _Layout(cls, tuple((f.name, _kinds(hints[f.name])) for f in fields))
    return cls


@dataclass_transform(frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """Declare a message type: frozen, slotted, registered."""
    return register(dc.dataclass(frozen=True, slots=True, eq=False)(cls))


def registry() -> dict[str, type]:
    """Class name -> class of everything that is registered."""
    return {name: layout.cls for name, layout in _LAYOUTS.items()}


# ---------------- encoding
def encode(msg: Any) -> bytes:
    """Message -> bytes.  Raises TypeError for anything that is not a declared message."""
    return bytes([PROTOCOL]) + _pack_fields(msg)


def _pack_fields(msg: Any) -> bytes:
    name = type(msg).__name__
    layout = _LAYOUTS.get(name)
    if layout is None or layout.cls is not type(msg):
        raise TypeError(f"{name} may not travel in a message")
    values = tuple([getattr(msg, field) for field, _ in layout.fields])
    if fault := layout.fault(values):
        raise TypeError(fault)
    packed: bytes = msgpack.packb((name, *values), default=_pack_extension)
    return packed


def _pack_extension(obj: Any) -> msgpack.ExtType:
    if not isinstance(obj, np.ndarray):
        return msgpack.ExtType(_VALUE, _pack_fields(obj))
    dtype = obj.dtype.str
    if obj.ndim != 1 or dtype not in _DTYPES:
        raise TypeError(f"an array of {obj.ndim} dimensions and dtype {dtype} may not travel in a message")
    return msgpack.ExtType(_ARRAY, dtype.encode() + obj.tobytes())


# ---------------- decoding
def decode(raw: bytes) -> Any:
    """Bytes -> message.  Raises BadMessage, and only BadMessage, on anything else."""
    if not raw or raw[0] != PROTOCOL:
        raise BadMessage(f"protocol version {raw[0] if raw else None}, expected {PROTOCOL}")
    if len(raw) > MAX_BYTES:
        raise BadMessage(f"{len(raw)} bytes are more than a message may have")
    try:
        return _unpack_fields(raw[1:])
    except BadMessage:
        raise
    except Exception as e:  # malformed msgpack, or a value type that refused its fields (InvalidParam)
        raise BadMessage(f"not a message: {e or type(e).__name__}") from e


def _unpack_fields(data: bytes) -> Any:
    row = msgpack.unpackb(data, ext_hook=_unpack_extension, use_list=False, max_array_len=1 << 16, max_map_len=0)
    if type(row) is not tuple or not row or type(row[0]) is not str:
        raise BadMessage("a message is an array that begins with its name")
    layout = _LAYOUTS.get(row[0])
    if layout is None:
        raise BadMessage(f"unknown message {row[0]!r:.80}")
    if fault := layout.fault(row[1:]):
        raise BadMessage(fault)
    return layout.cls(*row[1:])


def _unpack_extension(code: int, data: bytes) -> Any:
    if code == _VALUE:
        return _unpack_fields(data)
    if code != _ARRAY:
        raise BadMessage(f"unknown ext code {code}")
    dtype = data[:3].decode("ascii", "replace")
    if dtype not in _DTYPES or (len(data) - 3) % np.dtype(dtype).itemsize:
        raise BadMessage(f"array of dtype {dtype!r} and {len(data) - 3} bytes")
    return np.frombuffer(data, dtype, offset=3).copy()
