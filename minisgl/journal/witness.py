"""Watches a StepMachine decide, and notes each decision with its reason as plain facts: `Witness`.

It wraps methods of one machine that is stepped here, in a replay or a test; the scheduler process knows nothing of it.  What is
noted is what the machine itself looked at, so that no reason is guessed afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from minisgl.actors.scheduler.admission import WINDOW
from minisgl.actors.scheduler.interface import Add, Drop, Event, Flush, Output
from minisgl.actors.scheduler.plan_builder import PlanBuilder
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.cache.radix import Match
from minisgl.plan import StepResult
from minisgl.sampling_params import Finish


@dataclass(frozen=True, slots=True)
class Join:
    """A request got a slot.  why: the reason why no more of its prompt was cached, see RadixCache.why_missed."""

    uid: int
    tokens: int
    cached: int
    why: str
    resumed: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens start to end of `tokens` are computed.  why: "whole" prompt, "budget", "pages" or "result"."""

    uid: int
    start: int
    end: int
    tokens: int
    why: str


@dataclass(frozen=True, slots=True)
class Retraction:
    """A running request went back to the queue.  why: "pages" for decodes, "way" for another, "stuck" or "nan"."""

    uid: int
    why: str


@dataclass(frozen=True, slots=True)
class End:
    """A request ended after it had said so many tokens; Finish.NONE: with a vector."""

    uid: int
    finish: Finish
    tokens: int
    waited: bool = False  # it never ran, or waited to run again


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a request waits.

    reason: "slot"; "pages" (needs `number`, of which `of` can be had); "shared" (request `number` computes its beginning);
    "budget" (its turn comes behind those that used it up); "rows" (its call has a row, and `number` run, enough for a step);
    "blocked" (behind one that many have overtaken); "extras" (this plan has no room for its extras); "line" (others are tried
    first); "plan" (nothing was planned).
    """

    uid: int
    reason: str
    number: int = 0
    of: int = 0


@dataclass(slots=True)
class Step:
    """The facts of one call of the machine."""

    now: float = 0.0
    number: int | None = None  # of its plan; None: there is none
    decodes: int = 0
    budget: int | None = None  # prompt tokens that it might have
    most: int = 0  # rows before calls that have one get no more
    arrived: list[tuple[int, int]] = field(default_factory=list)  # (uid, tokens)
    flushed: bool = False
    results: list[int] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    retractions: list[Retraction] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    withheld: int = 0  # rows whose grammar waits for a token in flight
    evicted: int = 0  # pages
    held: float = 0.0  # seconds for which a plan is held back
    full: bool = False  # as many plans are in flight as may be
    slots: int = 0
    target: float | None = 0.0  # see SchedulerLimits.itl_target
    step_tokens: int = 0


def plain(step: Step) -> dict[str, Any]:
    """The facts as values for JSON."""
    return asdict(step) | {"ends": [asdict(e) | {"finish": e.finish.name} for e in step.ends]}


def step_of(values: dict[str, Any]) -> Step:
    """The inverse of `plain`.  Raises KeyError, TypeError or ValueError for what is none."""
    kinds: dict[str, Any] = {"joins": Join, "chunks": Chunk, "retractions": Retraction, "waits": Wait}
    facts = {name: [kind(**fact) for fact in values[name]] for name, kind in kinds.items()}
    facts["ends"] = [End(**{**end, "finish": Finish[end["finish"]]}) for end in values["ends"]]
    facts["arrived"] = [(int(uid), int(tokens)) for uid, tokens in values["arrived"]]
    return Step(**{**values, **facts})


_WRAPPED = (
    *("_prefill", "_cut_chunk", "_try_admit", "_is_being_computed", "_plan_decode"),
    *("_make_way", "_retract", "_release", "_fail"),
)


class Witness:
    """Stands between a machine and its caller: `step` is that of the machine and returns the facts, too."""

    def __init__(self, machine: StepMachine) -> None:
        self.machine = machine
        self._step = Step()
        self._cause = "stuck"
        self._tried: dict[int, Wait] = {}
        self._missed = ""
        self._left = 0  # of the budget
        self._planned = self._blocked = False
        m: Any = machine
        for name in _WRAPPED:
            setattr(m, name, self._around(getattr(self, name), getattr(m, name)))
        m.cache.why_missed = self._around(self._why_missed, m.cache.why_missed)

    def leave(self) -> None:
        """The machine is as it was, and is seen no longer."""
        for name in _WRAPPED:
            delattr(self.machine, name)
        del self.machine.cache.why_missed

    @staticmethod
    def _around(mine: Any, inner: Any) -> Any:
        return lambda *args, **named: mine(inner, *args, **named)

    def step(self, inbox: Iterable[Event], now: float) -> tuple[Output, Step]:
        """Have the machine take in the events; returns its output and what it did."""
        machine, events = self.machine, list(inbox)
        self.begin(events, now)
        return (output := machine.step(events, now)), self.end(output)

    def begin(self, events: list[Event], now: float) -> None:
        """The machine is about to be called."""
        m = self.machine
        self._step = step = Step(now, slots=m.limits.slots, target=m.limits.itl_target, step_tokens=m.limits.step_tokens)
        self._tried, self._planned, self._blocked, self._cause = {}, False, False, "stuck"
        self._evicted = m.cache.evicted_pages
        for event in events:
            if isinstance(event, Add):
                step.arrived.append((event.request.uid, len(event.request.ids)))
            elif isinstance(event, StepResult):
                step.results.append(event.step)
            step.flushed |= isinstance(event, Flush)
        queued = {e.uid: self._queued(e.uid) for e in events if isinstance(e, Drop) and e.uid in m.waiting}
        self._dropped = {uid: r for uid, r in queued.items() if r is not None}

    def _queued(self, uid: int) -> Request | None:
        return next((r for r in self.machine.waiting.front(len(self.machine.waiting)) if r.uid == uid), None)

    def end(self, output: Output) -> Step:
        """The machine has been called; returns what it did."""
        m, step = self.machine, self._step
        step.held, step.evicted = output.again_in, m.cache.evicted_pages - self._evicted
        step.full = not self._planned and not output.again_in and len(m.inflight) >= m.limits.max_steps_in_flight
        reasons = {
            uid: Finish(why)
            for rows in output.outputs
            for uid, why in zip(rows.uids.tolist(), rows.finish.tolist(), strict=True)
            if why
        }
        vectors, released = {uid for uid, _ in output.vectors}, step.ends
        step.ends = [End(e.uid, reasons.pop(e.uid), e.tokens) for e in released if e.uid in reasons]
        step.ends += [End(e.uid, Finish.NONE, e.tokens) for e in released if e.uid in vectors]
        for uid, why in reasons.items():
            request = self._dropped.get(uid)
            step.ends.append(End(uid, why, len(request.ids) - request.n_prompt if request else 0, waited=True))
        if output.plan is not None:
            step.number = output.plan.step
            sent = m.inflight[-1].slots
            step.decodes = len(sent) - sum(chunk.why == "whole" for chunk in step.chunks)
        step.waits = [self._wait(r, i) for i, r in enumerate(m.waiting.front(len(m.waiting)))]
        return step

    def _wait(self, request: Request, place: int) -> Wait:
        """Why a request is still in the queue, `place` others standing before it."""
        m, uid, step = self.machine, request.uid, self._step
        call = request.options.client, request.options.call
        if not self._planned:
            return Wait(uid, "plan")
        if uid in self._tried:
            return self._tried[uid]
        if not m.table.free_slots:
            return Wait(uid, "slot", m.limits.slots)
        if self._blocked:
            return Wait(uid, "blocked")
        if self._left <= 0:
            return Wait(uid, "budget", step.budget or 0)
        if len(m.running) >= step.most and m.fair.call_rows[call]:
            return Wait(uid, "rows", len(m.running), step.most)
        have = m.pool.free + m.cache.evictable
        if request.missing_pages > have:
            return Wait(uid, "pages", request.missing_pages, have)
        return Wait(uid, "line", place, WINDOW)

    # ---------------- around the machine's own methods
    def _prefill(self, inner: Any, first: list[Request], budget: int, most: int, *rest: Any) -> None:
        self._step.budget, self._step.most, self._left, self._planned = budget, most, budget, True
        self._step.withheld, self._tried = self._withheld, {}
        inner(first, budget, most, *rest)

    def _plan_decode(self, inner: Any) -> Any:
        m, before, self._cause = self.machine, self._cause, "pages"
        slots = inner()
        self._cause = before
        due = m._decoding[m.table.planned[m._decoding] + 1 < m.table.limit[m._decoding]]
        planned = set(slots.tolist())
        grammar = m.table.with_grammar if m.limits.grammar_waits_for_token else set()
        self._withheld = sum(1 for slot in due.tolist() if slot not in planned and slot in grammar)
        return slots

    def _make_way(self, inner: Any) -> Any:
        before, self._cause = self._cause, "way"
        found = inner()
        self._cause = before
        return found

    def _fail(self, inner: Any, *args: Any) -> None:
        before, self._cause = self._cause, "nan"
        inner(*args)
        self._cause = before

    def _retract(self, inner: Any, victim: tuple[int, Request] | None = None, front: bool = True) -> None:
        before = set(self.machine.running)
        inner(victim, front)
        for uid in before - set(self.machine.running):
            self._step.retractions.append(Retraction(uid, self._cause))

    def _release(self, inner: Any, slot: int) -> None:
        table, request = self.machine.table, self.machine._request(slot)
        self._step.ends.append(End(request.uid, Finish.NONE, int(table.length[slot]) - request.n_prompt))
        inner(slot)

    def _why_missed(self, inner: Any, ids: Any, match: Match) -> str:
        self._missed = str(inner(ids, match))
        return self._missed

    def _try_admit(self, inner: Any, request: Request, match: Match, builder: PlanBuilder, out: Output) -> int | None:
        m = self.machine
        table, size = m.table, m.limits.page_size
        promised = sum(-(-int(table.length[s]) // size) - int(table.n_pages[s]) for s in m._prefilling)
        have = max(0, m.pool.free + m.cache.evictable - match.unreferenced - promised - len(m.running))
        slot: int | None = inner(request, match, builder, out)
        if slot is not None:
            cached = int(m.table.planned[slot])
            self._step.joins.append(Join(request.uid, len(request.ids), cached, self._missed, request.resumed))
            self._tried.pop(request.uid, None)
        elif not m._has_pages_for(request, match):
            self._tried[request.uid] = Wait(request.uid, "pages", request.missing_pages, have)
            self._blocked |= m._blocks(request)
        else:
            self._tried[request.uid] = Wait(request.uid, "extras")
        return slot

    def _is_being_computed(self, inner: Any, request: Request, match: Match) -> bool:
        waits = bool(inner(request, match))
        if waits:
            self._tried[request.uid] = Wait(request.uid, "shared", self._who_computes(request, match))
        return waits

    def _who_computes(self, request: Request, match: Match) -> int:
        """The running request whose next page is the next one of `request`."""
        m, table, size = self.machine, self.machine.table, self.machine.limits.page_size
        mine = request.ids[match.num_pages * size : (match.num_pages + 1) * size]
        for slot in m._prefilling:
            here = table.n_shared[slot] == match.num_pages and table.handle[slot] is match.node
            theirs = m._request(slot)
            if here and np.array_equal(theirs.ids[match.num_pages * size : (match.num_pages + 1) * size], mine):
                return theirs.uid
        return 0

    def _cut_chunk(self, inner: Any, slot: int, budget: int, builder: PlanBuilder) -> int:
        m, table, size = self.machine, self.machine.table, self.machine.limits.page_size
        request, start = m._request(slot), int(table.planned[slot])
        room = (int(table.n_pages[slot]) + m.pool.free + m.cache.evictable) * size - start
        n = int(inner(slot, budget, builder))
        self._left = budget - n
        end, all_of_it = start + n, len(request.ids)
        if n:
            why = "whole" if end == all_of_it else "budget" if n == budget else "pages" if n == room else "result"
            self._step.chunks.append(Chunk(request.uid, start, end, all_of_it, why))
        return n

    _withheld = 0
    _evicted = 0
    _dropped: dict[int, Request]


class Watch:
    """Calls the machine of a replay with a Witness beside it, another one for each machine: see `Replay.call`.

    `steps`: the facts of its calls, the latest last, until somebody takes them away.
    """

    def __init__(self) -> None:
        self.steps: deque[Step] = deque()
        self._witness: Witness | None = None

    def __call__(self, machine: StepMachine, inbox: list[Event], now: float, step: int | None) -> Output:
        if self._witness is None or self._witness.machine is not machine:
            self._witness = Witness(machine)
        output, facts = self._witness.step(inbox, now)
        self.steps.append(facts)
        return output

    def leave(self) -> None:
        """Nobody asks any longer.  Idempotent."""
        if self._witness is not None:
            self._witness.leave()
        self._witness = None
        self.steps.clear()
