"""Runs the model: feeds the plans of the scheduler to a runner, and posts the results.  One worker process per rank.

Owns      the rank's shard of the model, its KV cache, and the resident state of every slot (inside the runner).
Receives  Capacity (scheduler, once), PrepareGrammar, Wake (scheduler); plans through the plan ring, STOP among them.
Sends     WorkerLoaded, WorkerArmed, GrammarPrepared, MayCapture, Wake (scheduler); rank 0 publishes results through the token
          ring.

A worker knows slots and pages, never requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from minisgl.actors.messages import Capacity, GrammarPrepared, MayCapture, PrepareGrammar, Wake, WorkerArmed, WorkerLoaded
from minisgl.actors.runtime.actor import Actor, Context, on
from minisgl.actors.runtime.ring import RingReader, RingWriter
from minisgl.actors.runtime.shared_memory import Arenas
from minisgl.actors.runtime.status import Board
from minisgl.actors.wire import BadMessage
from minisgl.plan import PlanKind, StepPlan, StepResult

_BREATHE_SECONDS = 20e-6
_PAUSE_SECONDS = 0.05  # time without plans after which the runner may capture graphs


class Pending(Protocol):
    """A launched step."""

    def done(self) -> bool:
        """Whether the result is there.  Never blocks."""

    def result(self) -> StepResult:
        """What the step sampled.  Only after `done`."""


class GrammarsLike(Protocol):
    """Compiles grammars beside the steps; `ticket` is a number of the caller."""

    def compile_ahead(self, ticket: int, text: str) -> None: ...

    def preparing(self) -> bool:
        """Whether `prepared` will return more tickets."""

    def prepared(self) -> list[int]:
        """The tickets of the grammars compiled since the last call.  Never blocks."""


class RunnerLike(Protocol):
    """What a worker needs of the model side: a Runner of minisgl.model.cpu or .cuda, or the fake runner."""

    @property
    def grammars(self) -> GrammarsLike | None:
        """The grammars of its slots."""

    def max_pages(self) -> int:
        """How many KV pages would fit."""

    def allocate(self, num_pages: int) -> None:
        """Allocate the KV cache."""

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step behind those already started."""

    def capture_ahead(self) -> bool:
        """Spend some milliseconds on making later steps faster, by capturing one more graph.  False: no graph is left.

        All ranks do the same thing in the same call.
        """

    def close(self) -> None:
        """Leave the group, free the device."""


class IdleCapture:
    """Lets the runner capture graphs for later steps while no plan comes: after a pause, never between two steps.

    A single rank captures by itself.  With several ranks, each sees its own pauses and a capture contains all-reduces, so
    rank 0 sends MayCapture, and the CAPTURE plan that the scheduler answers with reaches all ranks between the same two steps.
    """

    def __init__(self, ctx: Context, runner: RunnerLike, rank: int, ranks: int) -> None:
        self._ctx = ctx
        self._runner = runner
        self._alone = ranks == 1
        self._initiates = rank == 0
        self._requested = False  # MayCapture was sent, and no plan has come since
        self._finished = False
        self._last_step = float("-inf")

    def plan_came(self, plan: StepPlan) -> None:
        """Note a plan, and capture if it says so.  The scheduler drops a request that reaches it during a step."""
        self._requested = False
        if plan.kind == PlanKind.CAPTURE:
            self.capture()
        else:
            self._last_step = self._ctx.now()

    def use_pause(self) -> bool:
        """Wait, request or capture.  False: nothing is left to do before the next plan, so the worker may sleep."""
        if self._finished or self._requested or not self._initiates:
            return False
        if self._ctx.now() - self._last_step < _PAUSE_SECONDS:
            time.sleep(_BREATHE_SECONDS)
            return True
        if self._alone:
            self.capture()
            return not self._finished
        self._requested = True
        self._ctx.send("scheduler", MayCapture())
        return True

    def capture(self) -> None:
        """Capture one more graph."""
        self._finished = not self._runner.capture_ahead()


