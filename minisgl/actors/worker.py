"""The worker actor: one per tensor-parallel rank.  It knows slots and pages, never requests.

Owns      the model's shard, its KV cache, and the resident state of every slot (inside the runner).
Receives  Capacity (scheduler, once), Wake (scheduler); plans through the plan ring, STOP among them.
Sends     WorkerLoaded, WorkerArmed, MayCapture, Wake (scheduler); rank 0 publishes results through the token ring.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from minisgl.actors.messages import Capacity, MayCapture, Wake, WorkerArmed, WorkerLoaded
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.ring import RingReader, RingWriter
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.actors.runtime.status import Board
from minisgl.plan import PlanKind, StepPlan, StepResult

_BREATHE_SECONDS = 20e-6
_PAUSE_SECONDS = 0.05  # without plans, after which the runner may prepare for later ones


class Pending(Protocol):
    """A launched step."""

    def done(self) -> bool:
        """Whether the result is there.  Never blocks."""

    def result(self) -> StepResult:
        """What the step sampled.  Only after `done`."""


class RunnerLike(Protocol):
    """What a worker needs of the model side: minisgl.model.cpu.runner.Runner, or the oracle of the tests."""

    def max_pages(self) -> int:
        """How many KV pages would fit."""

    def allocate(self, num_pages: int) -> None:
        """Make the KV cache."""

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step behind those already started."""

    def capture_ahead(self) -> bool:
        """Spend some milliseconds, while nothing is to be done, on making later steps faster.  False: nothing is left.

        All ranks do the same thing in the same call.
        """

    def close(self) -> None:
        """Leave the group, free the device."""


class WorkerActor(Actor):
    """Plans from the ring to the runner, results from the runner to the ring; blocks on neither.

    Two sources, both polled, and one place to sleep, the mailbox: a worker that waited for the running step would launch every
    second step late, because the next plan arrives while the step runs.
    """

    def __init__(self, ctx: Context, rank: int, arenas: Arenas, make_runner: Callable[[], RunnerLike]) -> None:
        super().__init__(ctx)
        self.rank = rank
        self.plans = RingReader(arenas.plans, rank)
        self.results = RingWriter(arenas.results) if rank == 0 else None
        self.board = Board(arenas.board, ctx.name)
        self._make_runner = make_runner
        self._runner: RunnerLike | None = None
        self._running: deque[Pending] = deque()
        self._armed = self._stopped = False
        self._ready = self._captured = self._asked = False
        self._ranks = arenas.plans.readers
        self._planned = float("-inf")  # when the latest plan came
        self._pid = os.getpid()

    def started(self) -> None:
        self._runner = self._make_runner()
        self.ctx.send("scheduler", WorkerLoaded(self.rank, self._runner.max_pages()))

    @on(Capacity)
    def capacity(self, m: Capacity) -> None:
        if self._runner is not None:
            self._runner.allocate(m.num_pages)
            self._ready = True
        self.ctx.send("scheduler", WorkerArmed(self.rank))

    @on(Wake)
    def wake(self, m: Wake) -> None:
        """A bell: `idle` runs next, which is the point of it."""

    def idle(self) -> bool:
        """Serve whichever source is ready.  False only when no step is in flight and the bell is armed."""
        worked = self._post_finished()
        if (raw := self.plans.take()) is not None:
            self._launch(StepPlan.unpack(raw))
            worked = True
        if not worked and self._running:
            time.sleep(_BREATHE_SECONDS)  # a step is in flight: poll, do not park
            worked = True
        worked = worked or self._capture_while_idle()
        if worked:
            self._arm(False)
            return True
        self._arm(True)
        return self.plans.pending()  # one more look with the flag up

    def _capture_while_idle(self) -> bool:
        """Let the runner prepare, not between two steps but after a pause, for which it stays awake.  False: it is done.

        Several ranks pause at different moments, and what they prepare has sums over all of them in it: rank 0 asks the
        scheduler, whose CAPTURE reaches all between the same two steps.
        """
        if self._runner is None or not self._ready or self._captured or self._asked or self.rank > 0:
            return False
        if self.ctx.now() - self._planned < _PAUSE_SECONDS:
            time.sleep(_BREATHE_SECONDS)
            return True
        if self._ranks > 1:
            self._asked = True
            self.ctx.send("scheduler", MayCapture())
            return True
        self._captured = not self._runner.capture_ahead()
        return not self._captured

    def _arm(self, flag: bool) -> None:
        """Raise or lower my "ring me" flag; it stays up until there is work (see process.run)."""
        if flag != self._armed:
            self.plans.park(flag)
            self._armed = flag

    def _launch(self, plan: StepPlan) -> None:
        if self.plans.starved():
            self.ctx.send("scheduler", Wake())
        if plan.kind == PlanKind.STOP:
            self._stopped = True
            self.ctx.stop()
            return
        if self._runner is None:
            raise RuntimeError(f"plan {plan.step} arrived before the model was loaded")
        self._asked = False  # what is asked during a step may be passed over
        if plan.kind == PlanKind.CAPTURE:
            self._captured = not self._runner.capture_ahead()
            return
        self.board.beat(self._pid, plan.step, True)
        self._planned = self.ctx.now()
        self._running.append(self._runner.launch(plan))

    def _post_finished(self) -> bool:
        if not self._running or not self._running[0].done():
            return False
        result = self._running.popleft().result()
        self.board.beat(self._pid, result.step, bool(self._running))
        if self.results is not None:
            self.results.publish(result.pack())
            if self.results.parked():
                self.ctx.send("scheduler", Wake())
        return True

    def stopping(self) -> None:
        """Leave the group where all ranks do.  A rank that fails alone would wait there for the others, who wait for it."""
        if self._runner is not None and self._stopped:
            self._runner.close()
