"""What the api process does with a trace: who is asked, who is waited for, where the events go; and the numbers in SQL."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tracing.test_perfetto import packed, spool, step

from minisgl.actors.messages import Traced
from minisgl.actors.runtime.actor import Actor
from minisgl.api import traces
from minisgl.api.traces import Traces
from minisgl.errors import RequestError, UserError
from minisgl.tracing.assemble import assemble, read
from minisgl.tracing.summary import overlap, parse
from scripts.check.trace import SQL, faults


class Letters:
    """A context that keeps what is sent."""

    name = "api"

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def send(self, to: str, m: Any) -> None:
        self.sent.append((to, m))


class Door(Actor):
    """Stands for the gateway."""

    def open(self) -> None: ...


def made(path: str = "", megabytes: float = 8.0, living: tuple[str, ...] = ("scheduler", "worker0")) -> tuple[Letters, Traces]:
    ctx = Letters()
    return ctx, Traces(ctx, Door(ctx), path, megabytes, lambda: living)


def events(name: str, *, last: bool = False, enough: bool = False, n: int = 1) -> Traced:
    return Traced(name, 1, packed([("", 10 * i, 10 * i + 5, "step") for i in range(n)]), last, enough)


def names(raw: bytes) -> list[str]:
    return [name for name, _, _ in read(raw)]


def test_a_trace_ends_when_all_who_were_asked_have_sent_their_last_events() -> None:
    ctx, mine = made()
    told: list[bytes] = []
    mine.begin(7, False, told.append)
    assert [(to, m.on, m.steps) for to, m in ctx.sent] == [("scheduler", True, 7), ("worker0", True, 7)]
    with pytest.raises(RequestError) as refused:
        mine.begin(1, False, told.append)
    assert refused.value.status == 409
    mine.said(events("scheduler", enough=True))
    assert sorted((to, m.on) for to, m in ctx.sent[2:]) == [("scheduler", False), ("worker0", False)]
    mine.said(events("scheduler", last=True))
    assert not told
    mine.said(events("worker0", last=True))
    assert sorted(names(told[0])) == ["api", "scheduler", "scheduler", "worker0"]
    assert not mine.running
    mine.said(events("worker0", last=True))  # late
    mine.begin(0, False, told.append)
    assert mine.running


def test_who_has_died_is_not_waited_for_and_who_takes_its_place_joins() -> None:
    ctx, mine = made()
    told: list[bytes] = []
    mine.joined("checker")  # nothing runs
    mine.begin(0, True, told.append)
    mine.lost(["scheduler"])
    mine.joined("scheduler")
    assert [to for to, m in ctx.sent if m.on] == ["scheduler", "worker0", "scheduler"]
    mine.end()
    mine.lost(["worker0"])
    mine.joined("worker0")  # too late
    assert not told
    mine.said(events("scheduler", last=True))
    assert len(told) == 1


def test_a_trace_that_is_full_ends_and_one_that_nobody_ends_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_BYTES", 40_000)
    _, mine = made()
    told: list[bytes] = []
    mine.begin(0, False, told.append)
    for _ in range(50):
        mine.said(events("worker0", n=20))
    mine.finish()
    mine.finish()
    assert len(told) == 1
    assert len(assemble(told[0])) >= 40_000 / 2


def test_the_events_of_a_whole_run_are_in_a_file_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "t"
    _, mine = made(str(path), living=())
    mine.joined("worker0")
    mine.said(events("worker0", n=3))
    assert names((tmp_path / "t.events").read_bytes()) == ["worker0"]
    with pytest.raises(UserError, match="--trace"):
        made(str(path))  # another server writes it
    with pytest.raises(UserError, match="nowhere"):
        made(str(tmp_path / "nowhere" / "t"))
    mine.finish()
    tracks = parse(path.read_bytes())
    assert not list(faults(tracks))
    assert not (tmp_path / "t.events").exists()


def test_a_disk_that_fails_ends_the_trace_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mine = made(str(tmp_path / "t"), living=("worker0",))

    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    mine._file.close()
    mine._file = Full()
    mine.said(events("worker0"))
    mine.said(events("worker0", last=True))
    assert not mine.running


def test_the_numbers_in_sql_are_those_of_python() -> None:
    """In SQLite with the tables that the query reads, as a trace processor fills them."""
    work = [("", 40, 60, "step"), ("", 400, 500, "step"), ("", 410, 420, "publish"), ("", 890, 999, "step")]
    work += [("", 3000, 3100, "step"), ("", 4900, 5000, "step")]
    tracks = parse(assemble(spool({"scheduler": work, "worker0": [step(0, 100, 450), step(1, 650, 900), step(2, 4000, 4950)]})))
    db = sqlite3.connect(":memory:")
    tables = "slice(ts, dur, name, depth, track_id); track(id, name); thread_track(id, utid); thread(utid, name, upid); "
    for table in (tables + "process(upid, name); process_track(id, upid); flow(id)").split("; "):
        db.execute(f"create table {table}")
    for uuid, track in tracks.items():
        name, thread = f"minisgl::{track.process}", bool(track.pid)
        db.execute("insert into track values (?, ?)", (uuid, None if thread else track.name))
        db.execute("insert into process values (?, ?)", (uuid, name))
        if thread:
            db.execute("insert into thread values (?, ?, ?)", (uuid, track.name, uuid))
            db.execute("insert into thread_track values (?, ?)", (uuid, uuid))
        else:
            db.execute("insert into process_track values (?, ?)", (uuid, uuid))
        rows = [(e.begin, e.end - e.begin, e.name, e.depth, uuid) for e in track.events if e.value is None]
        db.executemany("insert into slice values (?, ?, ?, ?, ?)", rows)
    steps, busy, hidden, flows = db.execute(re.sub(r";\s*$", "", SQL)).fetchone()
    want = overlap(tracks)
    assert (steps, flows) == (want["steps"], 0)
    assert busy == pytest.approx(want["device_busy"])
    assert hidden == pytest.approx(want["scheduler_hidden"])
    assert 0 < hidden < 1