class WorkerActor(Actor):
    """Plans from the ring to the runner, results from the runner to the ring; blocks on neither.

    Two sources, both polled, and one place to sleep, the mailbox: a worker that waited for the running step would launch every
    second step late, because the next plan arrives while the step runs.
    """

    _runner: RunnerLike

    def __init__(self, ctx: Context, rank: int, arenas: Arenas, make_runner: Callable[[], RunnerLike]) -> None:
        super().__init__(ctx)
        self.rank = rank
        self.plans = RingReader(arenas.plans, rank)
        self.results = RingWriter(arenas.results) if rank == 0 else None
        self.board = Board(arenas.board, ctx.name)
        self._make_runner = make_runner
        self._running: deque[Pending] = deque()
        self._compiling: GrammarsLike | None = None  # while it compiles some
        self._idle_capture: IdleCapture | None = None  # once there is a KV cache
        self._max_pages = 0  # that fit
        self._ranks = arenas.plans.readers
        self._stopped = self._rejoining = False

    def started(self) -> None:
        self._runner = self._make_runner()
        self._max_pages = self._runner.max_pages()
        self.ctx.send("scheduler", WorkerLoaded(self.rank, self._max_pages))

    @on(Capacity)
    def capacity(self, m: Capacity) -> None:
        if self._idle_capture is not None or m.num_pages > self._max_pages:
            raise BadMessage(f"{m.num_pages} pages: the KV cache is allocated, or has no room for them")
        self._runner.allocate(m.num_pages)
        self._idle_capture = IdleCapture(self.ctx, self._runner, self.rank, self._ranks)
        self.ctx.send("scheduler", WorkerArmed(self.rank))

    @on(PrepareGrammar)
    def prepare_grammar(self, m: PrepareGrammar) -> None:
        if (grammars := self._runner.grammars) is None:
            self.ctx.send("scheduler", GrammarPrepared(m.uid, self.rank))
        else:
            grammars.compile_ahead(m.uid, m.grammar)
            self._compiling = grammars

    def _report_grammars(self) -> None:
        """Tell the scheduler which grammars have been compiled."""
        if (grammars := self._compiling) is not None:
            for uid in grammars.prepared():
                self.ctx.send("scheduler", GrammarPrepared(uid, self.rank))
            if not grammars.preparing():
                self._compiling = None

    @on(Wake)
    def wake(self, m: Wake) -> None:
        """A bell: `idle` runs next, which is the point of it."""

    def idle(self) -> bool:
        """Post a finished step, take and launch a plan.  False only with no step in flight and the "ring me" flag up."""
        posted = self._post()
        if self._rejoining and not self._running:
            self._rejoining = False
            self.ctx.send("scheduler", WorkerArmed(self.rank))
        self._report_grammars()
        plan = self._take()
        if plan is not None:
            self._launch(plan)
        elif (self._running or self._compiling is not None) and not posted:
            time.sleep(_BREATHE_SECONDS)  # a step is in flight, or a grammar: poll, do not park
        elif not posted and not (self._idle_capture and self._idle_capture.use_pause()):
            self.plans.park(True)  # the flag stays up until there is work (see process.run)
            return self.plans.pending()  # one more look with the flag up
        self.plans.park(False)
        return True

    def _post(self) -> bool:
        """Publish the result of the oldest step if it has finished."""
        if not self._running or not self._running[0].done():
            return False
        result = self._running.popleft().result()
        self.board.report(result.step, bool(self._running))
        if self.results is not None:
            self.results.publish(result.pack())
            if self.results.parked():
                self.ctx.send("scheduler", Wake())
        return True

    def _take(self) -> StepPlan | None:
        """The next plan, if there is one.  A scheduler that waits for room in the ring is woken."""
        raw = self.plans.take()
        if raw is None:
            return None
        if self.plans.starved():
            self.ctx.send("scheduler", Wake())
        return StepPlan.unpack(raw)

    def _launch(self, plan: StepPlan) -> None:
        if plan.kind == PlanKind.STOP:
            self._stopped = True
            self.ctx.stop()
            return
        if self._idle_capture is None:
            raise RuntimeError(f"plan {plan.step} arrived before the KV cache was allocated")
        self._idle_capture.plan_came(plan)
        if plan.kind == PlanKind.REJOIN:
            self.ctx.forget("scheduler")
            self._rejoining = True
        if plan.kind == PlanKind.STEP:
            self.board.report(plan.step, True)
            self._running.append(self._runner.launch(plan))

    def stopping(self) -> None:
        """Leave the group where all ranks do.  A rank that fails alone would wait there for the others, who wait for it."""
        if self._stopped:
            self._runner.close()
