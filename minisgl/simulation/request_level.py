"""A replica at the level of requests: a model of the scheduler, some hundred times as fast as the step machine itself.

Steps with prompt tokens are computed one by one; the decode steps between two events (an arrival, the end of a request) are one
*stretch*, whose time is that of its middle step times their number, which is exact for costs that are linear in the context.
The cache is the real one (RadixCache or a subclass), so that matching and eviction are those of the engine.

Left out of the real scheduler: a prompt enters the cache when it is admitted, not as its chunks are computed; requests start in
the order of their arrival; prompts do not shrink their chunks for the decodes beside them (`itl_target`).  docs/capacity.md
says how far both agree.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from minisgl.actors.scheduler.interface import SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.arrays import I32, I64
from minisgl.cache.radix import Node
from minisgl.sampling_params import Finish
from minisgl.simulation.gpu import CostModel, Work
from minisgl.simulation.replica import Log
from minisgl.simulation.trace import FIRST_PROMPT_TOKEN


@dataclass(slots=True, eq=False)
class _Row:
    """A running request.  `length`: tokens with KV, computed or promised; `shared`: pages of them in the tree."""

    request: Request
    handle: Node
    shared: int
    length: int
    todo: int  # prompt tokens to compute
    left: int  # output tokens to come


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Equal steps one after the other, from `start` to `end`; `chunks`: the prompt tokens of each row, in a single step."""

    start: float
    end: float
    steps: int
    chunks: tuple[tuple[_Row, int], ...] = ()


