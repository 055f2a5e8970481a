"""Encodes messages as bytes and decodes them; refuses everything that is not a declared message with declared field types.

A frame:

    u8       PROTOCOL
    msgpack  [class name, field 0, field 1, ...]

A field is None, a bool, int, float, str or bytes, a tuple of fields, or one of two msgpack extensions:

    ext 1    a value type, such as SamplingParams: msgpack [class name, field 0, ...]
    ext 2    a numpy array of one dimension (copied, never aliased): three bytes of dtype, then the elements

There is no dict, no callable and no pickle.  The registry is closed: decoding looks the class name up among the declared
types, checks every field against its annotation and asks the message whether its values agree, so arbitrary bytes become
`BadMessage` and nothing else.  A frame is walked before anything is made of it: large ones may be neither deep nor full of
small objects, so that memory and time stay in proportion to bytes.  All processes of a run come from one source tree, hence one
version byte and no optional fields; the byte lets the server refuse an old client of the batch socket with a sentence.
"""

from __future__ import annotations

import dataclasses as dc
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import msgpack
import numpy as np
from typing_extensions import dataclass_transform

PROTOCOL = 1
MAX_BYTES = 64 << 20  # larger frames are refused before they are parsed
MAX_ITEMS = 1 << 17  # fields and items of tuples in a frame; a row of Text is one
_MAX_DEPTH = 3  # a row, a tuple, a pair in it
_SMALL = 1 << 16  # bytes that cannot hold too many items
_ARRAY_BYTES = {*range(0x90, 0xA0), 0xDC, 0xDD}  # with which an array begins in msgpack
_VALUE, _ARRAY = 1, 2  # msgpack extension codes
_DTYPES = {"<i4", "<i8", "<u8", "|u1", "<f4"}

T = TypeVar("T")
Kinds = dict[type, Any]  # admitted type -> the Kinds of its items ({} where it is not a tuple)


class BadMessage(ValueError):
    """The bytes are not a message of this protocol."""


# ---------------- declaration
class _Layout(NamedTuple):
    """A registered class: the names of its fields, and the types that each may have.

    `agrees`: whether the values of a message fit together; None where all do.
    """

    cls: type
    fields: tuple[tuple[str, Kinds], ...]
    agrees: Callable[[Any], bool] | None

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
    agrees: Callable[[Any], bool] | None = getattr(cls, "agrees", None)
    _LAYOUTS[cls.__name__] = _Layout(cls, tuple((f.name, _kinds(hints[f.name])) for f in fields), agrees)
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


def _unpack_extension(code: int, data: bytes) -> Any:
    if code == _VALUE:  # has no extension in it: each would be another call of the library on the C stack
        return _unpack_fields(data, _no_extension)
    if code != _ARRAY:
        raise BadMessage(f"unknown ext code {code}")
    dtype = data[:3].decode("ascii", "replace")
    if dtype not in _DTYPES or (len(data) - 3) % np.dtype(dtype).itemsize:
        raise BadMessage(f"array of dtype {dtype!r} and {len(data) - 3} bytes")
    return np.frombuffer(data, dtype, offset=3).copy()


def _no_extension(code: int, data: bytes) -> Any:
    raise BadMessage("a value holds no arrays and no values")


def _unpack_fields(data: bytes, ext_hook: Callable[[int, bytes], Any] = _unpack_extension) -> Any:
    _check_size(data)
    row = msgpack.unpackb(data, ext_hook=ext_hook, use_list=False, max_array_len=MAX_ITEMS, max_map_len=0)
    if type(row) is not tuple or not row or type(row[0]) is not str:
        raise BadMessage("a message is an array that begins with its name")
    layout = _LAYOUTS.get(row[0])
    if layout is None:
        raise BadMessage(f"unknown message {row[0]!r:.80}")
    if fault := layout.fault(row[1:]):
        raise BadMessage(fault)
    made = layout.cls(*row[1:])
    if layout.agrees is not None and not layout.agrees(made):
        raise BadMessage(f"the values of {row[0]} do not fit together")
    return made


def _check_size(data: bytes) -> None:
    """Walk over msgpack without making objects of it.  Raises BadMessage, or any error of msgpack.

    An array of 3 bytes may claim 65,535 items, for which memory is taken before the items are seen to be missing, and an item
    of one byte may become an object of 64.
    """
    walker = msgpack.Unpacker(max_buffer_size=MAX_BYTES)
    walker.feed(data)
    if len(data) <= _SMALL:
        walker.skip()
    elif _count(walker, data, _MAX_DEPTH, MAX_ITEMS) < 0:
        raise BadMessage(f"more than {MAX_ITEMS} items")


def _count(walker: Any, data: bytes, depth: int, left: int) -> int:
    """Walk over an array; returns `left` less its items and what is in them, or less than 0."""
    if not depth:
        raise BadMessage("its tuples are too deep")
    n = walker.read_array_header()
    left -= n
    for _ in range(n if left >= 0 else 0):
        if data[walker.tell()] in _ARRAY_BYTES:
            left = _count(walker, data, depth - 1, left)
        else:
            walker.skip()
    return left
