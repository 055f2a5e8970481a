"""Tables and pictures of minisgl bench say what the runs say."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from minisgl.bench import report, svg
from minisgl.bench.intervals import difference
from minisgl.bench.outcomes import figures, summary
from minisgl.bench.replay import Run, Stream

SVG = "{http://www.w3.org/2000/svg}"


def run_of(name: str, speed: float, seed: int = 0, **counters: int) -> Run:
    """A run whose tokens take 10 ms, divided by `speed`, a little more or less."""
    rng, streams = np.random.default_rng(seed), []
    for i in range(5):
        gaps = rng.uniform(0.009, 0.011, 8) / speed
        times = (1.0 + np.cumsum(gaps)).tolist()
        streams.append(Stream(0.0, 0.9, times, 40, 16, 8, "", [i, i + 1], True))
    counters = {"prefill_tokens": 1200, "steps": 30} | counters
    return Run(name, max(s.pieces[-1] for s in streams) - 0.9, streams, counters)


def turns(repeats: int, **variants: float) -> list[Run]:
    """Base and variants by turns."""
    runs, seed = [run_of("base", 1.0)], 0
    for _ in range(repeats):
        for name, speed in variants.items():
            seed += 2
            runs += [run_of(f"{name} off", speed, seed - 1), run_of("base", 1.0, seed)]
    return runs


def test_figures_are_those_of_a_plain_computation() -> None:
    run = run_of("base", 1.0)
    found, whole = figures(run.streams, run.seconds), summary(run.streams, run.seconds, 1000, 50)
    gaps = [b - a for s in run.streams for a, b in zip(s.pieces, s.pieces[1:], strict=False)]
    assert found["tok_s"] == pytest.approx(40 / run.seconds)
    assert found["ttft_ms"] == pytest.approx(sum(s.pieces[0] - s.sent for s in run.streams) / 5 * 1e3)
    assert found["tpot_ms"] == pytest.approx(sum(gaps) / len(gaps) * 1e3)
    assert found["tok_s_user"] == pytest.approx(1e3 / found["tpot_ms"])
    assert whole["itl_ms"]["p99"] == pytest.approx(found["itl_p99_ms"], abs=0.01)
    assert (run.cached, run.idle) == (16 / 40, None)
    assert run_of("base", 1.0, busy_us=900, idle_us=100).idle == 0.1
    nothing = Stream(0.0, 1.0, [], error="refused")
    assert figures([nothing], 1.0) == {}
    assert set(figures([Stream(0.0, 1.0, [1.5], 3, 0, 1)], 1.0)) == {"tok_s", "ttft_ms"}


def test_rows_compare_each_variant_with_the_bases_around_it() -> None:
    runs = turns(2, a=0.5, b=2.0)
    base, a, b = report.rows(runs)
    bases = [r.figures["tok_s"] for r in runs[::2]]
    assert base.repeats == 5
    assert base.values["tok_s"] == pytest.approx(math.prod(bases) ** (1 / 5))
    assert base.noise["tok_s"] == pytest.approx(max(max(x / y, y / x) for x, y in pairwise(bases)))
    assert a.differences["tok_s"] == difference(bases, [runs[1].figures["tok_s"], runs[5].figures["tok_s"]], [0, 2])
    assert b.differences["tok_s"] == difference(bases, [runs[3].figures["tok_s"], runs[7].figures["tok_s"]], [1, 3])
    assert a.differences["tpot_ms"].factor == pytest.approx(2.0, rel=0.1)
    assert (a.same, a.cached, a.repeats) == (1.0, 0.4, 2)
    runs[1].streams[0].ids = [99]
    assert report.rows(runs)[1].same == pytest.approx(0.9)


def test_the_table_marks_what_may_be_noise() -> None:
    table = report.ablation_table(report.rows(turns(3, a=0.5, none=1.0)))
    lines = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table.splitlines()}
    assert [c.strip() for c in table.splitlines()[0].split("|")[2:-1]] == [
        *("tok/s", "TTFT ms", "ITL ms", "ITL p99 ms", "cached", "computed", "steps", "idle", "same")
    ]
    assert re.fullmatch(r"[\d,]+ \(± [\d.]+ %\)", lines["base"][0])
    assert "≈" not in lines["a off"][2]
    assert "≈" in lines["none off"][2]
    assert lines["a off"][-5:] == ["40.0%", "1,200", "30", "-", "100%"]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert [report.percent(x) for x in (0.5, 1.1, 12.3, 1234)] == ["-50.0 %", "+10.0 %", "x 12", "x 1,234"]


def test_everything_can_be_written_as_json() -> None:
    runs = turns(1, a=0.5)
    data = json.loads(json.dumps([*map(report.row_data, report.rows(runs)), *map(report.run_data, runs)], allow_nan=False))
    assert data[1]["differences"]["tok_s"]["factor"] == report.rows(runs)[1].differences["tok_s"].factor
    assert len(data[2]["ttft_ms"]) == 5
    for repeats in (1, 2):
        points = json.loads(json.dumps([report.point_data(p) for p in sweep_points(repeats)], allow_nan=False))
        assert ("low" in points[0]["figures"]["tok_s"]) == (repeats > 1)


def test_what_makes_figures_doubtful_is_noted() -> None:
    run = run_of("a off", 1.0, warmups=2)
    run.streams[0].error, run.streams[1].late, run.restarts = "queue_full", 0.3, 1
    text = "\n".join(report.notes([run], online=True))
    for part in (
        "1 of 5 requests have no answer (queue_full)",
        "1 processes were started again",
        "2 steps waited",
        "up to 300 ms late",
    ):
        assert part in text
    assert report.notes([run_of("base", 1.0)], online=True) == []


# ---------------- sweeps
def sweep_points(repeats: int = 2) -> list[report.Point]:
    speeds = {"1": 1.0, "2": 1.5, "3": 1.2}
    runs = [run_of(f"base, x {v}", s, seed) for seed in range(repeats) for v, s in speeds.items()]
    runs += [run_of(f"a off, x {v}", s / 2, seed) for seed in range(repeats) for v, s in speeds.items()]
    return report.points(runs, {f"{n}, x {v}": (n, v) for n in ("base", "a off") for v in speeds})


def test_points_that_another_beats_are_not_on_the_frontier() -> None:
    found = sweep_points()
    assert [(p.series, p.value, p.best) for p in found] == [
        *(("base", "1", False), ("base", "2", True), ("base", "3", False)),
        *(("a off", "1", False), ("a off", "2", True), ("a off", "3", False)),
    ]
    rng = np.random.default_rng(0)
    for _ in range(50):
        trial = [
            report.Point("s", str(i), {"tok_s": (x, x, x), "tok_s_user": (y, y, y)})
            for i, (x, y) in enumerate(rng.integers(1, 6, (6, 2)).astype(float))
        ]
        for p in trial:
            mine = p.figures["tok_s"][0], p.figures["tok_s_user"][0]
            others = [(q.figures["tok_s"][0], q.figures["tok_s_user"][0]) for q in trial]
            beaten = any(x >= mine[0] and y >= mine[1] and (x, y) != mine for x, y in others)
            assert any(report._beats(q, p) for q in trial) == beaten
    table = report.sweep_table("x", found)
    assert table.splitlines()[0].split("|")[2].strip() == "x"
    assert table.count("yes") == 2
    assert " to " not in report.sweep_table("x", sweep_points(1))


# ---------------- pictures
def axis_of(root: ET.Element, kind: str, near: tuple[float, float]) -> tuple[list[float], list[float]]:
    """(values, pixels) of the ticks of an axis whose pixels lie between `near`, as the picture shows them."""
    at = "x" if kind == "x" else "y"
    ticks = [t for t in root.iter(f"{SVG}text") if f" {kind}" in t.get("class", "") and "data-value" in t.attrib]
    pairs = sorted((float(t.attrib["data-value"]), float(t.attrib[at]) - (4 if kind == "y" else 0)) for t in ticks)
    kept = [(v, p) for v, p in pairs if near[0] - 1 <= p <= near[1] + 1]
    return [v for v, _ in kept], [p for _, p in kept]


def test_the_points_of_a_sweep_lie_where_the_axes_say() -> None:
    found = sweep_points()
    root = ET.fromstring(svg.sweep("x", found, "a <b> & c"))
    assert root.findtext(f"{SVG}title") == "a <b> & c"
    circles = [c.attrib for c in root.iter(f"{SVG}circle")]
    assert len(circles) == len(found) * 3
    for number, key in enumerate(("tok_s_user", "tpot_ms", "ttft_ms")):
        left = 80 + number * 380
        values, pixels = axis_of(root, "x", (left, left + 300))
        heights, rows = axis_of(root, "y", (0, 1000))
        assert len(values) >= 4
        for p in found:
            [c] = [c for c in circles if (c["data-series"], c["data-name"], c["data-metric"]) == (p.series, p.value, key)]
            slope, start = np.polyfit(values, pixels, 1)
            assert float(c["cx"]) == pytest.approx(start + slope * p.figures[key][0], abs=0.1)
            slope, start = np.polyfit(heights, rows, 1)
            assert float(c["cy"]) == pytest.approx(start + slope * p.figures["tok_s"][0], abs=0.1)
            assert left <= float(c["cx"]) <= left + 300
            assert ("--page" in c["style"]) != p.best


@pytest.mark.parametrize("speeds", [{"a": 0.5, "none": 1.0}, {"a": 0.05, "b & c": 30.0}, {"a": 0.97}])
def test_the_bars_of_an_ablation_end_where_the_axis_says(speeds: dict[str, float]) -> None:
    rows = report.rows(turns(3, **speeds))
    root = ET.fromstring(svg.ablations(rows, "title"))
    bars = [b.attrib for b in root.iter(f"{SVG}rect") if "bar" in b.get("class", "")]
    metrics = list(rows[0].values)
    assert len(bars) == len(metrics) * len(speeds)
    for number, key in enumerate(metrics):
        left = 150 + number * 270
        values, pixels = axis_of(root, "x", (left, left + 250))
        assert 1.0 in values
        assert len(values) >= 3
        slope, start = np.polyfit(np.log(values), pixels, 1)
        for row in rows[1:]:
            [b] = [b for b in bars if (b["data-name"], b["data-metric"]) == (row.name, key)]
            ends = sorted((start, start + slope * math.log(row.differences[key].factor)))
            assert (float(b["x"]), float(b["x"]) + float(b["width"])) == pytest.approx(tuple(ends), abs=0.2)
            d = row.differences[key]
            good = (d.factor > 1) == (key == "tok_s")
            assert b["class"] == f"bar {'same' if d.is_noise else 'better' if good else 'worse'}"


def test_pictures_need_nothing_and_know_light_and_dark() -> None:
    for picture in (svg.sweep("x", sweep_points(), "t"), svg.ablations(report.rows(turns(1, a=0.5)), "t")):
        assert "prefers-color-scheme: dark" in picture
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|<image|@import", picture)
        colours: Any = re.findall(r"var\((--\w+)\)", picture)
        defined = re.findall(r"(--\w+):", picture)
        assert all(defined.count(name) == 2 for name in colours)


def test_round_numbers_cover_an_axis() -> None:
    for high in (0.0123, 0.99, 1, 7, 42, 999, 12345.6):
        ticks = svg.nice(high)
        assert ticks[0] == 0
        assert ticks[-1] >= high * 0.999
        assert 3 <= len(ticks) <= 8
