"""Draws one frame of `minisgl top` with rich: what a server does now, in one screen."""

from __future__ import annotations

import time
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from minisgl.commands.chat_terminal import strip_control
from minisgl.commands.top_readings import Readings

_GOOD, _BAD, _DIM = "green", "bold red", "dim"
_LATE = 5.0  # seconds without a sign of life that are too many
_EVENTS = 6


def frame(readings: Readings, info: dict[str, Any], lost: str = "", width: int = 80, clock: float = 0.0) -> RenderableType:
    """A frame.  `info`: of GET /server_info; `lost`: why there is no newer reading; `clock`: when a reading at 0 would be."""
    return Group(
        _head(readings, info, lost),
        _load(readings),
        _cache(readings, max(10, width - 4)),
        _processes(readings),
        _events(readings, clock),
    )


def _head(readings: Readings, info: dict[str, Any], lost: str) -> Text:
    state = readings.last.state
    facts = [f"context {info.get('max_context', '?')}", f"tp {info.get('tp', '?')}", f"minisgl {info.get('version', '?')}"]
    text = Text.assemble((_clean(info.get("model", "?")), "bold"), "  ", (_clean(state), _GOOD if state == "ready" else _BAD))
    text.append("  " + "  ".join(map(_clean, facts)), _DIM)
    if lost:
        text.append(f"\n{_clean(lost)}", _BAD)
    return text


def _load(readings: Readings) -> RenderableType:
    last = readings.last
    waiting = ", ".join(f"{n:.0f} {why}" for why, n in last.by("num_requests_waiting_by_reason", "reason").items() if n)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "requests",
        f"{last.get('num_requests_running'):.0f} running",
        f"{last.get('num_requests_waiting'):.0f} waiting" + (f" ({_clean(waiting)})" if waiting else ""),
        f"{last.get('num_requests_open'):.0f} open",
    )
    tokens = (readings.rate(f"{name}_tokens_total") for name in ("prompt", "generation"))
    grid.add_row("tokens", *(f"{_number(rate)}/s {way}" for rate, way in zip(tokens, ("in", "out"), strict=True)), "")
    for name, metric in (("TTFT", "time_to_first_token_seconds"), ("ITL", "inter_token_latency_seconds")):
        grid.add_row(name, *(f"p{100 * q:.0f} {_seconds(readings.quantile(metric, q))}" for q in (0.5, 0.99)), "")
    return Panel(grid, title="load", title_align="left", box=box.SQUARE)


def _cache(readings: Readings, width: int) -> RenderableType:
    last = readings.last
    used, filled = (last.get(f"kv_cache_{share}_perc") for share in ("usage", "filled"))
    n_used, n_filled = round(used * width), round(filled * width)
    bar = Text.assemble(("█" * n_used, "cyan"), ("▒" * (n_filled - n_used), "blue"), ("·" * (width - n_filled), _DIM))
    pages, hits = last.get("kv_cache_pages"), readings.share("prefix_cache_hits_total", "prefix_cache_queries_total")
    legend = f"{_percent(used)} used, {_percent(filled - used)} cached, {_percent(1 - filled)} free of {pages:,.0f} pages"
    rate = f"prefix hit rate {_percent(hits)}, evicted {_number(readings.rate('evicted_tokens_total'))} tok/s"
    return Panel(Group(bar, Text(f"{legend}; {rate}")), title="KV cache", title_align="left", box=box.SQUARE)


def _processes(readings: Readings) -> RenderableType:
    last, restarts = readings.last, readings.last.by("restarts_total", "process")
    ages = last.by("process_heartbeat_age_seconds", "process")
    table = Table("process", *(_right(name) for name in ("CPU", "memory", "threads", "files", "beat", "restarts")), box=None)
    for name in sorted(last.by("process_resident_memory_bytes", "process")):
        age = ages.get(name)
        table.add_row(
            _clean(name),
            _percent(readings.rate("process_cpu_seconds_total", process=name)),
            f"{last.get('process_resident_memory_bytes', process=name) / (1 << 20):,.0f} MB",
            f"{last.get('process_threads', process=name):.0f}",
            f"{last.get('process_open_fds', process=name):.0f}",
            "" if age is None else Text(f"{age:.1f} s", _BAD if age > _LATE else ""),
            Text(f"{restarts.get(name, 0.0):.0f}", _BAD if restarts.get(name) else ""),
        )
    return table


def _events(readings: Readings, clock: float) -> RenderableType:
    text = Text()
    for at, what in list(readings.events)[-_EVENTS:]:
        text.append(time.strftime("%H:%M:%S ", time.localtime(at + clock)), _DIM).append(f"{_clean(what)}\n")
    return text


def _clean(told: object) -> str:
    """What a server has told, without characters that would change the terminal."""
    return strip_control(str(told)).replace("\n", " ")[:200]


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
