"""Shares the status of every process: one 64-byte line of shared memory each, written by that process, read by the api process.

The board answers two questions without a message: is a process alive, and at which step (health checks); and what was it doing
when it died (post mortem: the memory outlives it).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from minisgl.actors.runtime.ring import Arena, attach, create_arena

_WORDS = 8  # one cache line: pid, step, busy, step_ns, beat_ns, 3 spare


@dataclass(frozen=True, slots=True)
class Line:
    """The last report of one process: `step` counts its steps, `busy`: one is running.

    Monotonic times in nanoseconds, 0 for never: `step_ns` of the last change of these, `beat_ns` of the last sign of life.
    """

    pid: int
    step: int
    busy: bool
    step_ns: int
    beat_ns: int


@dataclass(frozen=True, slots=True)
class BoardSpec:
    """Address of the board and the process that owns each line."""

    arena: Arena
    names: tuple[str, ...]


def create_board(names: tuple[str, ...]) -> tuple[BoardSpec, int]:
    """Make an empty board with a line for each name.  Returns its spec and the descriptor that keeps it alive."""
    arena, fd = create_arena("board", max(4096, 8 * _WORDS * len(names)))
    return BoardSpec(arena, names), fd


class Board:
    """The board, mapped.  `beat` and `report` write the line of `name`; `line` reads any."""

    def __init__(self, spec: BoardSpec, name: str | None = None) -> None:
        self._spec = spec
        self._map = attach(spec.arena)
        self._words = memoryview(self._map).cast("q")
        self._at = _WORDS * spec.names.index(name) if name is not None else -1
        self._pid = os.getpid()

    def beat(self) -> None:
        """Give a sign of life: this process handles its messages.  Only for a board opened with my name."""
        self._words[self._at], self._words[self._at + 4] = self._pid, time.monotonic_ns()

    def report(self, step: int, busy: bool) -> None:
        """Report a step.  Only for a board opened with my name."""
        words, at = self._words, self._at
        words[at + 1], words[at + 2], words[at + 3] = step, int(busy), time.monotonic_ns()

    def clear(self, name: str) -> None:
        """Empty the line of a process that has ended, but for its step; the next one begins there."""
        at = _WORDS * self._spec.names.index(name)
        self._words[at], self._words[at + 2], self._words[at + 3], self._words[at + 4] = 0, 0, 0, 0

    def line(self, name: str) -> Line:
        """Read the line of a process (zeros if it has never written)."""
        at = _WORDS * self._spec.names.index(name)
        pid, step, busy, changed, beat = self._words[at : at + 5]
        return Line(pid, step, bool(busy), changed, beat)
