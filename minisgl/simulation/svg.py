"""Draws in SVG, without a library: readable on light and dark pages, and as text.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_STYLE = """
:root { --ink: #1f2328; --soft: #6b7280; --line: #d0d7de; --page: #ffffff;
  --a: #0969da; --b: #bc4c00; --c: #1a7f37; --d: #8250df; --e: #bf3989; --f: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
    --a: #4493f8; --b: #f0883e; --c: #3fb950; --d: #ab7df8; --e: #f778ba; --f: #d29922; }
}
text { font: 12px system-ui, sans-serif; fill: var(--ink); } .soft { fill: var(--soft); } .title { font-weight: 600; }
.grid { stroke: var(--line); } .zero { stroke: var(--ink); } .whisker { stroke: var(--ink); stroke-width: 1.5; }
.page { fill: var(--page); } .noise { fill: var(--line); opacity: .6; }
.better { fill: var(--c); } .worse { fill: var(--b); } .same { fill: var(--soft); }
"""
COLOURS = ("--a", "--b", "--c", "--d", "--e", "--f")


class Axis(NamedTuple):
    """Values from `low` to `high` become pixels from `start` to `end`; by their logarithms if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; values beyond the ends lie on them."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 2)


def nice(high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from 0 to at least `high`."""
    raw = high / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    return [step * i for i in range(math.ceil(high / step * 0.999) + 1)]


def document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}" '
            'role="img">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f'<rect class="page" width="{width:g}" height="{height:g}"/>',
            text(12, 20, title, "title"),
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def tick(x: float, y: float, label: str, value: float, *, kind: str = "x", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="soft {kind}" text-anchor="{anchor}" data-value="{value!r}">{escape(label)}</text>'
