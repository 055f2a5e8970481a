"""Writes Perfetto's format (perfetto.dev: protos/perfetto/trace), which is protobuf: a few messages, encoded by hand.

Each field is its number and type in one varint, then its value: a varint, eight bytes, or a length and bytes.  All packets are
of one sequence, in which names are written once and referred to by number (interned).  Times are those of CLOCK_MONOTONIC, in
nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MONOTONIC, REALTIME = 3, 1  # perfetto.protos.BuiltinClock
BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4  # perfetto.protos.TrackEvent.Type
_SEQUENCE = 1


def varint(n: int) -> bytes:
    """A number, seven bits a byte, the lowest first; negative ones as 64 bits."""
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


_SMALL = tuple(map(varint, range(1 << 12)))


def number(field: int, value: int) -> bytes:
    """A field with a number."""
    return varint(field << 3) + (_SMALL[value] if 0 <= value < len(_SMALL) else varint(value))


def fixed(field: int, value: int) -> bytes:
    """A field with eight bytes."""
    return varint(field << 3 | 1) + value.to_bytes(8, "little")


def data(field: int, value: bytes | str) -> bytes:
    """A field with bytes, a text or a message."""
    raw = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(raw)) + raw


class Writer:
    """A file in the making: its bytes are `out`."""

    def __init__(self, snapshot: Mapping[int, int]) -> None:
        """`snapshot`: what the clocks showed at one moment, by their numbers."""
        self.out = bytearray()
        self._names: tuple[dict[str, int], dict[str, int]] = {}, {}  # interned: of events, of arguments
        self._new = b""  # InternedData for the next packet
        clocks = b"".join(data(1, number(1, clock) + number(2, at)) for clock, at in snapshot.items())
        defaults = data(59, number(58, MONOTONIC))
        self._packet(number(13, 1) + number(87, 1) + defaults)
        self._packet(number(13, 2) + number(8, snapshot[MONOTONIC]) + data(6, clocks + number(2, MONOTONIC)))
        self._rest = number(10, _SEQUENCE) + number(13, 2)

    def _packet(self, body: bytes) -> None:
        self.out += data(1, number(10, _SEQUENCE) + body)

    def _interned(self, kind: int, name: str) -> int:
        known = self._names[kind]
        if (found := known.get(name)) is None:
            found = known[name] = len(known) + 1
            self._new += data((2, 3)[kind], number(1, found) + data(2, name))
        return found

    # ---------------- tracks
    def process(self, uuid: int, pid: int, name: str) -> None:
        self._packet(data(60, number(1, uuid) + data(3, number(1, pid) + data(6, name))))

    def thread(self, uuid: int, pid: int, tid: int, name: str) -> None:
        self._packet(data(60, number(1, uuid) + data(4, number(1, pid) + number(2, tid) + data(5, name))))

    def track(self, uuid: int, name: str, parent: int = 0, *, counter: bool = False) -> None:
        """A track below a process or another track."""
        above = number(5, parent) if parent else b""
        self._packet(data(60, number(1, uuid) + data(2, name) + above + (data(8, b"") if counter else b"")))

    # ---------------- events
    def event(
        self,
        kind: int,
        track: int,
        at: int,
        name: str = "",
        args: Mapping[str, int | str] | None = None,
        *,
        starts: Iterable[int] = (),
        ends: Iterable[int] = (),
        value: int = 0,
    ) -> None:
        """An event of a track at `at`.  `starts`, `ends`: flows that begin and end with it."""
        parts = [number(9, kind), number(11, track)]
        if name:
            parts.append(number(10, self._interned(0, name)))
        if kind == COUNTER:
            parts.append(number(30, value))
        for key, x in args.items() if args else ():
            what = data(6, x) if isinstance(x, str) else number(4, x)
            parts.append(data(4, number(1, self._interned(1, key)) + what))
        parts += [fixed(47, flow) for flow in starts]
        parts += [fixed(48, flow) for flow in ends]
        new, self._new = data(12, self._new) if self._new else b"", b""
        body = b"".join((number(8, at), self._rest, new, data(11, b"".join(parts))))
        self.out += b"\x0a" + varint(len(body)) + body
