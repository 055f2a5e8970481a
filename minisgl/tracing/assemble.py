"""Puts the events of all processes together to one file for Perfetto.  Runs where no step waits for it.

Its input is a spool: a head, then Traced messages as they came, each [name, pid, events] in msgpack.  A torn end is ignored.

    a process            tracks: its thread, a worker's device (steps, and "idle" between them), kernels
    requests             a track for each: queued, prefill with its chunks, decode with an instant for each token, end
    arrows               from what has sent to what has received it, where both are known
"""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from minisgl.sampling_params import Finish
from minisgl.tracing.perfetto import BEGIN, COUNTER, END, INSTANT, MONOTONIC, REALTIME, Writer
from minisgl.tracing.probe import DEVICE, IN, REQUESTS, unpacked

MAGIC = b"minisgl trace 1\n"
COUNTERS = ("running", "waiting", "free_pages")  # of each plan
IDLE_NS = 1000  # a shorter gap is no idle time


@dataclass(slots=True)
class Slice:
    """A span of a track; `starts` and `ends` are flows.  begin == end and `instant`: a moment."""

    begin: int
    end: int
    name: str
    args: Any = None
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    instant: bool = False


def pack(name: str, pid: int, events: bytes) -> bytes:
    """What a spool has of a message."""
    packed: bytes = msgpack.packb([name, pid, events])
    return packed


def head(monotonic: int, real: int) -> bytes:
    """The beginning of a spool: what two clocks showed at one moment, in nanoseconds."""
    return MAGIC + struct.pack("<QQ", monotonic, real)


def read(spool: bytes) -> Iterator[tuple[str, int, bytes]]:
    """The messages of a spool: the name and pid of a process, and events."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(spool) + 1)
    unpacker.feed(spool[len(MAGIC) + 16 :])
    yield from unpacker


class _Timeline:
    """All tracks: slices by (process, track), of which the first is (name, pid)."""

    def __init__(self, spool: bytes) -> None:
        self.tracks: dict[tuple[tuple[str, int], str], list[Slice]] = defaultdict(list)
        self.notes: list[tuple[int, Any]] = []  # about requests
        self._sent: dict[tuple[str, str, int], list[tuple[int, Slice]]] = defaultdict(list)
        self._received: list[tuple[int, str, str, int, Slice]] = []
        self.last = 0
        for name, pid, events in read(spool):
            for track, begin, end, what, args, hop in unpacked(events):
                self.last = max(self.last, end)
                if track == REQUESTS:
                    self.notes.append((begin, args))
                    continue
                made = Slice(begin, end, what, args)
                self.tracks[(name, pid), track].append(made)
                if hop is not None:
                    self._hop(name, begin, made, hop)
        self._connect()
        for slices in self.tracks.values():
            slices.reverse()  # a slice is noted when it ends, so outer ones come later
            slices.sort(key=lambda s: (s.begin, -s.end))
        self._idle()

    def _hop(self, name: str, begin: int, made: Slice, hop: Any) -> None:
        direction, kind, key, *receivers = hop
        if direction == IN:
            self._received.append((begin, name, kind, key, made))
        else:
            for to in receivers[0]:
                self._sent[kind, to, key].append((begin, made))

    def _connect(self) -> None:
        """Match what was received with what was sent, in order of time; what only one side knows gets no arrow.

        Who looks into a ring may begin to look just before the record comes.
        """
        waiting = {of: deque(sorted(sent, key=lambda s: s[0])) for of, sent in self._sent.items()}
        flow = 0
        for begin, name, kind, key, made in sorted(self._received, key=lambda r: r[0]):
            sent = waiting.get((kind, name, key))
            if sent and sent[0][0] <= made.end:
                flow += 1
                at, sender = sent.popleft()
                sender.starts.append(flow)
                made.ends.append(flow)
                made.begin = max(begin, at)

    def _idle(self) -> None:
        """What lies between the steps of a device, and between all that a scheduler does."""
        for ((name, _), track), slices in self.tracks.items():
            if track == DEVICE or (track == "" and name == "scheduler"):
                end, gaps = slices[0].begin, []
                for s in slices:
                    if s.begin - end >= IDLE_NS:
                        gaps.append(Slice(end, s.begin, "idle"))
                    end = max(end, s.end)
                slices.extend(gaps)
                slices.sort(key=lambda s: (s.begin, -s.end))

    # ---------------- requests
    def requests(self) -> dict[int, list[Slice]]:
        """The slices of each request's track, outer ones first."""
        steps = {s.args["step"]: s for (_, track), slices in self.tracks.items() if track == DEVICE for s in slices if s.args}
        lives: dict[int, _Life] = defaultdict(_Life)
        for _, _, kind, uid, made in self._received:
            if kind == "Generate":
                lives[uid].queued = made.end
        for at, (step, started, chunks, rows, vectors) in sorted(self.notes, key=lambda n: n[0]):
            for uid, cached in started:
                lives[uid].started, lives[uid].cached = at, cached
            for uid, n in chunks:
                lives[uid].chunks.append((step, n))
            for uids, counts, finish in rows:
                columns = np.frombuffer(uids, np.int64), np.frombuffer(counts, np.uint8), np.frombuffer(finish, np.uint8)
                for uid, count, end in zip(*(c.tolist() for c in columns), strict=True):
                    lives[uid].tokens += [at] * count
                    lives[uid].finish = (at, Finish(end).name.lower()) if end else lives[uid].finish
            for uid in vectors:
                lives[uid].finish = (at, "vector")
        return {uid: list(life.slices(steps, self.last)) for uid, life in sorted(lives.items())}


