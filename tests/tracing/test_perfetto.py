"""Files for Perfetto: the encoding, what is assembled from events, and the numbers that are read from it again."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import numpy as np
import pytest

from minisgl.commands.trace import about
from minisgl.errors import UserError
from minisgl.tracing.assemble import Slice, assemble, head, lanes, pack
from minisgl.tracing.perfetto import BEGIN, COUNTER, END, Writer, varint
from minisgl.tracing.probe import IN, OUT, Batch
from minisgl.tracing.summary import common, fields, overlap, parse, union
from scripts.check.trace import faults

PIDS = {"api": 1, "scheduler": 2, "worker0": 3, "detokenizer": 4}


def spool(events: dict[str, list[tuple[Any, ...]]]) -> bytes:
    """A spool of events without their ends: (track, begin, end, name, args, hop)."""
    return head(1_000, 1_700_000_000_000_000_000) + b"".join(pack(name, PIDS[name], packed(of)) for name, of in events.items())


def packed(events: list[tuple[Any, ...]]) -> bytes:
    batch = Batch()
    for track, begin, end, name, *more in events:
        args, hop = [*more, None, None][:2]
        batch.add(begin, end, name, args, hop, track=track)
    return batch.take()


def step(n: int, begin: int, end: int) -> tuple[Any, ...]:
    return ("device", begin, end, "step", {"step": n})


def named(raw: bytes, process: str, track: str) -> list[tuple[str, int, int]]:
    found = [t for t in parse(raw).values() if (t.process, t.name) == (process, track)]
    return [(e.name, e.begin, e.end) for t in found for e in t.events]


@pytest.mark.parametrize("n", [0, 1, 127, 128, 300, (1 << 28) - 1, 1 << 28, (1 << 63) - 1, -1])
def test_a_number_is_seven_bits_a_byte(n: int) -> None:
    raw = varint(n)
    assert sum((b & 127) << 7 * i for i, b in enumerate(raw)) == n % (1 << 64)
    assert [b >> 7 for b in raw] == [1] * (len(raw) - 1) + [0]


def test_the_overlap_of_a_scripted_schedule_is_the_exact_number() -> None:
    """Steps from 100 to 900 with 200 idle; the scheduler works for 200 of that time, 50 of them while the device waits."""
    work = [("", 40, 60, "step"), ("", 90, 150, "step"), ("", 400, 500, "step"), ("", 800, 850, "step"), ("", 890, 999, "step")]
    raw = assemble(spool({"scheduler": work, "worker0": [step(0, 100, 450), step(1, 650, 900)]}))
    found = overlap(parse(raw))
    assert found["steps"] == 2
    assert found["device_busy"] == 600 / 800
    assert found["scheduler_hidden"] == (50 + 50 + 50 + 10) / (50 + 100 + 50 + 10)
    assert found["seconds"] == pytest.approx(800e-9)


def test_without_steps_nothing_overlaps() -> None:
    raw = assemble(spool({"scheduler": [("", 10, 20, "step")]}))
    assert about(raw)["device_busy"] is None


def test_the_time_between_steps_is_a_slice_of_its_own() -> None:
    raw = assemble(spool({"worker0": [step(0, 0, 5000), step(1, 5000, 6000), step(2, 9000, 9500)]}))
    steps = [("step", 0, 5000), ("step", 5000, 6000), ("idle", 6000, 9000), ("step", 9000, 9500)]
    assert named(raw, "worker0", "device") == steps


def test_an_arrow_goes_from_who_has_sent_to_who_has_received_it() -> None:
    def sent(at: int, kind: str, key: int, to: str) -> tuple[Any, ...]:
        return ("", at, at + 5, f"send {kind}", None, (OUT, kind, key, [to]))

    def received(at: int, kind: str, key: int) -> tuple[Any, ...]:
        return ("", at, at + 5, kind, None, (IN, kind, key))

    events = {
        # The first one was on its way when the trace began, the last one is when it ends.
        "scheduler": [sent(20, "Tokens", 7, "detokenizer"), sent(40, "Tokens", 7, "detokenizer"), sent(90, "Tokens", 8, "api")],
        "detokenizer": [
            received(10, "Tokens", 7),
            received(30, "Tokens", 7),
            received(50, "Tokens", 7),
            received(60, "Tokens", 7),
        ],
    }
    tracks = parse(assemble(spool(events)))
    assert not list(faults(tracks))
    arrows = {flow: e.begin for t in tracks.values() for e in t.events for flow in e.starts}
    assert {arrows[flow]: e.begin for t in tracks.values() for e in t.events for flow in e.ends} == {20: 30, 40: 50}


def test_a_plan_has_an_arrow_to_each_rank() -> None:
    taken = ("", 30, 35, "take plan", {"step": 4}, (IN, "plan", 4))
    events = {
        "scheduler": [("", 20, 28, "publish", {"step": 4}, (OUT, "plan", 4, ["worker0", "detokenizer"]))],
        "worker0": [taken],
        "detokenizer": [("", 18, 35, "take plan", {"step": 4}, (IN, "plan", 4))],  # it looked before there was one
    }
    tracks = parse(assemble(spool(events)))
    assert not list(faults(tracks))
    assert sum(len(e.starts) for t in tracks.values() for e in t.events) == 2


def note(at: int, step: int = -1, started: Any = (), chunks: Any = (), rows: Any = ()) -> tuple[Any, ...]:
    arrays = [
        (np.array(u, np.int64).tobytes(), np.array(c, np.uint8).tobytes(), np.array(f, np.uint8).tobytes()) for u, c, f in rows
    ]
    return ("requests", at, at, "", (step, started, chunks, arrays, ()))


def test_the_track_of_a_request_has_its_life() -> None:
    events = {
        "scheduler": [
            ("", 10, 12, "Generate", None, (IN, "Generate", 5)),
            note(20, 0, [(5, 16)], [(5, 30)]),
            note(40, 1, (), [(5, 20)]),
            note(70, rows=[([5, 6], [1, 1], [0, 0])]),
            note(90, rows=[([5], [1], [2])]),
            note(95, rows=[([6], [1], [0])]),
        ],
        "worker0": [step(0, 25, 45), step(1, 50, 65), step(2, 70, 90)],
    }
    raw = assemble(spool(events))
    tracks = parse(raw)
    assert not list(faults(tracks))
    assert named(raw, "", "request 5") == [
        ("queued", 12, 20),
        ("prefill", 20, 70),
        ("chunk", 25, 45),
        ("chunk", 50, 65),
        ("decode", 70, 90),
        ("token", 70, 70),
        ("token", 90, 90),
        ("end", 90, 90),
    ]
    assert named(raw, "", "request 6") == [("decode", 70, 95), ("token", 70, 70), ("token", 95, 95)]  # it has begun before
    (life,) = (t for t in tracks.values() if t.name == "request 5")
    assert [e.depth for e in life.events] == [0, 0, 1, 1, 0, 1, 1, 1]
    assert [e.args for e in life.events if e.name in ("prefill", "end")] == [{"cached_tokens": 16}, {"reason": "length"}]


def test_a_request_whose_pages_were_taken_away_has_later_chunks_in_its_decode() -> None:
    events = {
        "scheduler": [
            ("", 10, 12, "Generate", None, (IN, "Generate", 5)),
            note(20, 0, [(5, 0)], [(5, 30)]),
            note(40, rows=[([5], [1], [0])]),
            note(50, 1, (), [(5, 31)]),
            note(90, rows=[([5], [1], [1])]),
        ],
        "worker0": [step(0, 25, 35), step(1, 55, 80)],
    }
    raw = assemble(spool(events))
    assert not list(faults(parse(raw)))
    names = [name for name, _, _ in named(raw, "", "request 5")]
    assert names == ["queued", "prefill", "chunk", "decode", "token", "chunk", "token", "end"]


def test_a_trace_that_is_too_large_ends_earlier_and_is_whole() -> None:
    hops = [("", 10 * i, 10 * i + 4, "publish", {"step": i}, (OUT, "plan", i, ["worker0"])) for i in range(900)]
    takes = [("", 10 * i + 2, 10 * i + 9, "take plan", {"step": i}, (IN, "plan", i)) for i in range(900)]
    whole = {"scheduler": [*hops, ("", 10_000, 10_001, "step")], "worker0": [*takes, step(0, 1, 9_990)]}
    size = len(assemble(spool(whole)))
    for limit in (size, size // 2, size // 10, 2000):
        raw = assemble(spool(whole), limit)
        assert len(raw) <= limit
        assert len(raw) > limit / 2
        assert not list(faults(parse(raw)))


@pytest.mark.parametrize("seed", range(20))
def test_random_slices_nest_on_their_lanes_and_none_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    spans = [(b, b + rng.randrange(0, 30)) for b in (rng.randrange(200) for _ in range(60))]
    slices = sorted((Slice(b, e, "x") for b, e in spans), key=lambda s: (s.begin, -s.end))
    assert sorted((s.begin, s.end) for lane in lanes(slices) for s in lane) == sorted(spans)
    raw = assemble(spool({"api": [("", b, e, "x") for b, e in spans]}))
    assert not list(faults(parse(raw)))
    assert about(raw)["processes"] == ["api"]
    assert sum(len(t.events) for t in parse(raw).values()) == len(spans)


@pytest.mark.parametrize("seed", range(10))
def test_unions_and_what_they_have_in_common_are_those_of_sets(seed: int) -> None:
    rng = random.Random(seed)
    a, b = ([(x, x + rng.randrange(9)) for x in (rng.randrange(60) for _ in range(12))] for _ in range(2))
    sets = [{i for begin, end in spans for i in range(begin, end)} for spans in (a, b)]
    assert sum(end - begin for begin, end in union(a)) == len(sets[0])
    assert common(union(a), union(b)) == len(sets[0] & sets[1])


def test_a_torn_spool_is_a_trace_of_what_is_whole() -> None:
    raw = spool({"worker0": [step(0, 0, 10)], "scheduler": [("", 0, 5, "step")]})
    for end in range(len(head(0, 0)), len(raw)):
        tracks = parse(assemble(raw[:end]))
        assert sum(len(t.events) for t in tracks.values()) in (0, 1)


def test_what_is_no_trace_is_refused_in_a_sentence() -> None:
    good = assemble(spool({"worker0": [step(i, 10 * i, 10 * i + 5) for i in range(5)]}))
    for raw in (b"\x0a", b"hello", b"\xff" * 20, good[:-1], good[:-30], msgpack.packb([1, 2]), b"\x12\x01a"):
        with pytest.raises(UserError):
            parse(raw)


def test_the_published_protos_read_the_same() -> None:
    protos = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    writer = Writer({3: 5, 1: 9})
    writer.process(1, 77, "minisgl::x")
    writer.thread(2, 77, 78, "x")
    writer.track(3, "n", 1, counter=True)
    writer.event(BEGIN, 2, 1 << 40, "a", {"n": -1, "why": "é"}, starts=[1, 2])
    writer.event(BEGIN, 2, (1 << 40) + 1, "b", {"n": 1 << 40}, ends=[1 << 50])
    writer.event(END, 2, (1 << 40) + 2)
    writer.event(END, 2, (1 << 40) + 3)
    writer.event(COUNTER, 3, 1 << 41, value=12)
    trace = protos.Trace.FromString(bytes(writer.out))
    known = pytest.importorskip("google.protobuf.unknown_fields").UnknownFieldSet
    assert not any(len(known(m)) for p in trace.packet for m in (p, p.track_event, p.track_descriptor, p.interned_data))
    assert trace.packet[0].trace_packet_defaults.timestamp_clock_id == protos.BUILTIN_CLOCK_MONOTONIC
    assert trace.packet[1].clock_snapshot.primary_trace_clock == protos.BUILTIN_CLOCK_MONOTONIC
    assert [(c.clock_id, c.timestamp) for c in trace.packet[1].clock_snapshot.clocks] == [(3, 5), (1, 9)]
    events = [p for p in trace.packet if p.HasField("track_event")]
    assert [p.track_event.type for p in events] == [1, 1, 2, 2, 4]
    assert [p.timestamp for p in events] == [1 << 40, (1 << 40) + 1, (1 << 40) + 2, (1 << 40) + 3, 1 << 41]
    assert list(events[0].track_event.flow_ids) == [1, 2]
    assert list(events[1].track_event.terminating_flow_ids) == [1 << 50]
    assert events[0].track_event.debug_annotations[0].int_value == -1
    assert events[0].track_event.debug_annotations[1].string_value == "é"
    assert events[4].track_event.counter_value == 12
    assert [n.name for p in events for n in p.interned_data.event_names] == ["a", "b"]
    descriptors = [p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")]
    assert (descriptors[0].process.pid, descriptors[1].thread.tid, descriptors[2].parent_uuid) == (77, 78, 1)


def test_a_trace_read_by_the_published_protos_has_the_same_slices_and_flows() -> None:
    protos = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    rng = random.Random(1)
    hops = [("", 10 * i, 10 * i + 4, f"publish {i % 7}", {"step": i}, (OUT, "plan", i, ["worker0"])) for i in range(90)]
    takes = [("", 10 * i + 2, 10 * i + 9, "take", {"step": i}, (IN, "plan", i)) for i in range(90) if rng.random() < 0.8]
    raw = assemble(
        spool({"scheduler": [*hops, ("", 0, 2000, "step")], "worker0": [*takes, step(0, 1, 900), step(1, 3000, 4000)]})
    )
    names: dict[int, str] = {}
    stacks: dict[int, list[list[Any]]] = {}
    found, last = [], 0
    for packet in protos.Trace.FromString(raw).packet:
        names |= {n.iid: n.name for n in packet.interned_data.event_names}
        if not packet.HasField("track_event"):
            continue
        e = packet.track_event
        assert packet.timestamp >= last
        last = packet.timestamp
        if e.type == protos.TrackEvent.TYPE_SLICE_END:
            stacks[e.track_uuid].pop().append(packet.timestamp)
        else:
            found.append(
                [e.track_uuid, names[e.name_iid], *map(sorted, (e.flow_ids, e.terminating_flow_ids)), packet.timestamp]
            )
            stacks.setdefault(e.track_uuid, []).append(found[-1])
    assert not any(stacks.values())
    mine = [
        [uuid, e.name, sorted(e.starts), sorted(e.ends), e.begin, e.end] for uuid, t in parse(raw).items() for e in t.events
    ]
    assert sorted(mine) == sorted(found)
    assert sum(len(row[3]) for row in mine) == len(takes)


def test_fields_of_all_wire_types_are_read() -> None:
    assert list(fields(b"\x08\x96\x01\x12\x02hi\x19" + b"\x01" + b"\0" * 7 + b"\x25\x02\0\0\0")) == [
        (1, 150),
        (2, b"hi"),
        (3, 1),
        (4, 2),
    ]
