"""Journals that are lived through again to be looked at: the live one, whose bytes come as they are written, and files.

A scene is a replay with its History, and the names of the nodes of its tree.  Runs in the viewer process.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import Any

from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.errors import UserError
from minisgl.journal.files import parts_of
from minisgl.journal.format import Kind
from minisgl.journal.replay import Replay, records
from minisgl.view.history import History
from minisgl.view.tree import Names
from minisgl.view.views import reasons

MAX_BYTES = 1 << 30  # of a journal that is opened
_CHUNK = 1 << 16


class Scene(Replay):
    """A replay that notes what happens.  `hashed`: there are hashes instead of token ids, and so no text."""

    def __init__(self) -> None:
        self.history, self.names = History(), Names()
        self.previews: dict[tuple[str, int], str] = {}  # by name and size of nodes: how their text begins
        super().__init__()

    @property
    def hashed(self) -> bool:
        return bool(self.head.get("hashed", True))

    def _snapshot(self, state: dict[str, Any]) -> None:
        fresh = self.machine is None
        super()._snapshot(state)
        if fresh and self.machine is not None:
            now = max(state["since"], self.head.get("time", 0.0) if not self.head["part"] else 0.0)
            self.history.begin(self.machine, now)
            self.names = Names()

    def _step(self, machine: StepMachine, now: float, events: list[Any], decisions: list[float], want: list[Any]) -> None:
        super()._step(machine, now, events, decisions, want)
        self.history.saw(machine, self.events, self.now, self.output)
        if self.history.due():
            self.history.waits(reasons(machine))


class Live(Scene):
    """The journal of a server that runs."""

    def take(self, data: bytes, begins: bool) -> None:
        """The next bytes; `begins`: of another journal.  Raises as Replay does."""
        if begins:
            call = self.call
            self.__init__()  # type: ignore[misc]
            self.call = call
        self.feed(data)
        while self.advance():
            pass


class Opened:
    """A journal in files.  `steps`: number and time of every step in it; `seek` goes to one.  Raises UserError, OSError."""

    def __init__(self, path: str) -> None:
        self.parts = parts_of(path)
        if not self.parts:
            raise UserError(f"there is no journal {os.path.basename(path)}")
        if sum(os.path.getsize(part) for part in self.parts) > MAX_BYTES:
            raise UserError(f"the journal is larger than {MAX_BYTES >> 30} GiB")
        self.steps: list[tuple[int, float]] = []
        self._places: list[tuple[int, int]] = []  # part, and how many calls of it come before the end of the step's
        for part, name in enumerate(self.parts):
            calls = 0
            with open(name, "rb") as file:
                for record in records(file):
                    if record.kind == Kind.STEP:
                        calls += 1
                        if (outline := record.values[3][1]) is not None:
                            self.steps.append((outline[0], record.values[0]))
                            self._places.append((part, calls))
        if not self.steps:
            raise UserError("the journal has no step")
        self.scene = Scene()
        self.at = -1
        self._here = (-1, 0)
        self._rest = memoryview(b"")

    def seek(self, at: int) -> None:
        """Go to the state after a step, by its place in `steps`.  Backwards means from the beginning of the step's part.

        Where a call on the way cannot be made again, what it raises is raised, and the state is the one before it.
        """
        try:
            self._move(max(0, min(at, len(self.steps) - 1)))
        except Exception:
            (part, _), good = self._here, bisect_right(self._places, self._here) - 1
            self._here = (-1, 0)
            if good >= 0 and self._places[good][0] == part:
                self._move(good)
            else:
                self.scene = Scene()
            raise

    def _move(self, at: int) -> None:
        part, calls = self._places[at]
        if self._here[0] != part or self._here[1] > calls:
            self.scene, self._here = Scene(), (part, 0)
            with open(self.parts[part], "rb") as file:
                self._rest = memoryview(file.read())
        while self._here[1] < calls:
            if self.scene.advance():
                self._here = (part, self._here[1] + 1)
            elif self._rest:
                self.scene.feed(self._rest[:_CHUNK])
                self._rest = self._rest[_CHUNK:]
            else:
                raise UserError("the journal has become shorter")
        self.at = at