@dataclass(slots=True)
class _Life:
    """What is known of a request; 0: nothing."""

    queued: int = 0
    started: int = 0
    cached: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)  # step, tokens
    tokens: list[int] = field(default_factory=list)
    finish: tuple[int, str] | None = None

    def slices(self, steps: dict[int, Slice], last: int) -> Iterator[Slice]:
        end = self.finish[0] if self.finish else last
        first = self.tokens[0] if self.tokens else end
        if self.queued:
            yield Slice(self.queued, max(self.queued, self.started or end), "queued")
        ran = [(steps[step], n) for step, n in self.chunks if step in steps]
        if self.started or ran:
            begin = self.started or min((s.begin for s, _ in ran), default=first)
            yield Slice(begin, max(begin, first), "prefill", {"cached_tokens": self.cached} if self.started else None)
            yield from (_chunk(step, n, begin, first) for step, n in ran if step.begin < first)
        if self.tokens:
            yield Slice(first, max(first, end), "decode", {"tokens": len(self.tokens)})
            again = [_chunk(step, n, first, end) for step, n in ran if step.begin >= first]  # its pages had been taken away
            said = [Slice(at, at, "token", {"n": n}, instant=True) for n, at in enumerate(self.tokens)]
            yield from sorted([*again, *said], key=lambda s: s.begin)
        if self.finish:
            yield Slice(end, end, "end", {"reason": self.finish[1]}, instant=True)


def lanes(slices: list[Slice]) -> list[list[Slice]]:
    """Slices in order of their beginnings, on as few lanes as let them nest in each."""
    out: list[list[Slice]] = []
    ends: list[list[int]] = []  # of the open slices of each
    for s in slices:
        for of in ends:
            while of and of[-1] <= s.begin:
                of.pop()
        i = next((i for i, of in enumerate(ends) if not of or s.end <= of[-1]), len(out))
        if i == len(out):
            out.append([])
            ends.append([])
        out[i].append(s)
        ends[i].append(s.end)
    return out


