"""The wire codec: a message is one version byte, then msgpack [class name, field 0, field 1, ...]."""

from __future__ import annotations

import dataclasses as dc
import types as pytypes
import typing
from typing import Any, TypeVar

import msgpack
import numpy as np
from typing_extensions import dataclass_transform

PROTOCOL = 1


MAX_BYTES = 64 << 20  # larger frames are refused before they are parsed


T = TypeVar("T")


_REGISTRY: dict[str, type] = {}


_FIELDS: dict[type, tuple[str, ...]] = {}


_CHECKS: dict[type, tuple[Any, ...]] = {}


_DTYPES = {"<i4", "<i8", "<u8", "|u1", "<f4"}


_VALUE, _ARRAY = 1, 2  # msgpack ext codes


class BadMessage(ValueError):
    """The bytes are not a message of this protocol."""


def _checker(hint: Any) -> Any:
    """The set of admissible runtime types for an annotation: a tuple of classes, or ("tuple", classes) for tuple[x, ...]."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, pytypes.UnionType):
        return tuple(c for arm in typing.get_args(hint) for c in _checker(arm))
    if origin is tuple:
        return ("tuple", tuple(c for arm in typing.get_args(hint) if arm is not ... for c in _checker(arm)))
    if origin is np.ndarray:
        return (np.ndarray,)
    if hint is float:
        return (float, int)
    return (type(None) if hint is None else hint,)


def _admits(check: Any, value: Any) -> bool:
    if check[0] == "tuple":
        inner = check[1]
        if type(value) is not tuple:
            return False
        return all(_admits(inner, v) for v in value) if inner[:1] == ("tuple",) else all(type(v) in inner for v in value)
    return type(value) in check


def register(cls: type[T]) -> type[T]:
    """Enter a frozen dataclass in the registry under its class name."""
    if cls.__name__ in _REGISTRY:
        raise TypeError(f"message {cls.__name__} is declared twice")
    fields = dc.fields(cls)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    _REGISTRY[cls.__name__] = cls
    _FIELDS[cls] = tuple(f.name for f in fields)
    _CHECKS[cls] = tuple(_checker(hints[f.name]) for f in fields)
    return cls


@dataclass_transform(frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """Declare a message type: frozen, slotted, registered."""
    return register(dc.dataclass(frozen=True, slots=True, eq=False)(cls))


def registry() -> dict[str, type]:
    """A copy of the registry: class name -> class."""
    return dict(_REGISTRY)


def _row(msg: Any) -> list[Any]:
    cls = type(msg)
    row = [cls.__name__]
    for name, check in zip(_FIELDS[cls], _CHECKS[cls], strict=True):
        value = getattr(msg, name)
        if not _admits(check, value):
            raise TypeError(f"{cls.__name__}.{name} may not be {type(value).__name__}")
        row.append(value)
    return row


def _pack(obj: Any) -> msgpack.ExtType:
    if isinstance(obj, np.ndarray):
        code = obj.dtype.str
        if obj.ndim != 1 or code not in _DTYPES:
            raise TypeError(f"an array of {obj.ndim} dimensions and dtype {code} may not travel in a message")
        return msgpack.ExtType(_ARRAY, code.encode() + obj.tobytes())
    if type(obj) in _FIELDS:
        return msgpack.ExtType(_VALUE, msgpack.packb(_row(obj), default=_pack))
    raise TypeError(f"{type(obj).__name__} may not travel in a message")


def _unpack(code: int, data: bytes) -> Any:
    if code == _VALUE:
        return _build(_parse(data))
    if code == _ARRAY:
        dtype = data[:3].decode("ascii", "replace")
        if dtype not in _DTYPES or (len(data) - 3) % np.dtype(dtype).itemsize:
            raise BadMessage(f"array of dtype {dtype!r} and {len(data) - 3} bytes")
        return np.frombuffer(data, dtype, offset=3).copy()
    raise BadMessage(f"unknown ext code {code}")


def _parse(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_unpack, use_list=False, max_array_len=1 << 16, max_map_len=0)


def _build(row: Any) -> Any:
    if type(row) is not tuple or not row or type(row[0]) is not str:
        raise BadMessage("a message is an array that begins with its name")
    cls = _REGISTRY.get(row[0])
    if cls is None:
        raise BadMessage(f"unknown message {row[0]!r:.80}")
    names, checks = _FIELDS[cls], _CHECKS[cls]
    if len(row) != len(names) + 1:
        raise BadMessage(f"{row[0]} has {len(names)} fields, got {len(row) - 1}")
    for name, check, value in zip(names, checks, row[1:], strict=True):
        if not _admits(check, value):
            raise BadMessage(f"{row[0]}.{name} may not be {type(value).__name__}")
    return cls(*row[1:])


def encode(msg: Any) -> bytes:
    """Message -> bytes.  Raises TypeError for anything that is not a declared message."""
    if type(msg) not in _FIELDS:
        raise TypeError(f"{type(msg).__name__} is not a message")
    body: bytes = msgpack.packb(_row(msg), default=_pack)
    return bytes([PROTOCOL]) + body


def decode(raw: bytes) -> Any:
    """Bytes -> message.  Raises BadMessage, and only BadMessage, on anything else."""
    if not raw or raw[0] != PROTOCOL:
        raise BadMessage(f"protocol version {raw[0] if raw else None}, expected {PROTOCOL}")
    if len(raw) > MAX_BYTES:
        raise BadMessage(f"{len(raw)} bytes are more than a message may have")
    try:
        return _build(_parse(raw[1:]))
    except BadMessage:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as e:
        raise BadMessage(f"not a message: {type(e).__name__}") from e
    except Exception as e:  # a value type refused its fields (InvalidParam)
        raise BadMessage(f"not a message: {e}") from e
