"""Draws the tables as SVG, without a library: readable on light and dark pages, and as text.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from minisgl.bench.intervals import CONFIDENCE
from minisgl.bench.report import METRICS, PER_USER, Metric, Point, Row
from minisgl.simulation.svg import COLOURS, Axis, document, line, nice, text, tick

_PANEL, _LEFT, _TOP, _ROW = 250, 150, 66, 26
_FACTORS = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2, 4, 8, 16, 64)


# ---------------- ablations
def ablations(found: Sequence[Row], title: str) -> str:
    """A panel for each metric: a bar for each variant, from 1 to its factor, with its interval; behind it the base's noise."""
    variants, base = found[1:], found[0]
    metrics = [m for m in METRICS if m.key in base.values]
    height = _TOP + _ROW * len(variants) + 54
    parts = [text(_LEFT - 10, _TOP + _ROW * (i + 0.5) + 4, row.name, anchor="end") for i, row in enumerate(variants)]
    for number, metric in enumerate(metrics):
        parts += _bars(base, variants, metric, _LEFT + number * (_PANEL + 20), height - 50)
    legend = f"bars: variant / base; lines: {CONFIDENCE:.0%} intervals; band: base to base; grey: may be noise"
    parts.append(text(_LEFT, height - 10, legend, "soft"))
    return document(_LEFT + len(metrics) * (_PANEL + 20), height, title, parts)


def _bars(base: Row, variants: Sequence[Row], metric: Metric, x: float, bottom: float) -> list[str]:
    noise = base.noise[metric.key]
    factors = [row.differences[metric.key].factor for row in variants] + [noise, 1 / noise, 1.05, 0.95]
    axis = Axis(min(factors) / 1.1, max(factors) * 1.1, x, x + _PANEL, log=True)
    low, high = axis.at(1 / noise), axis.at(noise)
    parts = [
        text(x, _TOP - 14, f"{metric.title} ({'more' if metric.more else 'less'} is better)", "title"),
        f'<rect class="noise" x="{low:g}" y="{_TOP}" width="{high - low:g}" height="{bottom - _TOP:g}"/>',
    ]
    last = -math.inf
    for factor in sorted((f for f in _FACTORS if axis.low <= f <= axis.high), key=lambda f: (f != 1, f)):
        at = axis.at(factor)
        if factor != 1 and (abs(at - axis.at(1)) < 36 or at - last < 36):
            continue
        last = at if factor != 1 else last
        parts += [
            line(at, _TOP, at, bottom, "zero" if factor == 1 else "grid"),
            tick(at, bottom + 16, f"x {factor:g}", factor),
        ]
    for i, row in enumerate(variants):
        d, y = row.differences[metric.key], _TOP + _ROW * i
        kind = "same" if d.is_noise else "better" if (d.factor > 1) == metric.more else "worse"
        ends, middle = sorted((axis.at(1), axis.at(d.factor))), y + _ROW / 2
        about = f"{row.name}, {metric.title}: x {d.factor:.3f} ({d.low:.3f} to {d.high:.3f})"
        parts.append(
            f'<rect class="bar {kind}" data-name="{escape(row.name)}" data-metric="{metric.key}" x="{ends[0]:g}" y="{y + 6:g}" '
            f'width="{ends[1] - ends[0]:g}" height="{_ROW - 12}"><title>{escape(about)}</title></rect>'
        )
        parts.append(line(axis.at(d.low), middle, axis.at(d.high), middle, "whisker"))
    return parts


# ---------------- sweeps
def sweep(name: str, found: Sequence[Point], title: str) -> str:
    """Throughput against speed per user, time per later token and to the first one; points that nothing beats are filled."""
    against = [m for m in (PER_USER, METRICS[2], METRICS[1]) if all(m.key in p.figures for p in found)]
    series = list(dict.fromkeys(p.series for p in found))
    parts, side, gap = [], 300, 80
    for number, metric in enumerate(against):
        parts += _curves(found, series, metric, gap + number * (side + gap), side)
    for i, label in enumerate(series if len(series) > 1 else []):
        parts.append(f'<text x="{gap + i * 150}" y="40" style="fill: var({COLOURS[i % len(COLOURS)]})">{escape(label)}</text>')
    parts.append(text(gap, _TOP + side + 58, f"labels: {name}; filled: no other point of the series beats it", "soft"))
    return document(gap + len(against) * (side + gap), _TOP + side + 72, title, parts)


def _curves(found: Sequence[Point], series: Sequence[str], metric: Metric, left: float, side: float) -> list[str]:
    y_key, bottom, parts = METRICS[0].key, _TOP + side, []
    ticks = {key: nice(max(p.figures[key][0] for p in found)) for key in (metric.key, y_key)}
    x = Axis(0.0, ticks[metric.key][-1], left, left + side)
    y = Axis(0.0, ticks[y_key][-1], bottom, _TOP)
    for value in ticks[metric.key]:
        parts += [
            line(x.at(value), _TOP, x.at(value), bottom, "grid"),
            tick(x.at(value), bottom + 18, f"{value:g}", value),
        ]
    for value in ticks[y_key]:
        parts += [line(left, y.at(value), left + side, y.at(value), "grid")]
        parts += [tick(left - 6, y.at(value) + 4, f"{value:g}", value, kind="y", anchor="end")]
    parts += [text(left + side / 2, bottom + 36, metric.title, anchor="middle"), text(left, _TOP - 6, METRICS[0].title)]
    for i, label in enumerate(series):
        colour = f"var({COLOURS[i % len(COLOURS)]})"
        mine = [(p, x.at(p.figures[metric.key][0]), y.at(p.figures[y_key][0])) for p in found if p.series == label]
        path = " ".join(f"{px:g},{py:g}" for _, px, py in mine)
        parts.append(f'<polyline points="{path}" style="fill: none; stroke: {colour}; stroke-width: 1.5"/>')
        for p, px, py in mine:
            fill = colour if p.best else "var(--page)"
            parts.append(
                f'<circle class="point" data-series="{escape(label)}" data-name="{escape(p.value)}" data-metric="{metric.key}" '
                f'cx="{px:g}" cy="{py:g}" r="4.5" style="fill: {fill}; stroke: {colour}; stroke-width: 2"/>'
            )
            parts.append(text(px + 7, py - 6, p.value, "soft"))
    return parts
