"""Implements a broadcast ring in shared memory: one writer, N readers, records of any length, no locks, no wake-ups.

    header   word 0        tail: position (bytes ever written) after the newest record        written by the writer
             word 1        starved: the writer waits for room, ring its doorbell              written by the writer
             word 8(1+r)   head of reader r: position up to which it has read                 written by reader r
             word 8(1+r)+1 parked: reader r sleeps, ring its doorbell                         written by reader r
    data     records, 16-byte aligned: u32 crc | u32 nbytes | i64 position | payload          written by the writer
             nbytes = WRAP: nothing more before the end of the buffer, go on at its start

Correct without memory fences: a reader accepts a record only if its position and checksum match, so a half-visible record
(weakly ordered CPU, torn copy) looks like "not yet there" and is read again.  Counters are stored through
`memoryview.cast("q")`, one aligned 8-byte store; `struct.pack_into` would zero its target first, and another process can see
the zero.

The memory is anonymous (`memfd_create`): it has no name, so it cannot leak or collide, and the kernel frees it with its last
user, however that died.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from dataclasses import dataclass

from minisgl.actors.wire import BadMessage

_LINE = 8  # words per cache line: words with different writers never share one
_RECORD = struct.Struct("<IIq")
_ALIGN = 16
_WRAP = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Arena:
    """Where a piece of shared memory is: enough to attach to it from another process of the same user."""

    path: str  # /proc/<owner>/fd/<n>
    size: int  # bytes


def create_arena(name: str, size: int) -> tuple[Arena, int]:
    """Make anonymous shared memory.  Returns its address and the descriptor that keeps it alive (close it when done)."""
    fd = os.memfd_create(f"minisgl-{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return Arena(f"/proc/{os.getpid()}/fd/{fd}", size), fd


def attach(arena: Arena, size: int = 0) -> mmap.mmap:
    """Map an arena into this process.  Raises OSError if its owner is gone.  `size`: of one that was made without a size."""
    fd = os.open(arena.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if size:
            os.ftruncate(fd, size)
        return mmap.mmap(fd, size or arena.size)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class RingSpec:
    """Address and shape of a ring; travels in the spawn arguments.  `capacity` is in bytes, a multiple of 16."""

    arena: Arena
    readers: int
    capacity: int


def _header_bytes(readers: int) -> int:
    return -(-(8 * _LINE * (1 + readers)) // 4096) * 4096


def create_ring(name: str, readers: int, capacity: int) -> tuple[RingSpec, int]:
    """Make an empty ring.  Returns its spec and the descriptor that keeps it alive."""
    capacity = -(-capacity // 4096) * 4096
    arena, fd = create_arena(name, _header_bytes(readers) + capacity)
    return RingSpec(arena, readers, capacity), fd


class _Mapped:
    def __init__(self, spec: RingSpec) -> None:
        self.spec = spec
        self._map = attach(spec.arena)
        view = memoryview(self._map)
        header = _header_bytes(spec.readers)
        self._words = view[:header].cast("q")
        self._data = view[header : header + spec.capacity]


def _span(nbytes: int) -> int:
    """Bytes that a record of `nbytes` payload takes."""
    return -(-(_RECORD.size + nbytes) // _ALIGN) * _ALIGN


class RingWriter(_Mapped):
    """The one writer of a ring."""

    def _free(self) -> int:
        words = self._words
        slowest = min(words[_LINE * (1 + r)] for r in range(self.spec.readers))
        return self.spec.capacity - (words[0] - slowest)

    def _needed(self, nbytes: int) -> tuple[int, int]:
        """(bytes skipped at the end of the buffer, bytes of the record)"""
        to_end = self.spec.capacity - self._words[0] % self.spec.capacity
        span = _span(nbytes)
        return (to_end, span) if span > to_end else (0, span)

    def has_room(self, nbytes: int) -> bool:
        """Whether a record of `nbytes` can be published now."""
        return sum(self._needed(nbytes)) <= self._free()

    def publish(self, payload: bytes) -> int:
        """Append one record and return its position.

        Raises BufferError when a reader is too far behind, ValueError when the record could never fit.
        """
        if 2 * _span(len(payload)) > self.spec.capacity:
            raise ValueError(f"a record of {len(payload)} bytes does not fit a ring of {self.spec.capacity} bytes")
        skip, span = self._needed(len(payload))
        if skip + span > self._free():
            raise BufferError("the ring is full: a reader is behind")
        pos = self._words[0]
        if skip:
            at = pos % self.spec.capacity
            self._data[at : at + _RECORD.size] = _RECORD.pack(zlib.crc32(b"", pos & 0xFFFFFFFF), _WRAP, pos)
            pos += skip
        at = pos % self.spec.capacity
        self._data[at + _RECORD.size : at + _RECORD.size + len(payload)] = payload
        self._data[at : at + _RECORD.size] = _RECORD.pack(zlib.crc32(payload, pos & 0xFFFFFFFF), len(payload), pos)
        self._words[0] = pos + span
        return pos

    def starve(self, flag: bool) -> None:
        """Ask the readers to ring my doorbell when they have made room."""
        self._words[1] = int(flag)

    def parked(self) -> list[int]:
        """The readers that sleep: the writer must ring them after it publishes."""
        return [r for r in range(self.spec.readers) if self._words[_LINE * (1 + r) + 1]]


class RingReader(_Mapped):
    """Reader `rank` of a ring."""

    def __init__(self, spec: RingSpec, rank: int = 0) -> None:
        super().__init__(spec)
        self._at = _LINE * (1 + rank)
        self._head = self._words[self._at]

    def pending(self) -> bool:
        """Whether something has been published that I have not read."""
        return bool(self._words[0] > self._head)

    def starved(self) -> bool:
        """Whether the writer waits for room."""
        return bool(self._words[1])

    def take(self, expected: int | None = None) -> bytes | None:
        """The next record (copied), or None if there is none that is entirely visible yet, or none of `expected` bytes."""
        while self.pending():
            at = self._head % self.spec.capacity
            crc, nbytes, pos = _RECORD.unpack_from(self._data, at)
            if pos != self._head:
                return None
            if nbytes == _WRAP:
                if crc != zlib.crc32(b"", pos & 0xFFFFFFFF):
                    return None
                self._advance(self.spec.capacity - at)
                continue
            if at + _RECORD.size + nbytes > self.spec.capacity or (expected is not None and nbytes != expected):
                return None
            payload = bytes(self._data[at + _RECORD.size : at + _RECORD.size + nbytes])
            if zlib.crc32(payload, pos & 0xFFFFFFFF) != crc:
                return None
            self._advance(_span(nbytes))
            return payload
        return None

    def take_now(self, nbytes: int | None = None) -> bytes:
        """The next record, which a message has announced.  Raises BadMessage, and takes none, if none becomes visible.

        `nbytes`: the length of the record as announced, None for any.
        """
        for _ in range(10_000):  # its writer has made a system call since: nothing is on the way for long
            if (payload := self.take(nbytes)) is not None:
                return payload
        raise BadMessage("a record was announced but is not in the ring")

    def _advance(self, nbytes: int) -> None:
        self._head += nbytes
        self._words[self._at] = self._head

    def park(self, flag: bool) -> None:
        """Raise or lower my "ring my doorbell" flag."""
        self._words[self._at + 1] = int(flag)
