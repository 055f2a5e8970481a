"""The format of a journal: framed records in append-only files, called parts.  Reads and writes no file itself.

    file      MAGIC, then records
    record    u32 bytes of the payload | u32 crc32 of kind and payload | u8 kind | payload in msgpack

A record whose end is missing, or whose checksum is wrong, ends a part: a writer that was killed leaves at most one of these.
The first record of a part is its PART, the second the SNAPSHOT of the machine, and STEP records follow.  docs/journal.md has
the fields of each.  Whatever the bytes are, reading them makes plain values and nothing else.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from minisgl.errors import UserError

MAGIC = b"minisgl journal\n"
VERSION = 2
_HEAD = struct.Struct("<IIB")
MAX_RECORD = 1 << 30  # bytes; a longer one is damage


class Kind(enum.IntEnum):
    """What a record holds."""

    PART = 0
    SNAPSHOT = 1
    STEP = 2


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its kind, its values, and where it stands in its part."""

    kind: Kind
    values: Any
    offset: int = 0


def frame(kind: Kind, values: Any, pack: Callable[[Any], bytes] = msgpack.packb) -> bytes:
    """The bytes of a record.  `pack`: of a Packer, where there are many records."""
    payload = pack(values)
    crc = zlib.crc32(payload, kind)
    return _HEAD.pack(len(payload), crc, kind) + payload


class Parser:
    """Cuts bytes that arrive piece by piece into records.

    `torn`: bytes at the end that are no whole record, or have followed one that is damaged.  Another MAGIC may stand between
    two records, as where parts are joined to one file.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = self._offset = 0  # the next record in _data, and _data in the part
        self._begun = self._damaged = False

    @property
    def torn(self) -> int:
        return len(self._data) - self._at

    def feed(self, data: bytes | memoryview) -> Iterator[Record]:
        """Take in the next bytes; yields the records that they complete.  Raises UserError if this is no journal."""
        self._data += data
        while not self._damaged and (record := self._next()) is not None:
            yield record
        self._offset += self._at
        del self._data[: self._at]
        self._at = 0

    def _next(self) -> Record | None:
        at = self._at
        if MAGIC.startswith(begin := bytes(self._data[at : at + len(MAGIC)])):
            if len(begin) < len(MAGIC):
                return None
            self._begun = True
            self._at = at = at + len(MAGIC)
        elif not self._begun:
            raise UserError("this is no journal of minisgl: it does not begin like one")
        if len(self._data) < at + _HEAD.size:
            return None
        size, crc, kind = _HEAD.unpack_from(self._data, at)
        end = at + _HEAD.size + size
        if size <= MAX_RECORD and len(self._data) < end:
            return None
        payload = bytes(self._data[at + _HEAD.size : end]) if size <= MAX_RECORD else b""
        if kind not in _KINDS or zlib.crc32(payload, kind) != crc:
            self._damaged = True
            return None
        self._at = end
        return Record(Kind(kind), msgpack.unpackb(payload, use_list=True, strict_map_key=False), self._offset + at)