def _chunk(step: Slice, n: int, begin: int, end: int) -> Slice:
    """A part of a prompt, while its step ran, inside of a slice."""
    at = min(max(step.begin, begin), end)
    return Slice(at, max(at, min(step.end, end)), "chunk", {"tokens": n, "step": step.args["step"]})


_Event = tuple[int, int, int, Slice]  # when, kind, track, of what
_Counter = tuple[int, int, int]  # when, track, value


def _events(track: int, slices: list[Slice]) -> Iterator[_Event]:
    """Begins and ends in the order in which they nest; `slices` are of one lane."""
    ends: list[Slice] = []
    for s in slices:
        while ends and ends[-1].end <= s.begin and not (s.instant and ends[-1].end == s.begin):
            yield ends[-1].end, END, track, ends.pop()
        if s.instant:
            yield s.begin, INSTANT, track, s
        else:
            yield s.begin, BEGIN, track, s
            ends.append(s)
    while ends:
        yield ends[-1].end, END, track, ends.pop()


def assemble(spool: bytes, limit: int = 0) -> bytes:
    """The file.  `limit`: bytes, 0: none.

    A trace that would be larger ends earlier: what is open then ends there.
    """
    monotonic, real = struct.unpack_from("<QQ", spool, len(MAGIC))
    line = _Timeline(spool)
    requests = line.requests()
    most: int | None = None
    while True:
        writer = Writer({MONOTONIC: monotonic, REALTIME: real})
        events, counters = _tracks(writer, line, requests)
        events = sorted(events, key=lambda e: e[0])[:most]
        _write(writer, events, counters)
        if not limit or len(writer.out) <= limit:
            return bytes(writer.out)
        most = int(len(events) * limit / len(writer.out) * 0.95)


def _tracks(writer: Writer, line: _Timeline, requests: dict[int, list[Slice]]) -> tuple[list[_Event], list[_Counter]]:
    """Describe all tracks; returns their events and counters."""
    events: list[_Event] = []
    counters: list[_Counter] = []
    uuid = 0
    processes: dict[tuple[str, int], int] = {}
    for (process, track), slices in sorted(line.tracks.items(), key=lambda t: t[0]):
        name, pid = process
        if process not in processes:
            processes[process] = uuid = uuid + 1
            writer.process(uuid, pid, f"minisgl::{name}")
        for i, lane in enumerate(lanes(slices)):
            uuid += 1
            if track or i:
                writer.track(uuid, (track or name) + (f" ({i + 1})" if i else ""), processes[process])
            else:
                writer.thread(uuid, pid, pid, name)
            events += _events(uuid, lane)
        plans = [s for s in slices if s.args and COUNTERS[0] in s.args] if name == "scheduler" else []
        for key in COUNTERS if plans else ():
            uuid += 1
            writer.track(uuid, key.replace("_", " "), processes[process], counter=True)
            counters += [(s.end, uuid, s.args[key]) for s in plans]
    if requests:
        uuid = above = uuid + 1
        writer.track(above, "requests")
    for uid, life in requests.items():
        uuid += 1
        writer.track(uuid, f"request {uid}", above)
        events += _events(uuid, life)
    return events, counters


def _write(writer: Writer, events: list[_Event], counters: list[_Counter]) -> None:
    """All packets; `events` are in order of time, and what has not ended by then ends with the last of them."""
    flows = {flow for _, kind, _, s in events if kind == BEGIN for flow in s.ends}
    open_slices: dict[int, int] = defaultdict(int)  # by track
    last = events[-1][0] if events else 0
    for at, kind, track, s in events:
        if kind == END:
            open_slices[track] -= 1
            writer.event(END, track, at)
        else:
            open_slices[track] += kind == BEGIN
            writer.event(kind, track, at, s.name, s.args, starts=[f for f in s.starts if f in flows], ends=s.ends)
    for track, n in open_slices.items():
        for _ in range(n):
            writer.event(END, track, last)
    for at, track, value in counters:
        if at <= last:
            writer.event(COUNTER, track, at, value=value)
