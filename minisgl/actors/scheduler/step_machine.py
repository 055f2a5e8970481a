"""The step machine: continuous batching, chunked prefill and overlap scheduling, decided by one pure state machine.

    output = machine.step(inbox, now)

`inbox` has what happened since the last call: new requests, cancellations, results of steps.  `output` has the plan of the next
step, if one is due, and the tokens to send out.  There is no clock, no socket and no thread in here, so the same code runs in
the scheduler process, in seeded simulation and under virtual time.  One state in three layers: running_batch.py takes and gives
back slots and pages, admission.py says who gets them, and this file what is computed.

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
from minisgl.actors.scheduler.admission import Admission
from minisgl.actors.scheduler.interface import Add, Event, Flush, Output, SchedulerLimits
from minisgl.actors.scheduler.plan_builder import NO_SLOTS, InFlight, PlanBuilder
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_cost import PrefillRate, StepCosts
from minisgl.arrays import I32, U8
from minisgl.cache.kept import KeptPages
from minisgl.plan import DRAW, NOT_A_NUMBER, StepResult
from minisgl.sampling_params import MAX_EOS_IDS, Finish


class StepMachine(Admission):
    """All decisions of the scheduler.  Deterministic: the same inboxes give the same outputs."""

    def __init__(self, limits: SchedulerLimits, kept: KeptPages | None = None) -> None:
        super().__init__(limits, kept)
        self.inflight: deque[InFlight] = deque()
        self.costs = StepCosts()
        self._since = 0.0  # when the first step in flight began
        self.prefill_rate = PrefillRate()
        self._last_decode: I32 | None = None  # decode rows of the previous plan, None before the first
        known_eos = [t for t in limits.eos_ids if t < limits.vocab_size]
        self._eos_ids = tuple(known_eos[:MAX_EOS_IDS])
        self._is_eos = np.zeros(limits.vocab_size, np.bool_)
        self._is_eos[known_eos] = True

    # ---------------- the one entry
    def step(self, inbox: Iterable[Event], now: float) -> Output:
        """Take in the events and decide the next plan, if one is due.  `now` in seconds, on any clock that never goes back."""
        out, self.cache.now = Output(), now
        for event in inbox:
            if isinstance(event, StepResult):
                self._since = now
                self._take_result(event, out)
            elif isinstance(event, Add):
                self._join_queue(event.request, now)
            elif isinstance(event, Flush):
                self.pool.release(self.cache.flush())
            else:
                self._end(event.uid, Finish.ABORT, out)
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

    def _end(self, uid: int, finish: Finish, out: Output) -> None:
        """End a request before its time, unless it has ended already."""
        if uid in self.running:
            self._release(self.running[uid][0])
        elif self.waiting.remove(uid) is None:
            return
        no_token = np.zeros(1, np.uint8)
        out.outputs.append(Tokens(np.array([uid], np.int64), no_token, NO_SLOTS, np.array([finish], np.uint8)))

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

    def _prefill_budget(self, decode_rows: int, context: int) -> int:
        """Prompt tokens that this step may compute next to its decodes, so that these keep to the target."""
        budget, target = self.limits.step_tokens - decode_rows, self.limits.itl_target
        if target is None:
            return min(budget, self.costs.prefill_beside(decode_rows, context, self.limits.prompt_seconds))
        if target == 0 or not decode_rows:
            return budget
        return min(budget, max(self.limits.page_size, self.costs.prefill_within(target, decode_rows, context)))

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
            elif self._blocks(candidate):
                blocked = True
            else:
                skipped.add(candidate.uid)
        self.followers = len(followers)
        self.fair.serve(max(0, budget))  # nobody could use the rest

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

    def _publish(self, builder: PlanBuilder, decode: I32, context: int, out: Output) -> None:
        """Fix the plan.  Its full pages become visible to other requests, and finished prompts start to decode."""
        repeats = self._last_decode is not None and np.array_equal(decode, self._last_decode)
        self._last_decode = decode
        out.plan, inflight = builder.build(self.counters.steps, decode, repeats, context)
        self.inflight.append(inflight)
        self.counters.steps += 1
        self.kept.planned = self.counters.steps
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

    def stats(self) -> dict[str, int]:
        """The current state and the totals since the start.  Tokens unless the name says otherwise."""
        waiting = len(self.waiting)
        requests = {"running_requests": len(self.running), "waiting_requests": waiting, "waiting_tokens": self.waiting.tokens}
        requests |= {"following_requests": min(self.followers, waiting)}
        requests |= {"prefill_tokens_per_s": round(self.prefill_rate.per_second)}
        pages = {"total_pages": self.limits.num_pages, "free_pages": self.pool.free, "cached_pages": self.cache.num_pages}
        pages |= {"evictable_pages": self.cache.evictable, "evicted_pages": self.cache.evicted_pages}
        counters = {name: value for name, value in asdict(self.counters).items() if isinstance(value, int)}
        return requests | pages | counters | {f"tree_missed_{why}_tokens": n for why, n in self.counters.misses.items()}
