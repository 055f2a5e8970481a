"""Shares the status of every process: one 64-byte line of shared memory each, written by that process, read by the api process.

The board answers two questions without a message: is a process alive, and at which step (health checks); and what was it doing
when it died (post mortem: the memory outlives it).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from minisgl.actors.runtime.ring import Arena, attach, create_arena

_WORDS = 8  # one cache line: pid, step, busy, beat_ns, 4 spare


@dataclass(frozen=True, slots=True)
class Line:
    """The last report of one process: `step` counts its steps, `busy`: one is running, `beat_ns`: monotonic time."""

    pid: int
    step: int
    busy: bool
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
    """The board, mapped.  `beat` writes the line of `name`; `line` reads any."""

    def __init__(self, spec: BoardSpec, name: str | None = None) -> None:
        self._spec = spec
        self._map = attach(spec.arena)
        self._words = memoryview(self._map).cast("q")
        self._at = _WORDS * spec.names.index(name) if name is not None else -1

    def beat(self, pid: int, step: int, busy: bool) -> None:
        """Write my line.  Only for a board opened with my name."""
        words, at = self._words, self._at
        words[at], words[at + 1], words[at + 2], words[at + 3] = pid, step, int(busy), time.monotonic_ns()

    def line(self, name: str) -> Line:
        """Read the line of a process (zeros if it has never written)."""
        at = _WORDS * self._spec.names.index(name)
        pid, step, busy, beat = self._words[at : at + 4]
        return Line(pid, step, bool(busy), beat)
