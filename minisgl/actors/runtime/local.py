"""Runs all actors in one thread, in one seeded interleaving and in virtual time, for tests and debuggers.

Every message is encoded and decoded on the way, so a test that passes here cannot fail later on serialisation.  Delivery is
FIFO per (sender, receiver) pair, as ZMQ's is, and otherwise as adversarial as the seed makes it; `seed=None` is a fixed order
for pdb.  After its `idle()` returned False, an actor does not run before it has mail, exactly as in a real process: a lost
doorbell ends in quiescence with requests open, which a test can see, instead of a hang.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from minisgl.actors.runtime.actor import Actor, Context
from minisgl.actors.wire import decode, encode

A = TypeVar("A", bound=Actor)


class LocalContext(Context):
    """The Context of one actor in a LocalSystem."""

    def __init__(self, system: LocalSystem, name: str) -> None:
        self._system = system
        self.name = name

    def send(self, to: str, msg: Any) -> None:
        self._system.post(self.name, to, msg)

    def now(self) -> float:
        return self._system.clock

    def forget(self, name: str) -> None:
        self._system.forget(self.name, name)

    def stop(self) -> None:
        self._system.stop(self.name)


class LocalSystem:
    """The deterministic runtime.  `edges` records (message, sender, receiver), for the test of the documentation."""

    def __init__(self, seed: int | None = None) -> None:
        self.clock = 0.0  # virtual seconds; a test, or an actor that waits for its `wake_at`, moves it
        self.actors: dict[str, Actor] = {}
        self.dead_letters: list[tuple[str, str, Any]] = []
        self.edges: set[tuple[str, str, str]] = set()
        self._rng = random.Random(seed) if seed is not None else None
        self._lanes: dict[tuple[str, str], deque[bytes]] = {}
        self._asleep: set[str] = set()

    def spawn(self, name: str, make: Callable[[LocalContext], A]) -> A:
        """Create an actor under `name` and run its `started`."""
        actor = make(LocalContext(self, name))
        self.actors[name] = actor
        actor.started()
        return actor

    def stop(self, name: str) -> None:
        """Remove an actor; later messages to it become dead letters."""
        if (actor := self.actors.pop(name, None)) is not None:
            actor.stopping()

    def forget(self, src: str, dst: str) -> None:
        """Drop what is on the lane from `src` to `dst`."""
        self._lanes.pop((src, dst), None)

    def post(self, src: str, dst: str, msg: Any) -> None:
        """Put a message on the lane from `src` to `dst`.  A dead receiver does not hide that a message cannot be encoded."""
        raw = encode(msg)
        self.edges.add((type(msg).__name__, src, dst))
        if dst in self.actors:
            self._lanes.setdefault((src, dst), deque()).append(raw)
        else:
            self.dead_letters.append((src, dst, msg))

    def step(self) -> bool:
        """One event: deliver a message, run one `idle()`, or advance the clock to a `wake_at`.  False: nothing can happen."""
        lanes = [k for k, lane in self._lanes.items() if lane and k[1] in self.actors]
        choices: list[Any] = [*lanes, *(name for name in self.actors if name not in self._asleep)]
        if self._rng:
            self._rng.shuffle(choices)
        for choice in choices:
            if isinstance(choice, tuple):
                self._asleep.discard(choice[1])
                self.actors[choice[1]].receive(decode(self._lanes[choice].popleft()))
                return True
            if self.actors[choice].idle():
                return True
            self._asleep.add(choice)
        # An actor may have sent a message before it went to sleep.
        if any(lane and dst in self.actors for (_, dst), lane in self._lanes.items()):
            return True
        due, name = min(((actor.wake_at, name) for name, actor in self.actors.items()), default=(math.inf, ""))
        if due == math.inf:
            return False
        self.clock = max(self.clock, due)
        self._asleep.discard(name)
        return True

    def run(self, max_events: int = 1_000_000) -> int:
        """Until nothing can happen; returns the number of events.  Raises RuntimeError if that takes too many."""
        for n in range(max_events):
            if not self.step():
                return n
        raise RuntimeError(f"no quiescence after {max_events} events")