class RequestLevelReplica:
    """The same interface as Replica: `submit` a request, `call` at time `wake`."""

    def __init__(self, limits: SchedulerLimits, costs: CostModel, latency: float, log: Log) -> None:
        self.requests = 0
        self.busy = 0.0  # seconds of GPU time
        self._limits, self._costs, self._latency, self._log = limits, costs, latency, log
        self._cache = limits.cache(limits.page_size)
        self._waiting: deque[tuple[float, Request]] = deque()
        self._prefilling: list[_Row] = []
        self._decoding: list[_Row] = []
        self._time = 0.0  # when the next step can start
        self._published = 0.0  # when the plan of that step is made: later arrivals are not in it
        self._next: _Stretch | None = None
        self._pages = 0  # named so far: page numbers are never used twice
        self._own = 0  # pages of running requests that are not in the tree

    @property
    def wake(self) -> float:
        """When the present stretch ends; infinity if there is nothing to do."""
        return self._next.end if self._next else math.inf

    def submit(self, request: Request, now: float) -> None:
        """A request reaches the scheduler: it joins the first step whose plan is not published yet."""
        self.requests += 1
        self._waiting.append((now, request))
        if self._next is None:
            self._wake_at(now)
        elif self._next.steps > 1 and len(self._decoding) < self._limits.slots:
            step = (self._next.end - self._next.start) / self._next.steps
            steps = math.ceil((now - self._next.start) / step) + self._limits.max_steps_in_flight - 1
            if steps < self._next.steps:
                self._next = self._decode(max(1, steps))

    def call(self) -> list[tuple[list[int], list[int]]]:
        """End the present stretch.  Returns the uids that had their first token, and those that ended, as Replica does."""
        done = self._next
        assert done is not None
        if not done.steps:
            self._published, self._time = done.end, done.end + self._latency
            self._plan()
            return []
        self.busy += done.end - done.start
        first = [row for row, n in done.chunks if row.todo == n]
        for row, n in done.chunks:
            row.todo -= n
        self._count(self._decoding, done.steps, (done.end - done.start) / done.steps, done.end)
        self._count(first, 1, 0.0, done.end)
        self._prefilling = [row for row in self._prefilling if row.todo]
        self._decoding += first
        ended = [row for row in self._decoding if row.left == 0]
        if ended:
            self._decoding = [row for row in self._decoding if row.left]
            for row in ended:
                self._finish(row)
        step = (done.end - done.start) / done.steps
        self._published = done.end - step if self._limits.max_steps_in_flight > 1 else done.end
        self._time = done.end
        self._plan()
        return [([row.request.uid for row in first if self._log.tokens[row.request.uid] == 1], [r.request.uid for r in ended])]

    def check(self) -> None:
        """At the end of a trace.  Raises RuntimeError if a request never ends, AssertionError if the tree is damaged."""
        self._cache.check()
        assert self._own == 0, f"{self._own} pages of no request"
        if self._waiting or self._prefilling or self._decoding:
            raise RuntimeError(f"{len(self._waiting)} requests never start and {len(self._decoding)} never end")

    # ---------------- the plan
    def _plan(self) -> None:
        """Admit who fits, and set the next stretch."""
        blocked = self._admit()
        while len(self._decoding) > 1 and self._free() < len(self._decoding):
            self._retract(self._decoding.pop())
            blocked = True
        if self._prefilling:
            self._next = self._chunks()
        elif self._decoding:
            steps = min(row.left for row in self._decoding)
            if self._waiting and not blocked:
                steps = 1
            room = (self._free() - len(self._decoding)) * self._limits.page_size // len(self._decoding)
            self._next = self._decode(max(1, min(steps, room)))
        elif self._waiting:
            if blocked:
                raise RuntimeError(f"request {self._waiting[0][1].uid} does not fit into an idle replica")
            self._wake_at(self._waiting[0][0])
        else:
            self._next = None

    def _wake_at(self, now: float) -> None:
        """The scheduler is idle, and looks at what comes until `now`."""
        now = max(self._time, now)
        self._next = _Stretch(now, now, 0)

    def _chunks(self) -> _Stretch:
        """One step: a token for each decode, and chunks of prompts in order, as far as the budget goes."""
        budget, chunks = self._limits.step_tokens - len(self._decoding), []
        for row in self._prefilling:
            n = min(budget, row.todo)
            if n <= 0:
                break
            chunks.append((row, n))
            budget -= n
        context = [row.length - row.todo + n for row, n in chunks]  # at the end of each chunk
        work = Work(
            prefill_tokens=sum(n for _, n in chunks),
            pairs=sum(n * (c - n) + n * (n + 1) // 2 for (_, n), c in zip(chunks, context, strict=True)),
            prefill_context=sum(context),
            decode_rows=len(self._decoding),
            decode_context=sum(row.length + 1 for row in self._decoding),
            samples=len(self._decoding) + sum(row.todo == n for row, n in chunks),
        )
        return _Stretch(self._time, self._time + self._seconds(work), 1, tuple(chunks))

    def _decode(self, steps: int) -> _Stretch:
        """Some steps without prompts."""
        rows = len(self._decoding)
        context = sum(row.length + 1 for row in self._decoding) + rows * (steps - 1) // 2
        seconds = self._seconds(Work(decode_rows=rows, decode_context=context, samples=rows))
        return _Stretch(self._time, self._time + steps * seconds, steps)

    def _seconds(self, work: Work) -> float:
        seconds = self._costs.seconds(work)
        return max(seconds, self._latency) if self._limits.max_steps_in_flight > 1 else seconds + self._latency

    def _count(self, rows: list[_Row], steps: int, gap: float, now: float) -> None:
        """Give each row one token a step, the last one at `now`."""
        if not rows:
            return
        uids: I64 = np.array([row.request.uid for row in rows], np.int64)
        log = self._log
        log.first[uids[log.tokens[uids] == 0]] = now
        gaps = np.where(log.tokens[uids] == 0, 0.0, gap if gap else now - np.nan_to_num(log.last[uids]))
        log.worst[uids] = np.maximum(log.worst[uids], gaps)
        log.last[uids] = now
        log.tokens[uids] += steps
        size = self._limits.page_size
        grown = 0
        for row in rows:
            row.left -= steps
            if gap:  # the tokens before are in the KV cache now
                grown += -(-(row.length + steps) // size) - -(-row.length // size)
                row.length += steps
        self._take(grown)

    # ---------------- pages
    def _free(self) -> int:
        return self._limits.num_pages - self._own - self._cache.num_pages + self._cache.evictable

    def _take(self, pages: int) -> None:
        """Pages for running requests, evicted from the cache where none is free."""
        self._own += pages
        over = self._own + self._cache.num_pages - self._limits.num_pages
        if over > 0:
            self._cache.evict(over)

    def _admit(self) -> bool:
        """Start waiting requests in order.  Returns whether one does not fit now."""
        size = self._limits.page_size
        while self._waiting and self._waiting[0][0] <= self._published:
            request = self._waiting[0][1]
            n = len(request.ids)
            match = self._cache.match(request.ids, request.salt)
            running = len(self._decoding) + len(self._prefilling)
            pages = -(-min(n + 1, request.limit) // size) - match.num_pages
            if running >= self._limits.slots or pages + running > self._free() - match.unreferenced:
                return True
            self._waiting.popleft()
            handle, _ = self._cache.acquire(match)
            self._take(-(-n // size) - match.num_pages)
            row = _Row(request, handle, match.num_pages, n, n - match.num_pages * size, request.limit - n)
            if self._log.cached[request.uid] < 0:
                self._log.cached[request.uid] = match.num_pages * size
            self._enter(row, request.ids)
            self._prefilling.append(row)
        return False

    def _enter(self, row: _Row, ids: I32) -> None:
        """Put the whole pages of a request into the tree."""
        size = self._limits.page_size
        whole = len(ids) // size
        if whole > row.shared:
            pages: I32 = np.arange(self._pages, self._pages + whole - row.shared, dtype=np.int32)
            self._pages += whole - row.shared
            row.handle, found, _ = self._cache.extend(row.handle, ids[row.shared * size : whole * size], pages)
            self._own -= len(found)
            row.shared += len(found)

    def _finish(self, row: _Row) -> None:
        """A request has all its tokens: its pages stay in the cache, with the answer."""
        self._log.finish[row.request.uid] = Finish.LENGTH
        self._leave(row, self._ids(row)[: row.length])

    def _retract(self, row: _Row) -> None:
        """No page is left for a row: it waits again, and what it has said is part of its prompt."""
        request = row.request
        ids = self._ids(row)[: request.limit - row.left]
        self._leave(row, ids[: row.length])
        request.ids = ids
        self._waiting.appendleft((-math.inf, request))

    def _leave(self, row: _Row, ids: I32) -> None:
        self._enter(row, ids)
        self._own -= -(-row.length // self._limits.page_size) - row.shared
        self._cache.release(row.handle, sound=True)

    def _ids(self, row: _Row) -> I32:
        """Prompt and answer; every request has its own answer, as in Replica."""
        answer = np.full(row.request.limit - len(row.request.ids), row.request.uid % FIRST_PROMPT_TOKEN, np.int32)
        return np.concatenate([row.request.ids, answer])
