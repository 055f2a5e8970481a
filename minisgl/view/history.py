"""What has happened to a machine, as far as pages show it: its last steps, the lives of requests, and what each second brought.

A machine knows its state; how it got there is noted here after each of its calls (`saw`), from what went in and came out.  All
of it is bounded.  Times are those of the machine's clock, in seconds.  Runs in the viewer process (process.py).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from minisgl.actors.messages import Tokens
from minisgl.actors.scheduler.interface import Add, Event, Output
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.arrays import I32, I64
from minisgl.cache.radix import Node
from minisgl.plan import DRAW, StepPlan, StepResult
from minisgl.sampling_params import Finish

STEPS = 60  # that are kept
ENDED = 200  # requests that have ended and are kept
SECONDS = 300  # of the curves
EVENTS = 512  # chunks, retractions of one request
TIMES = 4096  # tokens of one request whose times are kept
PAUSE_US = 50_000  # a longer gap between two steps is a pause: there was nothing to do
SAMPLES = 512  # of a second's latencies
LOOK_SECONDS = 0.02  # between two looks at why requests wait


@dataclass(slots=True)
class Step:
    """One plan and its result.  `chunks`: (slot, uid, first token, tokens, draws); `joins`: (slot, uid, cached tokens)."""

    number: int
    at: float  # when it was published
    joins: list[tuple[int, int, int]]
    chunks: list[tuple[int, int, int, int, bool]]
    decode: I32  # slots
    uids: I64  # of these slots
    ahead: int  # plans that were in flight before it
    done: float | None = None  # when its result was taken
    busy_us: int = 0
    idle_us: int = 0
    launch_us: int = 0
    wasted: int = 0
    end: float | None = None  # when the device was done: not after `done`, nor after the next step began


@dataclass(slots=True)
class Life:
    """One request from its arrival to its end.  `known_from`: it had begun before anybody looked."""

    uid: int
    client: int
    arrived: float
    prompt: I32
    limit: int
    priority: int = 0
    salted: bool = False
    known_from: float | None = None
    cached: int | None = None
    started: float | None = None
    slot: int | None = None
    chunks: list[tuple[int, float, int, int]] = field(default_factory=list)  # step, when, first token, tokens
    retracted: list[float] = field(default_factory=list)
    waited: dict[str, float] = field(default_factory=dict)  # seconds by reason
    said: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the tokens of `said`, from the first one that was seen
    last: float | None = None
    ended: float | None = None
    finish: int = 0
    why: str = ""  # it waits now


@dataclass(slots=True)
class Second:
    """What one second brought."""

    tokens: int = 0
    prefill: int = 0
    prompt: int = 0  # tokens of the requests that started
    cached: int = 0  # of these
    steps: int = 0
    started: int = 0
    ended: int = 0
    busy_us: int = 0
    idle_us: int = 0
    running: int = 0
    waiting: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)


class History:
    """Call `saw` after each call of the machine, and `begin` where the machine is another one or has jumped."""

    def __init__(self) -> None:
        self.steps: deque[Step] = deque(maxlen=STEPS)
        self.lives: dict[int, Life] = {}  # that wait or run
        self.ended: OrderedDict[int, Life] = OrderedDict()
        self.seconds: OrderedDict[int, Second] = OrderedDict()
        self.touched: dict[Node, float] = {}  # when a request last started on a node, or ran on it
        self.now = self.began = 0.0
        self.calls = 0
        self._looked = 0.0
        self._measured = False  # the device says how long it waited; otherwise it is what the scheduler sees of that

    # ---------------- what is noted
    def begin(self, machine: StepMachine, now: float) -> None:
        """Who runs and waits is known from now on; how they came is not."""
        self.__init__()  # type: ignore[misc]
        self.now = self.began = self._looked = now
        for slot, request in machine.running.values():
            self._enter(request, now).slot = slot
            life, known = self.lives[request.uid], machine.table.ids(slot) if slot not in machine._prefilling else request.ids
            life.said, life.started = known[request.n_prompt :].tolist(), now
        for request in machine.waiting.front(len(machine.waiting)):
            self._enter(request, now).said = request.ids[request.n_prompt :].tolist()

    def _enter(self, request: Request, known_from: float | None) -> Life:
        options, prompt = request.options, np.copy(request.ids[: request.n_prompt])
        life = Life(request.uid, options.client, request.arrived, prompt, request.limit, options.priority)
        life.salted, life.known_from = bool(options.cache_salt), known_from
        self.lives[request.uid] = life
        return life

    def saw(self, machine: StepMachine, events: Iterable[Event], now: float, output: Output) -> None:
        """The machine has been called with these events, and has given this output."""
        self.now, self.calls = now, self.calls + 1
        second = self._second(now)
        for event in events:
            if isinstance(event, Add):
                life = self._enter(event.request, None)
                if len(event.request.ids) > event.request.n_prompt:
                    life.said = event.request.ids[event.request.n_prompt :].tolist()
            elif isinstance(event, StepResult):
                self._result(event, now, second)
        for rows in output.outputs:
            self._tokens(rows, now, second)
        for uid, _ in output.vectors:
            self._end(uid, int(Finish.STOP), now, second)
        for uid, cached in output.started:
            self._start(machine, uid, cached, now, second)
        if output.plan is not None:
            self._plan(machine, output.plan, now, second)
        for uid, life in self.lives.items() if len(machine.running) < len(self.lives) else ():
            if life.slot is not None and uid in machine.waiting:  # it was running a moment ago
                life.slot = None
                life.retracted = [*life.retracted[-EVENTS:], now]
        second.running, second.waiting = len(machine.running), len(machine.waiting)

    def _second(self, now: float) -> Second:
        key = int(now)
        if (second := self.seconds.get(key)) is None:
            second = self.seconds[key] = Second()
            while len(self.seconds) > SECONDS:
                self.seconds.popitem(last=False)
        return second

    def _start(self, machine: StepMachine, uid: int, cached: int, now: float, second: Second) -> None:
        life = self.lives[uid]
        life.cached, life.started = cached, now
        second.started += 1
        second.prompt += len(life.prompt)
        second.cached += cached
        if uid in machine.running:
            self.touch(machine.table.handle[machine.running[uid][0]], now)

    def touch(self, node: Node, now: float) -> None:
        """A request uses a path of the tree."""
        while node.parent is not None:
            self.touched[node] = now
            node = node.parent

    def _plan(self, machine: StepMachine, plan: StepPlan, now: float, second: Second) -> None:
        uids = machine.table.uid
        joins = [
            (slot, int(uids[slot]), n)
            for slot, n in zip(*(plan.new_slots[k].tolist() for k in ("slot", "kv_len")), strict=True)
        ]
        for slot, uid, cached in joins:
            if (life := self.lives.get(uid)) is not None:
                life.slot, life.why = slot, ""
                life.cached = cached if life.cached is None else life.cached
        chunks = []
        for slot, flags, n in plan.prefill.tolist():
            uid, start = int(uids[slot]), int(machine.table.planned[slot]) - n
            chunks.append((slot, uid, start, n, bool(flags & DRAW)))
            life = self.lives.get(uid)
            if life is not None and len(life.chunks) < EVENTS:
                life.chunks.append((plan.step, now, start, n))
        decode = machine._last_decode if plan.decode is None else plan.decode
        slots = np.zeros(0, np.int32) if decode is None else decode
        ahead = sum(step.done is None for step in self.steps)
        self.steps.append(Step(plan.step, now, joins, chunks, slots, uids[slots], ahead))
        second.steps += 1
        second.prefill += len(plan.ids)

    def _result(self, result: StepResult, now: float, second: Second) -> None:
        before: Step | None = None
        for step in self.steps:
            if step.number == result.step:
                break
            before = step
        else:
            return
        step.done = step.end = now
        step.busy_us, step.idle_us, step.launch_us = result.busy_us, result.idle_us, result.launch_us
        self._measured |= result.idle_us > 0
        if before is not None and before.end is not None:
            before.end = min(before.end, now - (result.busy_us + result.idle_us) * 1e-6)
            gap = int((now - before.end) * 1e6) - result.busy_us
            if not self._measured and result.busy_us and gap < PAUSE_US:
                step.idle_us = max(0, gap)
        second.busy_us += result.busy_us
        second.idle_us += step.idle_us

    def _tokens(self, rows: Tokens, now: float, second: Second) -> None:
        at, tokens = 0, rows.tokens.tolist()
        for uid, n, why in zip(rows.uids.tolist(), rows.counts.tolist(), rows.finish.tolist(), strict=True):
            life = self.lives.get(uid)
            if life is None:
                at += n
                continue
            if n:
                life.said.extend(tokens[at : at + n])
                if len(life.times) < TIMES:
                    life.times.extend([now] * n)
                if life.last is not None:
                    if len(second.itl) < SAMPLES:
                        second.itl.append(now - life.last)
                elif life.known_from is None and len(second.ttft) < SAMPLES:
                    second.ttft.append(now - life.arrived)
                life.last = now
                at += n
            if why:
                self._end(uid, why, now, second)
        second.tokens += at

    def _end(self, uid: int, why: int, now: float, second: Second) -> None:
        if (life := self.lives.pop(uid, None)) is not None:
            life.ended, life.finish, life.why = now, why, ""
            self.ended[uid] = life
            second.ended += 1
            while len(self.ended) > ENDED:
                self.ended.popitem(last=False)

    # ---------------- why requests wait
    def due(self) -> bool:
        """Whether it is time to look again at who waits and why (`waits`)."""
        return self.now - self._looked >= LOOK_SECONDS

    def waits(self, why: dict[int, str]) -> None:
        """Requests wait for these reasons since the last look."""
        seconds, self._looked = self.now - self._looked, self.now
        for uid, reason in why.items():
            if (life := self.lives.get(uid)) is not None:
                life.why = reason
                since = max(0.0, min(seconds, self.now - life.arrived))
                life.waited[reason] = life.waited.get(reason, 0.0) + since

    def find(self, uid: int) -> Life | None:
        """A request that is known."""
        return self.lives.get(uid) or self.ended.get(uid)
