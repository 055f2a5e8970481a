"""Plots a run: latency distributions, queue, KV cache and hit rate over time.  Needs matplotlib."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from minisgl.arrays import F64
from minisgl.errors import UserError
from minisgl.simulation.fleet import Run
from minisgl.simulation.report import gaps, ttft

_BINS = 60
_POINTS = 2000  # of a line: more than a screen shows


def check() -> None:
    """Raise UserError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def plot(run: Run, path: str, title: str) -> None:
    """Write the picture to `path`; its suffix selects the format.  Raises UserError if it cannot be written."""
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(title)
    _distribution(axes[0, 0], ttft(run) * 1e3, "time to first token, ms")
    _distribution(axes[0, 1], gaps(run) * 1e3, "time between tokens, ms")
    for i, replica in enumerate(run.replicas):
        steps, label = replica.steps, f"replica {i}" if len(run.replicas) > 1 else None
        every = max(1, len(steps["time"]) // _POINTS)
        time = steps["time"][::every]
        axes[0, 2].plot(time, steps["running"][::every], linewidth=0.8, label=label or "running")
        axes[1, 0].plot(time, steps["waiting"][::every], linewidth=0.8, label=label)
        share = 100 / run.limits.num_pages
        axes[1, 1].plot(time, np.array(steps["active"])[::every] * share, linewidth=0.8, label=label or "running requests")
        if label is None:
            axes[1, 1].plot(time, np.array(steps["used"])[::every] * share, linewidth=0.8, label="with cached prefixes")
    _label(axes[0, 2], "seconds", "running requests")
    _label(axes[1, 0], "seconds", "waiting requests")
    _label(axes[1, 1], "seconds", "KV cache in use, %")
    axes[1, 1].set_ylim(0, 105)
    if len(run.replicas) <= 8:
        axes[1, 1].legend(fontsize="small")
    _hits(axes[1, 2], run)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as e:
        raise UserError(f"--plot {path}: cannot be written ({e}).") from e


def _label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)


def _distribution(axis: Any, values: F64, name: str) -> None:
    """A cumulative distribution on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = np.sort(values[values > 0])
    if len(values):
        at = np.unique(np.linspace(0, len(values) - 1, _POINTS).astype(int))
        axis.plot(values[at], 100 * (at + 1) / len(values))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", labelrotation=45, labelsize="small")
    _label(axis, name, "% at most")
    axis.set_ylim(0, 101)


def _hits(axis: Any, run: Run) -> None:
    """Hit rate of the requests that arrived in each part of the trace, next to that of an unbounded cache."""
    served = run.log.cached >= 0
    arrival = run.log.arrival[served]
    edges = np.linspace(arrival.min(), arrival.max() + 1e-9, _BINS + 1) if len(arrival) else np.zeros(2)
    tokens = np.histogram(arrival, edges, weights=run.inputs[served])[0]
    for name, hits in (("unbounded cache", run.ideal[served]), ("this run", run.log.cached[served])):
        found = np.histogram(arrival, edges, weights=hits)[0]
        axis.plot(edges[:-1], 100 * found / np.maximum(tokens, 1), linewidth=0.9, label=name)
    _label(axis, "arrival, seconds", "hit rate, % of prompt tokens")
    axis.legend(fontsize="small")
