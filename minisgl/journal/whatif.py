"""What if: the requests of a journal under other policies, on a GPU that is as fast as the recorded one.

The replay gives arrivals, prompts, what each request said and how long each step took.  The simulator fits its cost model to
these steps and runs the real machine with the changed limits under virtual time.  The recorded run and a simulation of it,
unchanged, stand beside the answer: the difference of these two is how far the simulation can be trusted.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minisgl.actors.scheduler.interface import Add, SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import I32
from minisgl.errors import UserError
from minisgl.journal.replay import Replay, steps
from minisgl.plan import StepResult
from minisgl.sampling_params import SamplingParams
from minisgl.simulation.fleet import LATENCY, Run
from minisgl.simulation.gpu import CostModel, FittedCosts, Work, fit
from minisgl.simulation.replica import STEP_COLUMNS, Log, Replica, work_of
from minisgl.simulation.report import Summary, summarise

_LEAST_STEPS = 8  # to fit a cost model to


@dataclass(slots=True)
class _Heard:
    """A request of the journal and what became of it."""

    request: Request
    ids: I32  # its prompt
    arrival: float
    said: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    cached: int = -1
    finish: int = 0


class _Lived(Replica):
    """Stands for the recorded machine in a report."""

    def __init__(self, machine: StepMachine) -> None:
        self.machine = machine
        self.steps = {name: array("d") for name in STEP_COLUMNS}
        self.requests, self.busy, self.starved = 0, 0.0, 0


class _Again(Replica):
    """A replica whose requests say what they said."""

    def __init__(self, limits: SchedulerLimits, costs: CostModel, latency: float, log: Log, heard: list[_Heard]) -> None:
        super().__init__(limits, costs, latency, log)
        self.machine._is_eos = _Never()  # type: ignore[assignment]
        self._heard = heard

    def _tokens(self, rows: I32) -> I32:
        table, out = self.machine.table, np.zeros(len(rows), np.int32)
        for i, (uid, planned) in enumerate(zip(table.uid[rows].tolist(), table.planned[rows].tolist(), strict=True)):
            if uid >= 0:
                heard = self._heard[uid]
                said, at = heard.said, planned - len(heard.ids)
                out[i] = said[at] if 0 <= at < len(said) else 0
        return out


class _Never:
    """No token ends an answer: each is as long as it was."""

    def __getitem__(self, tokens: Any) -> Any:
        return np.zeros(len(tokens), np.bool_)


class Recorded:
    """A journal, read for its requests and the cost of its steps.  Raises UserError where it has too little of either."""

    def __init__(self, path: str) -> None:
        self.heard: dict[int, _Heard] = {}
        self.works: list[Work] = []
        self.seconds: list[float] = []
        replay = Replay()
        lived: _Lived | None = None
        sent: dict[int, Work] = {}
        decode = np.zeros(0, np.int32)
        self.skipped = 0  # requests that were there when it began
        for _ in steps(path, replay):
            machine = replay.machine
            if machine is None:
                continue
            if lived is None:
                lived = _Lived(machine)
                self.skipped = len(machine.running) + len(machine.waiting) - sum(isinstance(e, Add) for e in replay.events)
                self.limits, self.cached_pages = machine.limits, machine.cache.num_pages
            lived.machine = machine
            self._step(replay, lived, sent)
            if (plan := replay.output.plan) is not None:
                decode = decode if plan.decode is None else plan.decode
                sent[plan.step] = work_of(machine, plan, decode)
                used = machine.limits.num_pages - machine.pool.free
                row = (replay.now, len(machine.waiting), len(machine.running), used - machine.cache.evictable, used)
                for column, value in zip(lived.steps.values(), row, strict=True):
                    column.append(value)
        self.requests = [h for h in self.heard.values() if h.said]
        if lived is None or not self.requests or len(self.works) < _LEAST_STEPS:
            raise UserError(f"{path}: too short to ask what would have been: {len(self.works)} steps with known times")
        self.lived = lived
        self.costs: FittedCosts = fit(self.works, self.seconds)

    def _step(self, replay: Replay, lived: _Lived, sent: dict[int, Work]) -> None:
        for event in replay.events:
            if isinstance(event, Add):
                request = event.request
                self.heard[request.uid] = _Heard(request, request.ids, replay.now)
            elif isinstance(event, StepResult) and (work := sent.pop(event.step, None)) is not None and event.busy_us:
                lived.busy += event.busy_us * 1e-6
                self.works.append(work)
                self.seconds.append(event.busy_us * 1e-6)
        for uid, cached in replay.output.started:
            if uid in self.heard:
                self.heard[uid].cached = cached
        for rows in replay.output.outputs:
            tokens = iter(rows.tokens.tolist())
            for uid, count, finish in zip(rows.uids.tolist(), rows.counts.tolist(), rows.finish.tolist(), strict=True):
                mine = [next(tokens) for _ in range(count)]
                if (heard := self.heard.get(uid)) is not None:
                    heard.said += mine
                    heard.times += [replay.now] * count
                    heard.finish = finish
        for uid, _ in replay.output.vectors:
            if uid in self.heard:
                self.heard[uid].said, self.heard[uid].times = [0], [replay.now]

    @property
    def error(self) -> float:
        """How far the cost model is from the measured steps, as a share of their time."""
        predicted = np.array([self.costs.seconds(work) for work in self.works])
        return float(np.abs(predicted - self.seconds).sum() / sum(self.seconds))

    def summary(self) -> Summary:
        """What was recorded, in the form of a simulation's report."""
        log = Log(len(self.requests))
        for uid, heard in enumerate(self.requests):
            log.arrival[uid], log.first[uid], log.last[uid] = heard.arrival, heard.times[0], heard.times[-1]
            log.tokens[uid], log.cached[uid], log.finish[uid] = len(heard.said), max(0, heard.cached), heard.finish
            log.gaps.append(np.diff(np.array(heard.times)))
        self.lived.requests = len(self.requests)
        return summarise(Run(self.limits, [self.lived], log, self._inputs(), self._inputs() * 0, np.zeros(0, np.int64)))

    def _inputs(self) -> Any:
        return np.array([len(heard.ids) for heard in self.requests], np.int64)

    def simulate(self, limits: SchedulerLimits, latency: float = LATENCY) -> Summary:
        """The same requests under other limits.  Those that could never run are left out, and counted as refused."""
        log = Log(len(self.requests))
        replica = _Again(limits, self.costs, latency, log, self.requests)
        room = min(limits.max_context, limits.kv_tokens)
        inputs, refused = self._inputs(), []
        coming: deque[tuple[float, Request]] = deque()
        for uid, heard in enumerate(self.requests):
            log.arrival[uid] = heard.arrival
            if len(heard.ids) + len(heard.said) > room:
                refused.append(uid)
                continue
            params = SamplingParams(temperature=0, ignore_eos=True, grammar=heard.request.params.grammar)
            options = replace(heard.request.options, pooling="")
            limit = len(heard.ids) + len(heard.said)
            coming.append((heard.arrival, Request(uid, heard.ids, limit, uid, params, options)))
        while coming or replica.wake < np.inf:
            if coming and coming[0][0] <= replica.wake:
                arrival, request = coming.popleft()
                replica.submit(request, arrival)
            else:
                replica.call()
        return summarise(Run(limits, [replica], log, inputs, inputs * 0, np.array(refused, np.int64)))
