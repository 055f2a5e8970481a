"""Reads a file for Perfetto again, and says how well the work of the scheduler and that of the device overlap.

device busy        share of the time from the begin of the first step to the end of the last one in which the device
                   (on a CPU: the worker) computed a step; the rest are the bubbles between steps
scheduler hidden   share of the scheduler's work in that time during which the device computed, too
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minisgl.errors import UserError
from minisgl.tracing.perfetto import BEGIN, COUNTER, END, INSTANT

Span = tuple[int, int]


def fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message, with their numbers.  Raises UserError where it is none."""
    at, end = 0, len(raw)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < end and shift < 70:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise UserError("this is no trace: it is damaged, or of another format")

    while at < end:
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire, 0) if wire != 2 else varint()
        if not key >> 3 or wire not in (1, 2, 5) or at + size > end:
            raise UserError("this is no trace: it is damaged, or of another format")
        value = raw[at : at + size]
        at += size
        yield key >> 3, value if wire == 2 else int.from_bytes(value, "little")


@dataclass(slots=True)
class Event:
    """A slice, a moment (begin == end) or, with `value`, a counter's value."""

    begin: int
    end: int
    name: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)  # flows
    ends: list[int] = field(default_factory=list)
    depth: int = 0
    value: int | None = None


@dataclass(slots=True)
class Track:
    """A track: `process` is the name of the one that it belongs to, "" for others."""

    name: str = ""
    process: str = ""
    parent: int = 0
    pid: int = 0
    events: list[Event] = field(default_factory=list)


def parse(raw: bytes) -> dict[int, Track]:
    """The tracks by uuid.  Raises UserError where the file is not whole, or its slices do not nest."""
    tracks: dict[int, Track] = {}
    names: tuple[dict[int, str], dict[int, str]] = {}, {}
    stacks: dict[int, list[Event]] = {}
    processes: dict[int, str] = {}  # by pid
    for number, packet in fields(raw):
        if number != 1:
            raise UserError("this is no trace of Perfetto")
        body = dict(fields(packet))
        for kind, interned in fields(body.get(12, b"")):
            entry = dict(fields(interned))
            if kind in (2, 3):
                names[kind - 2][entry[1]] = entry[2].decode()
        if 60 in body:
            _describe(tracks, processes, body[60])
        elif 11 in body:
            _event(tracks, stacks, names, body[8], list(fields(body[11])))
    if any(stacks.values()):
        raise UserError("this trace is not whole: some slices have no end")
    for track in tracks.values():
        above = track
        while above.parent in tracks and not above.pid:
            above = tracks[above.parent]
        track.process = processes.get(above.pid, "")
    return tracks


def _describe(tracks: dict[int, Track], processes: dict[int, str], raw: bytes) -> None:
    d = dict(fields(raw))
    track = tracks[d[1]] = Track(d.get(2, b"").decode(), parent=d.get(5, 0))
    for kind, name in ((3, 6), (4, 5)):
        if kind in d:
            about = dict(fields(d[kind]))
            track.pid, track.name = about[1], about[name].decode()
            if kind == 3:
                processes[track.pid] = track.name.removeprefix("minisgl::")


def _event(
    tracks: dict[int, Track],
    stacks: dict[int, list[Event]],
    names: tuple[dict[int, str], dict[int, str]],
    at: int,
    parts: list[tuple[int, Any]],
) -> None:
    known = dict(parts)
    kind, track, stack = known[9], tracks[known[11]], stacks.setdefault(known[11], [])
    if kind == END:
        if not stack:
            raise UserError("this trace is damaged: a slice ends that has not begun")
        stack.pop().end = at
        return
    event = Event(at, at, names[0][known[10]] if 10 in known else "", depth=len(stack))
    event.starts, event.ends = ([value for n, value in parts if n == number] for number in (47, 48))
    for number, raw in parts:
        if number == 4:
            arg = dict(fields(raw))
            event.args[names[1][arg[1]]] = arg[6].decode() if 6 in arg else arg.get(4, 0)
    if kind == BEGIN:
        stack.append(event)
    elif kind == COUNTER:
        event.value = known[30]
    elif kind != INSTANT:
        raise UserError(f"this trace has an event of kind {kind}, which minisgl does not write")
    track.events.append(event)


# ---------------- how well it overlaps
def union(spans: list[Span]) -> list[Span]:
    """The same times without overlaps, in order."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((begin, end))
    return out


def common(a: list[Span], b: list[Span]) -> int:
    """Nanoseconds that two unions have in common."""
    total = i = j = 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def overlap(tracks: dict[int, Track]) -> dict[str, Any]:
    """The numbers of this module's docstring; None where there are no steps."""
    steps = [(e.begin, e.end) for e in _named(tracks, "worker0", "device")]
    work = [(e.begin, e.end) for e in _named(tracks, "scheduler", "scheduler") if not e.depth]
    out: dict[str, Any] = {"steps": len(steps), "seconds": 0.0, "device_busy": None, "scheduler_hidden": None}
    if steps:
        first, last = min(begin for begin, _ in steps), max(end for _, end in steps)
        device = union(steps)
        scheduler = union([(max(b, first), min(e, last)) for b, e in work if b < last and e > first])
        whole = sum(e - b for b, e in scheduler)
        out["seconds"] = (last - first) * 1e-9
        out["device_busy"] = sum(e - b for b, e in device) / max(1, last - first)
        out["scheduler_hidden"] = common(device, scheduler) / whole if whole else None
    return out


def _named(tracks: dict[int, Track], process: str, track: str) -> list[Event]:
    """The slices of a track in which something is done."""
    return [
        e
        for t in tracks.values()
        if (t.process, t.name) == (process, track)
        for e in t.events
        if e.value is None and e.name != "idle"
    ]
