"""Knows which processes stand still: they give no sign of life, or a step of theirs does not end.  Runs in the api process."""

from __future__ import annotations

import time

from minisgl.actors.runtime.process import BEAT_SECONDS
from minisgl.actors.runtime.status import Board, BoardSpec

_ASLEEP_SECONDS = 5.0  # between two ticks: this process did not run either, so the silence of others says nothing


class Watchdog:
    """Reads the board, where every process reports."""

    def __init__(self, spec: BoardSpec) -> None:
        self._board = Board(spec)
        self._names = tuple(name for name in spec.names if name != "api")
        self._ticked = self._awake = time.monotonic_ns()

    def tick(self) -> None:
        """Must be called at least every few seconds."""
        now = time.monotonic_ns()
        if now - self._ticked > _ASLEEP_SECONDS * 1e9:
            self._awake = now
        self._ticked = now

    def clear(self, name: str) -> None:
        """Another process has this name now."""
        self._board.clear(name)

    def beat_ages(self) -> dict[str, float]:
        """Seconds since the last sign of life of each process that has given one."""
        now, lines = time.monotonic_ns(), {name: self._board.line(name) for name in self._names}
        return {name: (now - line.beat_ns) / 1e9 for name, line in lines.items() if line.beat_ns}

    def still(self, seconds: float) -> list[str]:
        """The processes without a sign of life for so long (two beats at least), and workers with a step that takes so long."""
        limit = max(seconds, 2 * BEAT_SECONDS) * 1e9
        now, out = time.monotonic_ns(), []
        for name in self._names:
            line = self._board.line(name)
            silent = line.beat_ns and now - max(line.beat_ns, self._awake) > limit
            stuck = line.busy and name.startswith("worker") and now - max(line.step_ns, self._awake) > limit
            if silent or stuck:
                out.append(name)
        return out
