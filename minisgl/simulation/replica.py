"""A replica runs the real StepMachine in front of a modelled GPU, under virtual time.

    arrivals --> machine.step(inbox, now) --> plan --> GPU: starts when it is free and the plan is published --> StepResult
                        ^                                                                                           |
                        +-------------------------------------------------------------------------------------------+

The scheduler is one thread: a call of `step` takes `latency` seconds, and the next call sees what happened meanwhile.  The GPU
runs plans in order, one at a time; up to `max_steps_in_flight` of them are published.  A result takes no time to come back.
"""

from __future__ import annotations

import math
from array import array
from collections import deque

import numpy as np

from minisgl.actors.messages import Tokens
from minisgl.actors.scheduler.interface import Add, Event, SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import F64, I32, I64, U8
from minisgl.plan import DRAW, StepPlan, StepResult
from minisgl.simulation.gpu import CostModel, Work
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN

# Start of a step, waiting and running requests, pages of running requests, all pages in use.
STEP_COLUMNS = ("time", "waiting", "running", "active", "used")


class Log:
    """What happened to the requests of a run, as columns by uid (the index in the trace).  Times in virtual seconds."""

    def __init__(self, n: int) -> None:
        self.arrival: F64 = np.zeros(n)
        self.first: F64 = np.full(n, np.nan)  # the first token
        self.last: F64 = np.full(n, np.nan)  # the newest token
        self.tokens: I64 = np.zeros(n, np.int64)
        self.cached: I64 = np.full(n, -1, np.int64)  # prompt tokens found in the cache; -1: never admitted
        self.finish: U8 = np.zeros(n, np.uint8)
        self.gaps: list[F64] = []  # seconds between consecutive tokens of a request
        self.worst: F64 = np.zeros(n)  # the longest of these, by request

    def enter(self, rows: Tokens, now: float) -> tuple[list[int], list[int]]:
        """Enter one token for each row that has one.  Returns the uids that had their first token, and those that ended."""
        uids = rows.uids[rows.counts > 0]
        old = self.tokens[uids] > 0
        gaps = now - self.last[uids[old]]
        self.gaps.append(gaps)
        self.worst[uids[old]] = np.maximum(self.worst[uids[old]], gaps)
        fresh = uids[~old]
        self.first[fresh] = now
        self.last[uids] = now
        self.tokens[uids] += 1
        self.finish[rows.uids] = rows.finish
        return fresh.tolist(), rows.uids[rows.finish > 0].tolist()


def work_of(machine: StepMachine, plan: StepPlan, decode: I32) -> Work:
    """The work of a plan that the machine has just made; `decode`: its slots that decode."""
    slots, n = plan.prefill["slot"].astype(np.int64), plan.prefill["n_ids"].astype(np.int64)
    context = machine.table.planned[slots].astype(np.int64)  # at the end of each chunk
    return Work(
        prefill_tokens=int(n.sum()),
        pairs=int((n * (context - n) + n * (n + 1) // 2).sum()),
        prefill_context=int(context.sum()),
        decode_rows=len(decode),
        decode_context=int(machine.table.planned[decode].sum()),
        samples=int(((plan.prefill["sample"] & DRAW) > 0).sum()) + len(decode),
    )


class Replica:
    """A machine, its GPU, and the plans and results on their way between them.  `call` is due at time `wake`."""

    def __init__(self, limits: SchedulerLimits, costs: CostModel, latency: float, log: Log) -> None:
        self.machine = StepMachine(limits)
        self.steps = {name: array("d") for name in STEP_COLUMNS}  # one entry per step
        self.requests = 0
        self.busy = 0.0  # seconds of GPU time
        self.starved = 0  # longest run of steps without a token for a decoding request
        self._costs = costs
        self._latency = latency
        self._log = log
        self._arrivals: deque[tuple[float, Request]] = deque()
        self._results: deque[tuple[float, StepResult]] = deque()
        self._scheduler_free = 0.0
        self._gpu_free = 0.0
        self._due = math.inf  # when the machine makes a plan that it holds back
        self._again = False  # the last call made a plan and another may be due
        self._decode: I32 = np.zeros(0, np.int32)
        self._served: I64 = np.zeros(limits.slots, np.int64)  # step of a slot's last token

    def submit(self, request: Request, now: float) -> None:
        """A request reaches the scheduler."""
        self.requests += 1
        self._arrivals.append((now, request))

    @property
    def wake(self) -> float:
        """When the scheduler next has something to do; infinity if no arrival or result is on its way."""
        if self._again:
            return self._scheduler_free
        due = [self._due, *(events[0][0] for events in (self._arrivals, self._results) if events)]
        return max(self._scheduler_free, min(due))

    def check(self) -> None:
        """At the end of a trace.  Raises RuntimeError if a request never ends, AssertionError if a page or slot is lost."""
        self.machine.check()
        if not self.machine.idle:
            waiting, running = len(self.machine.waiting), len(self.machine.running)
            raise RuntimeError(f"{waiting} requests never start and {running} never end")

    def call(self) -> list[tuple[list[int], list[int]]]:
        """One call of `StepMachine.step`, at `wake`.  Returns what `Log.enter` returns for the step's outputs."""
        now = self.wake
        inbox: list[Event] = []
        while self._results and self._results[0][0] <= now:
            inbox.append(self._results.popleft()[1])
        while self._arrivals and self._arrivals[0][0] <= now:
            inbox.append(Add(self._arrivals.popleft()[1]))
        out = self.machine.step(inbox, now)
        self._due = now + out.again_in if out.again_in else math.inf
        self._scheduler_free = now + self._latency
        for uid, cached in out.started:
            self._log.cached[uid] = cached
        if out.plan is not None:
            self._run(out.plan)
        self._again = out.plan is not None and len(self.machine.inflight) < self.machine.limits.max_steps_in_flight
        return [self._log.enter(rows, now) for rows in out.outputs]

    def _tokens(self, rows: I32) -> I32:
        """What the slots draw: every request of a trace has its own answer."""
        return (self.machine.table.uid[rows] % FIRST_PROMPT_TOKEN).astype(np.int32)

    def _run(self, plan: StepPlan) -> None:
        """Queue a plan on the GPU and its result for the scheduler."""
        machine = self.machine
        if plan.decode is not None:
            self._decode = plan.decode
        sampling = plan.prefill["slot"][(plan.prefill["sample"] & DRAW) > 0].astype(np.int32)
        work = work_of(machine, plan, self._decode)
        seconds = self._costs.seconds(work)
        start = max(self._gpu_free, self._scheduler_free)
        self._gpu_free = start + seconds
        self.busy += seconds
        rows = np.concatenate([sampling, self._decode])
        self._results.append((self._gpu_free, StepResult(plan.step, self._tokens(rows), max(1, round(seconds * 1e6)))))
        if len(self._decode):
            self.starved = max(self.starved, int((plan.step - self._served[self._decode]).max()) - 1)
        self._served[rows] = plan.step
        used = machine.limits.num_pages - machine.pool.free
        row = (start, len(machine.waiting), len(machine.running), used - machine.cache.evictable, used)
        for column, value in zip(self.steps.values(), row, strict=True):
            column.append(value)
