"""The step machine: continuous batching, chunked prefill and overlap scheduling, decided by one pure state machine.

    output = machine.step(inbox, now)

`inbox` has what happened since the last call: new requests, cancellations, results of steps.  `output` has the plan of the next
step, if one is due, and the tokens to send out.  There is no clock, no socket and no thread in here, so the same code runs in
the scheduler process, in seeded simulation and under virtual time.

One call, in order:

    results    tokens are appended, and requests that have finished leave (`_take_result`, `_release`)
    way        rows of those who hold much are retracted for those who hold little and find no room (`_make_way`)
    decodes    every running request gets its next token (`_plan_decode`)
    prompts    within the rest of the token budget, in the fair order, admitted prompts get their next piece (`_cut_chunk`) and
               waiting requests join (`_prefill`)
    publish    the plan is fixed (`_publish`); `SchedulerActor._flush` sends it before earlier results are known
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np

from minisgl.actors.messages import Tokens
from minisgl.actors.scheduler.fair_queue import FairQueue
from minisgl.actors.scheduler.interface import Add, Counters, Event, Flush, Output, SchedulerLimits
from minisgl.actors.scheduler.plan_builder import NO_SLOTS, InFlight, PlanBuilder
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.actors.scheduler.step_cost import PrefillRate, StepCosts
from minisgl.actors.scheduler.waiting_queue import WaitQueue
from minisgl.arrays import I32, U8
from minisgl.cache.pages import PagePool
from minisgl.cache.radix import Match
from minisgl.plan import DRAW, NOT_A_NUMBER, StepResult
from minisgl.sampling_params import MAX_EOS_IDS, Finish

WINDOW = 16  # waiting requests that one step may try in vain
MAX_FOLLOWERS = 64  # waiting requests that one step may find to need pages that another request is computing
MAX_OVERTAKEN = 256  # a request that this many later ones have overtaken is not overtaken again
MAX_FIRST = 16  # waiting requests for which one step makes way


class StepMachine:
    """All decisions of the scheduler.  Deterministic: the same inboxes give the same outputs."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.cache = limits.cache(limits.page_size)
        self.pool = PagePool(limits.num_pages)
        max_pages = -(-limits.max_context // limits.page_size)
        self.table = SlotTable(limits.slots, max_pages, limits.num_pages, limits.page_size, self.cache.root)
        self.waiting = WaitQueue()
        self.fair = FairQueue()
        self.running: dict[int, tuple[int, Request]] = {}  # uid -> (slot, request)
        self.inflight: deque[InFlight] = deque()
        self.counters = Counters()
        self.costs = StepCosts()
        self._since = 0.0  # when the first step in flight began
        self.prefill_rate = PrefillRate()
        self._prefilling: list[int] = []  # slots with prompt left to prefill, in order of admission
        self._decoding: I32 = NO_SLOTS  # slots that decode, in order of admission
        self._last_decode: I32 | None = None  # decode rows of the previous plan, None before the first
        self._arrivals = self._seen = 0  # requests that have come, and those of them that had a chance to start
        self._newcomers: list[Request] = []  # those whose claim to be started first has not been judged
        self._deadlines: list[tuple[float, int]] = []  # (when, uid); entries of ended requests are skipped
        known_eos = [t for t in limits.eos_ids if t < limits.vocab_size]
        self._eos_ids = tuple(known_eos[:MAX_EOS_IDS])
        self._is_eos = np.zeros(limits.vocab_size, np.bool_)
        self._is_eos[known_eos] = True

    # ---------------- the one entry
    def step(self, inbox: Iterable[Event], now: float) -> Output:
        """Take in the events and decide the next plan, if one is due.  `now` in seconds, on any clock that never goes back."""
        out = Output()
        for event in inbox:
            if isinstance(event, StepResult):
                self._since = now
                self._take_result(event, out)
            elif isinstance(event, Add):
                self._arrive(event.request, now)
            elif isinstance(event, Flush):
                self.pool.release(self.cache.flush())
            else:
                self._end(event.uid, Finish.ABORT, out)
        while self._deadlines and self._deadlines[0][0] <= now:
            if self._end(heapq.heappop(self._deadlines)[1], Finish.TIMEOUT, out):
                self.counters.timeouts += 1
        # Overlap scheduling: the next plan is published while earlier ones still run, so the device never waits for the
        # scheduler.  Up to `max_steps_in_flight` plans are out at once (--lag); with 1 there is no overlap.
        #
        # A plan can be made before the result of the last step is known because it has no token values.  A sampled token stays
        # on the worker, by slot, and feeds the next step there.  A plan has only counts, and counts are certain: each step
        # adds one token to a request, and its limit is known in advance.  The exceptions are an EOS or stop token and a
        # cancellation.  A request that turns out to have ended computes at most max_steps_in_flight - 1 rows in vain; their
        # results are recognised by the epoch of the slot (`InFlight.read`).
        #
        # Workers run plans in order.  So the slot and the pages of an ended request may have a new owner at once, whose writes
        # come after the wasted ones; and a page may be shared as soon as the plan that fills it is published.
        #
        # Just in time: a request that arrives after a plan is published has to wait for the next one.  So a plan is held back
        # as long as the workers are sure to be busy, by the cost model, and newcomers wait for one step instead of two.
        if len(self.inflight) < self.limits.max_steps_in_flight:
            if self.inflight:
                out.again_in = self.costs.slack((f.cost for f in self.inflight), now, self._since)
            else:
                self._since = now
            if not out.again_in:
                self._plan(out)
            self.prefill_rate.observe(now, self.counters.prefill_tokens + self.counters.cached_tokens, len(self.waiting) > 0)
        return out

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing waits."""
        return not self.running and not len(self.waiting) and not self.inflight

    def _arrive(self, request: Request, now: float) -> None:
        self._arrivals += 1
        request.order, request.arrived = self._arrivals, now
        self._wait(request)
        self._newcomers.append(request)
        if request.options.timeout:
            heapq.heappush(self._deadlines, (now + request.options.timeout, request.uid))
        if len(self._deadlines) > 64 + 2 * (len(self.running) + len(self.waiting)):  # most belong to ended requests
            self._deadlines = [d for d in self._deadlines if d[1] in self.running or d[1] in self.waiting]
            heapq.heapify(self._deadlines)

    def _wait(self, request: Request, front: bool = False) -> None:
        """A request joins the queue; what the cache has of its prompt costs nothing."""
        self.fair.enter(request, len(request.ids) - self._match(request).num_pages * self.limits.page_size)
        self.waiting.add(request, front)

    def _request(self, slot: int) -> Request:
        return self.running[int(self.table.uid[slot])][1]

    # ---------------- results
    def _take_result(self, result: StepResult, out: Output) -> None:
        """Append the tokens of a step, and end the requests that have finished."""
        sent, table, counters = self.inflight.popleft(), self.table, self.counters
        rows = sent.read(result, table, self.running)
        counters.busy_us += result.busy_us
        counters.idle_us += result.idle_us
        counters.launch_us += result.launch_us
        counters.warmups += result.warmups
        counters.wasted_rows += rows.wasted
        if result.busy_us and self.limits.itl_target != 0:  # nothing else needs the cost model
            self.costs.observe(sent.cost, result.busy_us * 1e-6)
        if rows.logprobs is not None:
            out.logprobs.append(rows.logprobs)
        for slot, why in rows.failed.items():
            self._fail(slot, why, out)
        for slot, vector in rows.vectors:
            out.vectors.append((int(table.uid[slot]), vector))
            self._release(slot)
        slots, tokens = rows.slots, rows.tokens
        if not len(slots):
            return
        table.append(slots, tokens)
        finish = self._finish_reasons(slots, tokens)
        out.outputs.append(Tokens(table.uid[slots], np.ones(len(slots), np.uint8), tokens.astype(np.int32), finish))
        for slot in slots[finish != 0].tolist():
            self._release(slot)

    def _finish_reasons(self, slots: I32, tokens: I32) -> U8:
        """Why each request ends with its new token, Finish.NONE if it goes on."""
        table = self.table
        finish: U8 = np.where(table.length[slots] >= table.limit[slots], np.uint8(Finish.LENGTH), np.uint8(Finish.NONE))
        finish[self._is_eos[tokens] & ~table.ignore_eos[slots]] = Finish.STOP
        if table.stop_ids:
            for i, slot in enumerate(slots.tolist()):
                if int(tokens[i]) in table.stop_ids.get(slot, ()):
                    finish[i] = Finish.STOP
        return finish

    def _end(self, uid: int, finish: Finish, out: Output) -> bool:
        """End a request before its time.  False if it has ended already."""
        if uid in self.running:
            self._release(self.running[uid][0])
        elif self.waiting.remove(uid) is None:
            return False
        no_token = np.zeros(1, np.uint8)
        out.outputs.append(Tokens(np.array([uid], np.int64), no_token, NO_SLOTS, np.array([finish], np.uint8)))
        return True

    def _fail(self, slot: int, why: int, out: Output) -> None:
        """End a request that got no token.  One without numbers leaves no page in the cache that no sound request has read.

        Such a page may have spoilt a request that only read it, which therefore runs again and computes all pages itself.
        """
        request = self._request(slot)
        if why == NOT_A_NUMBER:
            self.cache.forget(self.table.handle[slot])
            self.table.planned[slot] = 0  # so that nothing is published
            if request.borrows and not request.retried:
                request.retried = True
                self._retract((slot, request))
                return
            self.counters.nan_requests += 1
        self._end(request.uid, Finish.NAN if why == NOT_A_NUMBER else Finish.GRAMMAR, out)

    def _release(self, slot: int) -> None:
        """A request leaves.  Pages whose tokens are known *and* planned go to the cache, the others become free."""
        table = self.table
        shared = int(table.n_shared[slot])
        full = min(int(table.planned[slot]), int(table.length[slot])) // self.limits.page_size
        if full > shared:
            shared = self._publish_prefix(slot, full, remap=False)
        self.pool.release(table.row(slot, shared, int(table.n_pages[slot])))
        drew = int(table.length[slot]) > len(self._request(slot).ids)
        self.cache.release(table.handle[slot], sound=full > 0 and drew)
        _, request = self.running.pop(int(table.uid[slot]))
        if slot in self._prefilling:
            self._prefilling.remove(slot)
        else:
            self._decoding = self._decoding[self._decoding != slot]
        self.fair.hold(request, -1)
        table.give(slot)

    def _publish_prefix(self, slot: int, full: int, remap: bool) -> int:
        """Hand the first `full` pages of a slot to the cache; returns how many of them the cache now owns.

        Where another request cached the same tokens first, its pages are canonical and ours are freed.  A row that goes on
        (`remap`) is moved to the canonical pages with the next plan, before the freed ones can be granted to anyone.
        """
        table, shared = self.table, int(self.table.n_shared[slot])
        mine = table.row(slot, shared, full)
        handle, canonical, duplicates = self.cache.extend(table.handle[slot], table.page_ids[mine].reshape(-1), mine)
        if not len(canonical):  # the cache takes nothing in
            return shared
        table.handle[slot] = handle
        table.n_shared[slot] = full
        if len(duplicates):
            self.pool.release(duplicates)
            self._request(slot).borrows = True
            if remap:
                moved = np.flatnonzero(canonical != mine)
                table.grant(slot, shared + moved, canonical[moved])
        return full

    # ---------------- the next plan
    def _plan(self, out: Output) -> None:
        """Decodes first, then prompts, all within one token budget."""
        if not self._prefilling and not len(self.waiting):
            self.fair.rest()
        first = self._make_way()
        builder = PlanBuilder(self.table, self._eos_ids)
        decode = self._plan_decode()
        context = int(self.table.planned[decode].sum())
        most = self.limits.slots
        if self.limits.itl_target is None:
            most = min(most, self.costs.rows_within_step(len(decode), context))
        self._prefill(first, self._prefill_budget(len(decode), context), most, builder, out)
        if builder.chunks or len(decode):
            self._publish(builder, decode, context, out)
        elif self._prefilling and not self.inflight and len(self.running) > 1:
            self._retract()  # half-prefilled prompts hold all the pages between them, and nothing in flight will free any
            self._plan(out)

    def _publish(self, builder: PlanBuilder, decode: I32, context: int, out: Output) -> None:
        """Fix the plan.  Its full pages become visible to other requests, and finished prompts start to decode."""
        repeats = self._last_decode is not None and np.array_equal(decode, self._last_decode)
        self._last_decode = decode
        out.plan, inflight = builder.build(self.counters.steps, decode, repeats, context)
        self.inflight.append(inflight)
        self.counters.steps += 1
        self.counters.prefill_tokens += len(out.plan.ids)
        if len(decode):
            self.costs.spend(len(out.plan.ids))
        self.counters.decode_tokens += len(decode)
        for slot, flags, _ in builder.chunks:
            full = int(self.table.planned[slot]) // self.limits.page_size
            if full > self.table.n_shared[slot]:
                self._publish_prefix(slot, full, remap=True)
            if flags & DRAW:
                self._prefilling.remove(slot)
                self._decoding = np.append(self._decoding, np.int32(slot))

    def _plan_decode(self) -> I32:
        """The slots that decode: all that still have tokens to come.  Rows at a page boundary get a page."""
        table, size = self.table, self.limits.page_size
        while True:
            slots = self._decoding
            slots = slots[table.planned[slots] + 1 < table.limit[slots]]  # planned + 1: tokens known or in flight
            if table.with_grammar and self.limits.grammar_waits_for_token:
                slots = slots[~table.has_grammar[slots] | (table.planned[slots] + 1 == table.length[slots])]
            crossing = slots[table.planned[slots] == table.n_pages[slots] * size]
            if self._make_room(len(crossing)):
                break
            self._retract()
        if len(crossing):
            table.grant_decode(crossing, self.pool.alloc(len(crossing)))
        table.planned[slots] += 1
        return slots

    def _make_room(self, n: int) -> bool:
        """Have `n` free pages, evicting from the cache if needed.  False if that is not enough."""
        missing = n - self.pool.free
        if missing > 0 and self.cache.evictable >= missing:
            self.pool.release(self.cache.evict(missing))
        return self.pool.free >= n

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

    def _prefill_budget(self, decode_rows: int, context: int) -> int:
        """Prompt tokens that this step may compute next to its decodes, so that these keep to the target."""
        budget, target = self.limits.step_tokens - decode_rows, self.limits.itl_target
        if target is None:
            return min(budget, self.costs.prefill_beside(decode_rows, context, self.limits.prompt_seconds))
        if target == 0 or not decode_rows:
            return budget
        return min(budget, max(self.limits.page_size, self.costs.prefill_within(target, decode_rows, context)))

    def _cut_chunk(self, slot: int, budget: int, builder: PlanBuilder) -> int:
        """Plan the next chunk of a slot's prompt, as large as budget and pages allow.  Returns its number of tokens.

        Chunked prefill: a prompt is not computed in one go.  Each step has a budget of `step_tokens`.  Decodes take theirs
        first and prompts share the rest, in the fair order, so a long prompt spreads over several steps, in the same steps as
        the decodes of other requests, and delays none of their tokens by more than a step of that budget.  A chunk also ends
        where pages run out, or the room of the result for log probabilities and vectors.

        A chunk attends to the KV of the chunks before it.  Pages are granted chunk by chunk, and full ones can be shared before
        the prompt has ended.  Only the last chunk draws a token.
        """
        table, size = self.table, self.limits.page_size
        request, start, n_pages = self._request(slot), int(table.planned[slot]), int(table.n_pages[slot])
        room = (n_pages + self.pool.free + self.cache.evictable) * size - start
        n = builder.longest_chunk(request, start, min(budget, len(request.ids) - start, room))
        if n <= 0:
            return 0
        missing = max(0, -(-(start + n) // size) - n_pages)
        self._make_room(missing)
        table.grant_prefill(slot, start, request.ids[start : start + n], self.pool.alloc(missing))
        table.planned[slot] = start + n
        builder.chunk(slot, request, start, n)
        self.fair.serve(n)
        return n

    # ---------------- admission
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

    def _prefill(self, first: list[Request], budget: int, most: int, builder: PlanBuilder, out: Output) -> None:
        """Compute prompts in the fair order, admitted and waiting ones alike, while budget, slots and pages last.

        `most`: requests that run at the same time before calls that have a row get no more of them.

        Continuous batching: there is no batch that starts and ends together.  A request joins here, in any step with room for
        it, and its rows run next to those of requests that are already decoding.  It leaves in `_release` as soon as the result
        of its last step is known, and its slot and pages are free for the next request in the same call.  Workers keep the
        state of a request by slot, so a plan names only the requests that join and the slots that decode.
        """
        skipped: set[int] = set()  # do not fit into this step
        followers: set[int] = set()  # wait for pages that another request is computing; they block no other
        found: dict[int, int] = {}  # uid -> cached pages; the cache does not change before the plan is published
        ready = [(self._request(slot).turn, slot) for slot in self._prefilling]
        for request in first:
            slot = self._try_admit(request, self._match(request), builder, out)
            if slot is None:
                self._newcomers.append(request)  # the decodes needed its pages
            else:
                ready.append((request.turn, slot))
        heapq.heapify(ready)
        blocked = False
        while budget > 0:
            candidate = None if blocked else self._next_candidate(skipped, followers, found)
            if candidate is None or (ready and ready[0][0] < candidate.turn and not candidate.resumed):
                if not ready:
                    break
                budget -= self._cut_chunk(heapq.heappop(ready)[1], budget, builder)
                continue
            slot, call = None, (candidate.options.client, candidate.options.call)
            if len(self.running) >= most and self.fair.call_rows[call]:
                skipped.add(candidate.uid)
                continue
            if candidate.missing_pages <= self.pool.free + self.cache.evictable:
                match = self._match(candidate)
                if self._is_being_computed(candidate, match):
                    followers.add(candidate.uid)
                    continue
                slot = self._try_admit(candidate, match, builder, out)
            if slot is not None:
                self._count_overtaken(candidate)
                heapq.heappush(ready, (candidate.turn, slot))
            elif candidate.overtaken_by < MAX_OVERTAKEN:
                skipped.add(candidate.uid)
            else:
                blocked = True  # overtaken often enough: the requests behind it wait until it fits
        self.fair.serve(max(0, budget))  # nobody could use the rest

    def _next_candidate(self, skipped: set[int], followers: set[int], found: dict[int, int]) -> Request | None:
        """The next request to try: the front of the queue, or the longest cached prefix among its equals near the front."""
        if not self.table.free_slots or len(skipped) >= WINDOW or len(followers) >= MAX_FOLLOWERS:
            return None
        window = [r for r in self.waiting.front(WINDOW + len(followers)) if r.uid not in skipped and r.uid not in followers]
        if not window:
            return None
        first = window[0]
        if self.limits.order == "arrival" or first.overtaken_by >= MAX_OVERTAKEN or first.resumed or len(window) == 1:
            return first
        mine = first.options.priority, first.options.client
        equals = [r for r in window if (r.options.priority, r.options.client) == mine]
        for request in equals:
            if request.uid not in found:
                found[request.uid] = self._match(request).num_pages
        return max(equals, key=lambda r: (found[r.uid], -r.finish, -r.order))

    def _match(self, request: Request) -> Match:
        """The cached prefix of a request; empty if it must compute its whole prompt."""
        ids = request.ids[:1] if request.computes_all else request.ids
        return self.cache.match(ids, request.options.cache_salt)

    def _try_admit(self, request: Request, match: Match, builder: PlanBuilder, out: Output) -> int | None:
        """Move a request from the queue to a slot, with its cached prefix.  Returns the slot, None if it does not fit now."""
        if not self._has_pages_for(request, match) or not builder.has_room_for(request):
            return None  # the cache was only read: a waiting request does not protect pages from eviction
        reason = self.cache.why_missed(request.ids, match)
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

    # ---------------- statistics and checks
    def stats(self) -> dict[str, int]:
        """The current state and the totals since the start.  Tokens unless the name says otherwise."""
        counters = {name: value for name, value in asdict(self.counters).items() if isinstance(value, int)}
        return {
            "running_requests": len(self.running),
            "waiting_requests": len(self.waiting),
            "waiting_tokens": self.waiting.tokens,
            "total_pages": self.limits.num_pages,
            "free_pages": self.pool.free,
            "cached_pages": self.cache.num_pages,
            "evicted_pages": self.cache.evicted_pages,
            **counters,
            **{f"missed_{why}_tokens": n for why, n in self.counters.misses.items()},
        }

    def check(self) -> None:
        """Conservation: every page is free, cached or owned by one request, and in one place.  Raises AssertionError."""
        owned = [self.table.row(s, int(self.table.n_shared[s]), int(self.table.n_pages[s])) for s, _ in self.running.values()]
        everything = np.concatenate([self.pool.snapshot(), self.cache.check(), *owned])
        assert len(everything) == self.limits.num_pages, f"{len(everything)} pages accounted for, of {self.limits.num_pages}"
        assert len(np.unique(everything)) == len(everything), "a page is in two places"
        slots = sorted([*self._prefilling, *self._decoding.tolist()])
        assert slots == sorted(s for s, _ in self.running.values()), "the running requests and the lists of slots disagree"
        assert self.table.free_slots + len(self.running) == self.limits.slots, "a slot is lost"
