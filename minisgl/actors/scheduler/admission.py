"""Admission: which waiting requests get a slot, and who gives one back for them.

The middle of three layers of one state machine.  Continuous batching asks it in each step for the next candidate
(`_next_candidate`) and lets it in (`_try_admit`); when slots or pages are short, rows of those who hold much are retracted for
those who hold little (`_make_way`).  The order is the fair one of fair_queue.py.  Runs in the scheduler process; pure.
"""

from __future__ import annotations

import numpy as np

from minisgl.actors.scheduler.interface import Output, SchedulerLimits
from minisgl.actors.scheduler.plan_builder import PlanBuilder
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.running_batch import RunningBatch
from minisgl.actors.scheduler.waiting_queue import WaitQueue
from minisgl.cache.kept import KeptPages
from minisgl.cache.radix import Match

WINDOW = 16  # waiting requests that one step may try in vain
MAX_FOLLOWERS = 64  # waiting requests that one step may find to need pages that another request is computing
MAX_OVERTAKEN = 256  # a request that this many later ones have overtaken is not overtaken again
MAX_FIRST = 16  # waiting requests for which one step makes way


class Admission(RunningBatch):
    """The waiting requests, and their way into the running batch and, retracted, back."""

    def __init__(self, limits: SchedulerLimits, kept: KeptPages | None = None) -> None:
        super().__init__(limits, kept)
        self.waiting = WaitQueue()
        # Requests that have come, those of them that had a chance to start, and those that wait for pages of another's prompt.
        self._arrivals = self._seen = self.followers = 0
        self._newcomers: list[Request] = []  # those whose claim to be started first has not been judged

    def _join_queue(self, request: Request, now: float) -> None:
        """A new request."""
        self._arrivals += 1
        request.order, request.arrived = self._arrivals, now
        self._wait(request)
        self._newcomers.append(request)

    def _wait(self, request: Request, front: bool = False) -> None:
        """A request joins the queue; what the cache has of its prompt costs nothing."""
        self.fair.enter(request, len(request.ids) - self._match(request).num_pages * self.limits.page_size)
        self.waiting.add(request, front)

    def _retract(self, victim: tuple[int, Request] | None = None, front: bool = True) -> None:
        """Preempt a running request, the one that is the largest burden unless it is given: send it back to the queue.

        It resumes with the same text and the same random draws: its tokens so far become its prompt.  `front`: before others.
        """
        slot, request = victim or max(self.running.values(), key=lambda r: self.fair.burden(r[1]))
        ids = request.ids if slot in self._prefilling else self.table.ids(slot)
        self._release(slot)
        request.ids, request.missing_pages, request.resumed = ids, 0, True
        self._wait(request, front)
        self.counters.retractions += 1

    # ---------------- making way
    def _make_way(self) -> list[Request]:
        """The newcomers that start before all others in this step: their client, or call, holds little where others hold much.

        For them rows of others are retracted until there is a slot, and pages for them.  A newcomer that finds room takes its
        turn; only if that has not come within a step, because of requests that stand before it and do not fit, it is judged.
        """
        first: list[Request] = []
        look, self._newcomers = self._newcomers, []
        verdicts: dict[tuple[int, int, int, int], bool] = {}  # by claim: whether to look again in the next step
        for request in look:
            if request.uid not in self.waiting:
                continue
            claim = self.fair.claim(request)
            if len(first) == MAX_FIRST or verdicts.get(claim):
                self._newcomers.append(request)
                continue
            if claim in verdicts:
                continue
            match = self._match(request)
            room = self._has_room_for(request, match, first)
            if (room and request.order > self._seen) or self._is_being_computed(request, match):
                verdicts[claim] = True
                self._newcomers.append(request)
                continue
            verdicts[claim], victim = False, self._victim(request)
            if victim is None:
                continue
            while not room and victim is not None:
                self._retract(victim, front=False)
                room, victim = self._has_room_for(request, self._match(request), first), self._victim(request)
            if room:
                self.fair.hold(request, 1)  # this changes the claims of those that come with it
                first.append(request)
        for request in first:
            self.fair.hold(request, -1)
        self._seen = self._arrivals
        return first

    def _victim(self, request: Request) -> tuple[int, Request] | None:
        """The running request that makes room for a waiting one; None if nobody has to."""
        if request.missing_pages * (len(self.fair.rows) + 1) > self.limits.num_pages:
            return None  # more than the share of a client
        rows = (r for r in self.running.values() if self.fair.yields(r[1], request))
        return max(rows, key=lambda r: self.fair.burden(r[1]), default=None)

    def _has_room_for(self, request: Request, match: Match, first: list[Request]) -> bool:
        """Whether a request finds a slot and pages next to those in `first`."""
        has_pages = self._has_pages_for(request, match, sum(r.missing_pages + 1 for r in first))
        return has_pages and self.table.free_slots > len(first)

    # ---------------- joining
    def _next_candidate(self, skipped: set[int], followers: set[int], found: dict[int, int]) -> Request | None:
        """The next request to try: the front of the queue, or the longest cached prefix among its equals near the front."""
        if not self.table.free_slots or len(skipped) >= WINDOW or len(followers) >= MAX_FOLLOWERS:
            return None
        window = [r for r in self.waiting.front(WINDOW + len(followers)) if r.uid not in skipped and r.uid not in followers]
        if not window:
            return None
        first = window[0]
        if self.limits.order == "arrival" or self._blocks(first) or first.resumed or len(window) == 1:
            return first
        mine = first.options.priority, first.options.client
        equals = [r for r in window if (r.options.priority, r.options.client) == mine]
        for request in equals:
            if request.uid not in found:
                found[request.uid] = self._match(request).num_pages
        return max(equals, key=lambda r: (found[r.uid], -r.finish, -r.order))

    def _blocks(self, request: Request) -> bool:
        """Overtaken often enough: the requests behind it wait until it fits."""
        return request.overtaken_by >= MAX_OVERTAKEN

    def _try_admit(self, request: Request, match: Match, builder: PlanBuilder, out: Output) -> int | None:
        """Move a request from the queue to a slot, with its cached prefix.  Returns the slot, None if it does not fit now."""
        if not self._has_pages_for(request, match) or not builder.has_room_for(request):
            return None  # the cache was only read: a waiting request does not protect pages from eviction
        reason = self.cache.why_missed(request.ids, match)
        if reason == "evicted" and not request.resumed:
            out.evicted.append((request.uid, self.cache.since_evicted(request.ids, match)))
        handle, cached = self.cache.acquire(match)
        self.waiting.remove(request.uid)
        self.fair.hold(request, 1)
        if request.finish < self.fair.time:  # it has waited for a slot or pages, not for its turn: that comes now
            self.fair.enter(request, len(request.ids) - len(cached) * self.limits.page_size)
        slot = self.table.take(request, handle, cached)
        self.running[request.uid] = (slot, request)
        request.borrows = len(cached) > 0
        self._prefilling.append(slot)
        builder.join(slot, request)
        if not request.resumed:
            counters, n, hits = self.counters, len(request.ids), len(cached) * self.limits.page_size
            counters.admitted += 1
            counters.prompt_tokens += n
            counters.cached_tokens += hits
            counters.misses[reason] = counters.misses.get(reason, 0) + n - hits
            out.started.append((request.uid, hits))
        return slot

    def _has_pages_for(self, request: Request, match: Match, others: int = 0) -> bool:
        """Whether the rest of a prompt finds pages, next to `others` and those that running requests will need for theirs."""
        table, size = self.table, self.limits.page_size
        request.missing_pages = -(-min(len(request.ids) + 1, request.limit) // size) - match.num_pages
        promised = sum(-(-int(table.length[s]) // size) - int(table.n_pages[s]) for s in self._prefilling)
        others += len(self.running)  # a page for the next boundary of each running row
        return request.missing_pages + promised + others <= self.pool.free + self.cache.evictable - match.unreferenced

    def _count_overtaken(self, started: Request) -> None:
        """Note in the requests at the front of the queue that one behind them has started first."""
        for other in self.waiting.front(WINDOW):
            if other.turn < started.turn or (other.resumed and not started.resumed):
                other.overtaken_by += 1

    def _is_being_computed(self, request: Request, match: Match) -> bool:
        """Whether a request should wait a step, because a running prefill is about to publish its next page.

        Such a prefill has its place in the tree where our match ends, and its next page has our next tokens.
        """
        table, at, end = self.table, match.num_pages * self.limits.page_size, (match.num_pages + 1) * self.limits.page_size
        if not self.limits.wait_for_shared_prefix or request.computes_all or end >= len(request.ids):
            return False  # the last token is computed in any case
        here = [s for s in self._prefilling if table.n_shared[s] == match.num_pages and table.handle[s] is match.node]
        return any(np.array_equal(self._request(s).ids[at:end], request.ids[at:end]) for s in here)
