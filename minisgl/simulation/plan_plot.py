"""Draws a capacity plan as SVG: goodput and hit rate against the number of replicas, a line for each router.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from minisgl.simulation.plan import Plan, Point, Slo
from minisgl.simulation.svg import COLOURS, Axis, document, line, nice, text, tick

_SIDE, _HEIGHT, _LEFT, _TOP = 330, 260, 60, 76


def plot(plans: Sequence[Plan], slo: Slo, shared: dict[int, float], ideal: float, title: str) -> str:
    """The picture.  `shared`: the hit rate of one cache of the total size, by number of replicas."""
    parts: list[str] = []
    for i, plan in enumerate(plans):
        answer = f"{plan.router}: {plan.needed:,}" if plan.needed else plan.router if plan.given else f"{plan.router}: none"
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<text x="{_LEFT + i * 130}" y="46" style="fill: var({colour})">{escape(answer)}</text>')
    most = max(p.replicas for plan in plans for p in plan.points)
    x = Axis(1, max(2, most), _LEFT, _LEFT + _SIDE, log=True)
    parts += _panel(plans, x, "within the SLO, % of requests", lambda p: p.goodput, 1.0)
    parts += _across(x, slo.share, 1.0, f"SLO {slo.share:.4g}")
    x = x._replace(start=x.end + 110, end=x.end + 110 + _SIDE)
    top = max(ideal, *shared.values(), *(p.hit_rate for plan in plans for p in plan.points), 0.01)
    parts += _panel(plans, x, "hit rate, % of prompt tokens", lambda p: p.hit_rate, top)
    parts += _across(x, ideal, top, "unbounded cache")
    parts += _curve(
        [(n, share) for n, share in sorted(shared.items())], x, top, "--soft", "one cache of the total size", dash=True
    )
    parts.append(text(_LEFT, _TOP + _HEIGHT + 56, f"{slo}; filled: the answer; dashed: one cache of the total size", "soft"))
    return document(x.end + 40, _TOP + _HEIGHT + 70, title, parts)


def _y(top: float) -> Axis:
    return Axis(0.0, nice(100 * top)[-1], _TOP + _HEIGHT, _TOP)


def _panel(plans: Sequence[Plan], x: Axis, name: str, value: Callable[[Point], float], top: float) -> list[str]:
    y, bottom = _y(top), _TOP + _HEIGHT
    parts = [text(x.start, _TOP - 10, name, "title"), text((x.start + x.end) / 2, bottom + 36, "replicas", anchor="middle")]
    for n in (b * 10**e for e in range(4) for b in (1, 2, 5)):
        if x.low <= n <= x.high:
            parts += [line(x.at(n), _TOP, x.at(n), bottom, "grid"), tick(x.at(n), bottom + 18, f"{n}", n)]
    for percent in nice(100 * top):
        at = y.at(percent)
        parts += [line(x.start, at, x.end, at, "grid")]
        parts += [tick(x.start - 6, at + 4, f"{percent:g}", percent, kind="y", anchor="end")]
    for i, plan in enumerate(plans):
        colour = COLOURS[i % len(COLOURS)]
        parts += _curve([(p.replicas, value(p)) for p in plan.points], x, top, colour, plan.router)
        for p in plan.points:
            fill = f"var({colour})" if p.replicas == plan.needed else "var(--page)"
            about = f"{plan.router}, {p.replicas:,} replicas: {value(p):.1%}"
            parts.append(
                f'<circle class="point" data-router="{escape(plan.router)}" data-replicas="{p.replicas}" '
                f'data-value="{value(p):.4f}" cx="{x.at(p.replicas):g}" cy="{y.at(100 * value(p)):g}" r="4" '
                f'style="fill: {fill}; stroke: var({colour}); stroke-width: 2"><title>{escape(about)}</title></circle>'
            )
    return parts


def _curve(points: list[tuple[int, float]], x: Axis, top: float, colour: str, name: str, *, dash: bool = False) -> list[str]:
    y = _y(top)
    path = " ".join(f"{x.at(n):g},{y.at(100 * v):g}" for n, v in points)
    style = f"fill: none; stroke: var({colour}); stroke-width: 1.5" + ("; stroke-dasharray: 5 4" if dash else "")
    return [f'<polyline points="{path}" data-name="{escape(name)}" style="{style}"/>']


def _across(x: Axis, value: float, top: float, name: str) -> list[str]:
    at = _y(top).at(100 * value)
    return [line(x.start, at, x.end, at, "zero"), text(x.end, at - 5, name, "soft", anchor="end")]
