"""The step machine: everything the scheduler decides, with no clock, no socket and no thread.

    output = machine.step(inbox, now)

`inbox` holds what has happened since the last call (new requests, cancellations, results of steps); `output` the plan of the
next step, if one is due, and what others must be told.  The same code runs in the scheduler process, in seeded simulation and
under virtual time.

A step of the machine, in order: cancellations and new requests; results of former steps (append tokens, find the finished,
free what they held); then, if fewer than `lag` plans are in flight, the next plan: every decode first, then prefill chunks of
requests already admitted, then new admissions, all within one token budget.

Why a plan can be published before the former result is known (lag 2): it needs no token *values*, those live on the workers;
it needs counts, and counts are certain until an EOS turns up.  A request that turns out to have ended computes at most lag -
1 rows in vain, and their results are recognised by the slot's epoch.  Workers run plans in order, so pages and slots may be
given to a new owner at once: its writes come later.  For the same reason a page is cacheable as soon as the plan that writes
it is *published*.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from minisgl.actors.scheduler.logprobs import ExpectedLogprobs, LogprobOutputs
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.sampling_extras import NOTHING, Extra, GrammarRow, enter_grammars, extra_bytes, extra_of
from minisgl.actors.scheduler.slot_table import SlotTable
from minisgl.actors.scheduler.step_cost import StepCosts, features
from minisgl.actors.scheduler.waiting_queue import WaitQueue
from minisgl.arrays import F32, F64, I32, I64, U8
from minisgl.cache.no_cache import NoCache
from minisgl.cache.pages import PagePool
from minisgl.cache.radix import Match, RadixCache
from minisgl.plan import DRAW, EXTRA, GRANT, JOIN, POOL, POOLED_ROWS, PREFILL, SCORE, SCORED_TOKENS, SUM, StepPlan, StepResult
from minisgl.sampling_params import MAX_EOS_IDS, Finish

WINDOW = 16  # waiting requests that are looked at in one step
MAX_FOLLOWERS = 64  # waiting requests that may be found, in one step, to wait for another's pages
EXTRA_BYTES = 1 << 20  # of a plan's biases and histories; a single request may have more
MAX_OVERTAKEN = 256  # a request that so many later ones have overtaken is not overtaken again
_NONE = np.zeros(0, np.int32)


# ---------------- what goes in
@dataclass(frozen=True, slots=True)
class Add:
    """A new request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Drop:
    """Nobody wants the answer of request `uid` any more.  Unknown uids are ignored."""

    uid: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Empty the prefix cache, but for what running requests use."""


Event = Add | Drop | Flush | StepResult


# ---------------- what comes out
@dataclass(slots=True)
class StepOutputs:
    """Rows for the detokenizer: row i appends counts[i] (0 or 1) tokens to request uids[i] and may finish it."""

    uids: I64
    counts: U8
    tokens: I32
    finish: U8


@dataclass(slots=True)
class Output:
    """What one call of `step` decided.  `started`: (uid, cached prompt tokens) of the requests admitted for the first time;
    `vectors`: (uid, vector) of the requests that wanted one, which end with it and are in no news."""

    plan: StepPlan | None = None
    news: list[StepOutputs] = field(default_factory=list)
    scores: list[LogprobOutputs] = field(default_factory=list)
    started: list[tuple[int, int]] = field(default_factory=list)
    vectors: list[tuple[int, F32]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The sizes that bound the machine.  `step_tokens` must exceed `slots`, or decodes could starve prefills.

    `itl_target` in seconds, 0 for none: prefill chunks shrink so that a step with decodes is expected to take no longer.
    `order`: "prefix" starts the requests with the longest cached prefix first (among the first WINDOW of equal priority),
    "arrival" does not look.  `wait_for_shared_prefix`: a prompt whose beginning another request is just
    computing waits for its pages.
    `grammar_waits_for_token`: a row with a grammar decodes only when none of its tokens is in flight, for workers that learn
    tokens after they have launched the next step.
    """

    slots: int
    num_pages: int
    page_size: int
    max_context: int
    step_tokens: int
    max_steps_in_flight: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    cache: str = "radix"
    itl_target: float = 0.0
    order: str = "prefix"
    wait_for_shared_prefix: bool = True
    grammar_waits_for_token: bool = False


@dataclass(slots=True)
class Counters:
    """What has happened since the start.  Tokens are counted when they are planned."""

    steps: int = 0
    admitted: int = 0
    retractions: int = 0
    timeouts: int = 0
    wasted_rows: int = 0  # computed for requests that had already ended
    prompt_tokens: int = 0  # of requests when they were first admitted
    cached_tokens: int = 0  # of these, found in the cache
    prefill_tokens: int = 0  # computed
    decode_tokens: int = 0
    busy_us: int = 0  # as measured by the device, of all steps together
    idle_us: int = 0
    launch_us: int = 0
    warmups: int = 0  # graphs captured and kernels compiled while a step waited for them: none in steady state
    misses: dict[str, int] = field(default_factory=dict)  # prompt tokens not found at first admission, by reason


@dataclass(frozen=True, slots=True)
class _InFlight:
    """The rows of a published plan.  Results are matched to these, never to whoever owns the slot by then."""

    step: int
    slots: I32
    epochs: I64
    cost: F64
    scored: ExpectedLogprobs | None  # what log probabilities come with the result
    pooled: I32  # which rows have the result's vectors


class _PlanParts:
    """A plan while it is being put together."""

    def __init__(self) -> None:
        self.new_slots: list[tuple[int, int, float, int, float, float, int]] = []
        self.page_grants: list[npt.NDArray[np.void]] = []
        self.prefill: list[tuple[int, int, int]] = []
        self.ids: list[I32] = []
        self.sampling: list[int] = []  # slots of the prefill rows that sample
        self.extras: list[tuple[int, Extra]] = []  # (slot, extra)
        self.targets: list[tuple[int, int, I32]] = []  # (slot, position of the first, tokens of a prompt to be scored)
        self.grammar_rows: list[GrammarRow] = []
        self.score_room = SCORED_TOKENS
        self.pooled: list[int] = []  # which of the prefill rows that sample have a vector
        self.extra_room = EXTRA_BYTES

    def grant(self, slots: I32 | int, index: I32, pages: I32) -> None:
        rows = np.zeros(len(pages), GRANT)
        rows["slot"], rows["index"], rows["page"] = slots, index, pages
        self.page_grants.append(rows)


class StepMachine:
    """The scheduler's mind.  Deterministic: the same inboxes give the same outputs."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.cache: RadixCache | NoCache = (RadixCache if limits.cache == "radix" else NoCache)(limits.page_size)
        self.pool = PagePool(limits.num_pages)
        max_pages = -(-limits.max_context // limits.page_size)
        self.table = SlotTable(limits.slots, max_pages, limits.num_pages, limits.page_size, self.cache.root)
        self.waiting = WaitQueue()
        self.running: dict[int, tuple[int, Request]] = {}  # uid -> (slot, request)
        self.inflight: deque[_InFlight] = deque()
        self.counters = Counters()
        self.costs = StepCosts()
        self.prefill_rate = 0.0  # prompt tokens per second over the last steps; 0 = not known yet
        self._rate_mark: tuple[float, int] | None = None  # (when, prefill tokens then)
        self._prefilling: list[int] = []  # slots with prompt left to prefill, in order of admission
        self._decoding: I32 = _NONE  # slots that decode, in order of admission
        self._last_decode: I32 | None = None  # decode rows of the previous plan, None before the first
        self._arrivals = 0
        self._deadlines: list[tuple[float, int]] = []  # (when, uid); entries of ended requests are skipped
        self._remaps: list[npt.NDArray[np.void]] = []  # grants that move rows to canonical pages, sent with the next plan
        self._eos = np.zeros(limits.vocab_size, np.bool_)
        self._eos_ids = tuple(t for t in limits.eos_ids if t < limits.vocab_size)[:MAX_EOS_IDS]
        self._eos[[t for t in limits.eos_ids if t < limits.vocab_size]] = True
        self._stop_ids: dict[int, frozenset[int]] = {}  # slot -> stop_token_ids, for the few requests that have any
        self._scoring = 0  # running requests that want log probabilities
        self._with_grammar = 0  # running requests with a grammar

    # ---------------- the one entry
    def step(self, inbox: Iterable[Event], now: float) -> Output:
        """Take in what has happened, decide the next plan if one is due."""
        out = Output()
        for event in inbox:
            if isinstance(event, StepResult):
                self._take_result(event, out)
            elif isinstance(event, Add):
                self._arrive(event.request, now)
            elif isinstance(event, Flush):
                self.pool.release(self.cache.flush())
            else:
                self._end(event.uid, Finish.ABORT, out)
        while self._deadlines and self._deadlines[0][0] <= now:
            self.counters.timeouts += self._end(heapq.heappop(self._deadlines)[1], Finish.TIMEOUT, out)
        if len(self.inflight) < self.limits.max_steps_in_flight:
            self._plan(out)
            self._measure_rate(now)
        return out

    def _measure_rate(self, now: float) -> None:
        """Prompt tokens per second, over windows of half a second in which something was waiting."""
        done = self.counters.prefill_tokens + self.counters.cached_tokens
        if self._rate_mark is None or not len(self.waiting):
            self._rate_mark = (now, done)
        elif now - self._rate_mark[0] >= 0.5:
            rate = (done - self._rate_mark[1]) / (now - self._rate_mark[0])
            self.prefill_rate = rate if not self.prefill_rate else 0.5 * (self.prefill_rate + rate)
            self._rate_mark = (now, done)

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing waits."""
        return not self.running and not len(self.waiting) and not self.inflight

    def fits(self, n_tokens: int) -> bool:
        """Whether a request of this many tokens could ever run."""
        return n_tokens <= self.limits.num_pages * self.limits.page_size

    def _arrive(self, request: Request, now: float) -> None:
        self._arrivals += 1
        request.order, request.arrived = self._arrivals, now
        if request.options.timeout:
            heapq.heappush(self._deadlines, (now + request.options.timeout, request.uid))
            self._forget_old_deadlines()
        self.waiting.add(request)

    def _forget_old_deadlines(self) -> None:
        """Entries of ended requests go when they are most of the heap, so it never outgrows what is open."""
        if len(self._deadlines) > 64 + 2 * (len(self.running) + len(self.waiting)):
            self._deadlines = [d for d in self._deadlines if d[1] in self.running or d[1] in self.waiting]
            heapq.heapify(self._deadlines)

    # ---------------- results
    def _take_result(self, result: StepResult, out: Output) -> None:
        sent = self.inflight.popleft()
        if sent.step != result.step or len(sent.slots) != len(result.tokens):
            raise RuntimeError(
                f"result {result.step} ({len(result.tokens)} rows) for plan {sent.step} ({len(sent.slots)} rows)"
            )
        table = self.table
        self.counters.busy_us += result.busy_us
        self.counters.idle_us += result.idle_us
        self.counters.launch_us += result.launch_us
        self.counters.warmups += result.warmups
        if result.busy_us and self.limits.itl_target:  # who else would ask?
            self.costs.observe(sent.cost, result.busy_us * 1e-6)
        live = table.epoch[sent.slots] == sent.epochs
        slots, tokens = sent.slots[live], result.tokens[live]
        self.counters.wasted_rows += len(sent.slots) - len(slots)
        if sent.scored is not None and (told := sent.scored.news(result, table, self.running)):
            out.scores.append(told)
        if self._with_grammar and (failed := tokens < 0).any():
            for slot in slots[failed].tolist():
                self._end(int(table.uid[slot]), Finish.GRAMMAR, out)
            slots, tokens = slots[~failed], tokens[~failed]
        if not len(slots):
            return
        if len(sent.pooled):
            slots, tokens = self._take_vectors(sent, result, live, out)
        table.append(slots, tokens)
        finish = np.where(table.length[slots] >= table.limit[slots], np.uint8(Finish.LENGTH), np.uint8(Finish.NONE))
        finish[self._eos[tokens] & ~table.ignore_eos[slots]] = Finish.STOP
        if self._stop_ids:
            for i, slot in enumerate(slots.tolist()):
                if int(tokens[i]) in self._stop_ids.get(slot, ()):
                    finish[i] = Finish.STOP
        out.news.append(StepOutputs(table.uid[slots], np.ones(len(slots), np.uint8), tokens.astype(np.int32), finish))
        for slot in slots[finish != 0].tolist():
            self._release(slot)

    def _take_vectors(self, sent: _InFlight, result: StepResult, live: npt.NDArray[np.bool_], out: Output) -> tuple[I32, I32]:
        """End the requests that have their vectors; returns (slots, tokens) of the others."""
        if result.vectors is None or len(result.vectors) != len(sent.pooled):
            raise RuntimeError(f"result {result.step} lacks vectors that its plan asked for")
        for row, vector in zip(sent.pooled.tolist(), result.vectors, strict=True):
            if live[row]:
                slot = int(sent.slots[row])
                out.vectors.append((int(self.table.uid[slot]), vector))
                self._release(slot)
        others = live.copy()
        others[sent.pooled] = False
        return sent.slots[others], result.tokens[others]

    def _end(self, uid: int, finish: Finish, out: Output) -> bool:
        """End a request from outside.  False if it has ended already."""
        if uid in self.running:
            self._release(self.running[uid][0])
        elif self.waiting.remove(uid) is None:
            return False
        none = np.zeros(1, np.uint8)
        out.news.append(StepOutputs(np.array([uid], np.int64), none, _NONE, np.array([finish], np.uint8)))
        return True

    def _release(self, slot: int) -> None:
        """End of a stay: what is known *and* planned goes to the cache, the rest of the pages becomes free."""
        table, size = self.table, self.limits.page_size
        uid = int(table.uid[slot])
        n, shared = int(table.n_pages[slot]), int(table.n_shared[slot])
        full = min(int(table.planned[slot]), int(table.length[slot])) // size
        if full > shared:
            shared = self._publish_prefix(slot, full, remap=False)
        self.pool.release(table.row(slot, shared, n))
        self.cache.release(table.handle[slot])
        if slot in self._prefilling:
            self._prefilling.remove(slot)
        else:
            self._decoding = self._decoding[self._decoding != slot]
        self._stop_ids.pop(slot, None)
        self._scoring -= int(table.logprobs[slot] >= 0)
        self._with_grammar -= int(table.has_grammar[slot])
        table.logprobs[slot] = -1
        self._remaps = [rows for rows in self._remaps if rows["slot"][0] != slot]
        del self.running[uid]
        table.give(slot)

    def _publish_prefix(self, slot: int, full: int, remap: bool) -> int:
        """Hand the first `full` pages of a slot to the cache; returns how many of them the cache now owns.

        Where somebody cached the same tokens first, their pages are canonical and ours are freed; a row that goes on
        (`remap`) is moved to the canonical pages with the next plan, before anybody can be granted the freed ones.
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
            if remap:
                moved = np.flatnonzero(canonical != mine)
                rows = np.zeros(len(moved), GRANT)
                rows["slot"], rows["index"], rows["page"] = slot, shared + moved, canonical[moved]
                self._remaps.append(rows)
        table.pages[slot, shared:full] = canonical
        return full

    # ---------------- the next plan
    def _plan(self, out: Output) -> None:
        parts = _PlanParts()
        decode = self._plan_decode(parts)
        parts.page_grants += self._remaps  # only now: rows retracted by the decodes have withdrawn theirs
        self._remaps = []
        context = int(self.table.planned[decode].sum())
        budget = self._prefill_budget(len(decode), context)
        for slot in list(self._prefilling):
            if budget <= 0:
                break
            budget -= self._plan_chunk(slot, budget, parts)
        self._admit(budget, parts, out)
        if not parts.prefill and not len(decode):
            self._remaps = parts.page_grants
            if self._prefilling and not self.inflight and len(self.running) > 1:
                self._retract()  # half-prefilled prompts hold all the pages between them, and nothing in flight will free any
                self._plan(out)
            return
        same = self._last_decode is not None and np.array_equal(decode, self._last_decode)
        self._last_decode = decode
        out.plan = StepPlan(
            self.counters.steps,
            new_slots=np.array(parts.new_slots, JOIN),
            page_grants=np.concatenate(parts.page_grants) if parts.page_grants else np.zeros(0, GRANT),
            prefill=np.array(parts.prefill, PREFILL),
            decode=None if same else decode,
            ids=np.concatenate(parts.ids) if parts.ids else _NONE,
        )
        if parts.extras:
            out.plan.extras = np.array([(slot, *extra.row) for slot, extra in parts.extras], EXTRA)
            out.plan.bias = np.concatenate([extra.bias for _, extra in parts.extras])
            out.plan.history = np.concatenate([extra.history for _, extra in parts.extras])
        if parts.grammar_rows:
            enter_grammars(out.plan, parts.grammar_rows)
        if parts.targets:
            out.plan.targets = np.concatenate([tokens for _, _, tokens in parts.targets])
        rows = np.concatenate([np.array(parts.sampling, np.int32), decode])
        prefilled = len(out.plan.ids)
        cost = features(prefilled, len(decode), context)
        scored = ExpectedLogprobs.of(rows, parts.targets, self.table) if self._scoring else None
        pooled = np.array(parts.pooled, np.int32) if parts.pooled else _NONE
        self.inflight.append(_InFlight(self.counters.steps, rows, self.table.epoch[rows], cost, scored, pooled))
        self.counters.steps += 1
        self.counters.prefill_tokens += prefilled
        self.counters.decode_tokens += len(decode)
        self._finish_prefills(parts)

    def _prefill_budget(self, decode_rows: int, context: int) -> int:
        """Prompt tokens that this step may take beside its decodes; at least a page, so that prompts always get on."""
        budget = self.limits.step_tokens - decode_rows
        target = self.limits.itl_target
        if target and decode_rows and self.costs.known:
            budget = min(budget, max(self.limits.page_size, self.costs.prefill_within(target, decode_rows, context)))
        return budget

    def _plan_decode(self, parts: _PlanParts) -> I32:
        """Every running row that still has tokens to ask for gets one; rows at a page boundary get a page."""
        table, size = self.table, self.limits.page_size
        while True:
            slots = self._decoding
            slots = slots[table.planned[slots] + 1 < table.limit[slots]]  # tokens known or asked = planned + 1
            if self._with_grammar and self.limits.grammar_waits_for_token:
                slots = slots[~table.has_grammar[slots] | (table.planned[slots] + 1 == table.length[slots])]
            crossing = slots[table.planned[slots] == table.n_pages[slots] * size]
            if self._make_room(len(crossing)):
                break
            self._retract()
        if len(crossing):
            pages = self.pool.alloc(len(crossing))
            parts.grant(crossing, table.n_pages[crossing], pages)
            table.grant_decode(crossing, pages)
        table.planned[slots] += 1
        return slots

    def _make_room(self, n: int) -> bool:
        """Have `n` free pages, evicting if needed."""
        if (missing := n - self.pool.free) > 0 and self.cache.evictable >= missing:
            self.pool.release(self.cache.evict(missing))
        return self.pool.free >= n

    def _retract(self) -> None:
        """Send the least important, youngest running request back to the queue.

        It resumes with the same text and the same random draws: its tokens so far become its prompt.
        """
        slot, request = max(self.running.values(), key=lambda r: (-r[1].options.priority, r[1].order))
        ids = request.ids if slot in self._prefilling else self.table.ids(slot)
        self._release(slot)
        request.ids, request.missing_pages, request.resumed = ids, 0, True
        self.waiting.add(request, front=True)
        self.counters.retractions += 1

    def _plan_chunk(self, slot: int, budget: int, parts: _PlanParts) -> int:
        """The next prefill chunk of a slot, as large as budget and pages allow.  Returns its tokens."""
        table, size = self.table, self.limits.page_size
        start, target = int(table.planned[slot]), int(table.target[slot])
        held = int(table.n_pages[slot]) * size
        request = self.running[int(table.uid[slot])][1]
        most = min(budget, target - start)
        if request.scores_prompt:
            most = min(most, parts.score_room)
        room = held + (self.pool.free + self.cache.evictable) * size - start
        n = min(most, room)
        pooling = request.options.pooling
        if pooling and start + n == target and len(parts.pooled) == POOLED_ROWS:
            n -= 1  # the result has no room for another vector
        if n <= 0:
            return 0
        new = max(0, -(-(start + n - held) // size))
        self._make_room(new)
        pages = self.pool.alloc(new)
        ids = request.ids[start : start + n]
        index = int(table.n_pages[slot])
        parts.grant(slot, np.arange(index, index + new, dtype=np.int32), pages)
        table.grant_prefill(slot, start, ids, pages)
        table.planned[slot] = start + n
        last = start + n == target
        flags = DRAW if last else 0
        if request.scores_prompt:
            flags |= SCORE
            parts.targets.append((slot, start + 1, request.ids[start + 1 : start + n + 1]))
            parts.score_room -= n
        if pooling:
            flags |= (SUM if pooling == "mean" else 0) | (POOL if last else 0)
            if last:
                parts.pooled.append(len(parts.sampling))
        parts.prefill.append((slot, flags, n))
        parts.ids.append(ids)
        if last:
            parts.sampling.append(slot)
        return n

    def _finish_prefills(self, parts: _PlanParts) -> None:
        """After the plan is fixed: every chunk's pages become visible to others; finished prompts start to decode."""
        for slot, flags, _ in parts.prefill:
            full = int(self.table.planned[slot]) // self.limits.page_size
            if full > self.table.n_shared[slot]:
                self._publish_prefix(slot, full, remap=True)
            if flags & DRAW:
                self._prefilling.remove(slot)
                self._decoding = np.append(self._decoding, np.int32(slot))

    # ---------------- admission
    def _admit(self, budget: int, parts: _PlanParts, out: Output) -> None:
        """Start waiting requests while there are slots, budget and pages, looking past a few that do not fit."""
        if budget <= 0 or not self.table.free_slots or not len(self.waiting):
            return
        left: set[int] = set()  # looked at in this step, and does not fit
        followers: set[int] = set()  # looked at, and waits for pages that are being computed: stands in nobody's way
        found: dict[int, int] = {}  # pages that a request would find in the cache; nothing is entered before the plan is made
        while budget > 0 and self.table.free_slots and len(left) < WINDOW and len(followers) < MAX_FOLLOWERS:
            request = self._next_candidate(left, followers, found)
            if request is None:
                return
            slot = None
            if request.missing_pages <= self.pool.free + self.cache.evictable:
                match = self._match(request)
                if self.limits.wait_for_shared_prefix and not request.computes_all and self._is_being_computed(request, match):
                    followers.add(request.uid)
                    continue
                slot = self._try_admit(request, match, parts, out)
            if slot is None:
                left.add(request.uid)
                if request.overtaken_by >= MAX_OVERTAKEN:
                    return  # it has been overtaken often enough: those behind it wait until it fits
                continue
            for other in self.waiting.front(WINDOW):
                other.overtaken_by += other.options.priority > request.options.priority or (
                    other.options.priority == request.options.priority and other.order < request.order
                )
            budget -= self._plan_chunk(slot, budget, parts)

    def _next_candidate(self, left: set[int], followers: set[int], found: dict[int, int]) -> Request | None:
        """Whom to try next: the front of the queue, or by longest cached prefix among those of equal standing at the front."""
        window = [r for r in self.waiting.front(WINDOW + len(followers)) if r.uid not in left and r.uid not in followers]
        if not window:
            return None
        first = window[0]
        if self.limits.order == "arrival" or first.overtaken_by >= MAX_OVERTAKEN or first.resumed or len(window) == 1:
            return first
        equals = [r for r in window if r.options.priority == first.options.priority]
        for request in equals:
            if request.uid not in found:
                found[request.uid] = self._match(request).num_pages
        return max(equals, key=lambda r: (found[r.uid], -r.order))

    def _match(self, request: Request) -> Match:
        """What the cache has of a request; nothing of a prompt that must be computed."""
        ids = request.ids[:1] if request.computes_all else request.ids
        return self.cache.match(ids, request.options.cache_salt)

    def _try_admit(self, request: Request, match: Match, parts: _PlanParts, out: Output) -> int | None:
        """Give the request a slot and its cached prefix, if the rest of its prompt finds pages beside those promised."""
        table, size = self.table, self.limits.page_size
        request.missing_pages = -(-(len(request.ids) + 1) // size) - match.num_pages
        promised = sum(-(-int(table.target[s]) // size) - int(table.n_pages[s]) for s in self._prefilling)
        watermark = len(self.running)  # a page for the next boundary of each running row
        if request.missing_pages + promised + watermark > self.pool.free + self.cache.evictable - match.unreferenced:
            return None  # the cache was only looked at: a request that waits keeps nothing from being evicted
        if (weight := extra_bytes(request)) > parts.extra_room < EXTRA_BYTES:
            return None  # the next plan has room
        parts.extra_room -= weight
        why = self.cache.why_missed(request.ids, match)
        handle, pages = self.cache.acquire(match)
        self.waiting.remove(request.uid)
        slot, cached = table.take(), len(pages) * size
        table.uid[slot] = request.uid
        table.length[slot] = table.target[slot] = len(request.ids)
        table.limit[slot] = request.limit
        table.planned[slot] = cached
        table.n_pages[slot] = table.n_shared[slot] = len(pages)
        table.pages[slot, : len(pages)] = pages
        table.tail[slot] = request.ids[-1]
        table.ignore_eos[slot] = request.params.ignore_eos
        table.handle[slot] = handle
        if request.params.stop_token_ids:
            self._stop_ids[slot] = frozenset(request.params.stop_token_ids)
        self.running[request.uid] = (slot, request)
        self._prefilling.append(slot)
        p = request.params
        parts.new_slots.append((slot, cached, p.temperature, p.top_k, p.top_p, p.min_p, request.seed))
        extra = extra_of(request, self._eos_ids)
        if extra is not NOTHING or table.sampling_extra[slot]:
            parts.extras.append((slot, extra))
            table.sampling_extra[slot] = extra is not NOTHING
        if p.grammar or table.has_grammar[slot]:
            parts.grammar_rows.append(GrammarRow.of(slot, request))
            table.has_grammar[slot] = bool(p.grammar)
            self._with_grammar += bool(p.grammar)
        if p.logprobs is not None:
            table.logprobs[slot] = p.logprobs
            self._scoring += 1
        parts.grant(slot, np.arange(len(pages), dtype=np.int32), pages)
        if not request.resumed:
            self.counters.admitted += 1
            self.counters.prompt_tokens += len(request.ids)
            self.counters.cached_tokens += cached
            self.counters.misses[why] = self.counters.misses.get(why, 0) + len(request.ids) - cached
            out.started.append((request.uid, cached))
        return slot

    def _is_being_computed(self, request: Request, match: Match) -> bool:
        """Whether a running prefill is about to publish the very page that this request would compute first.

        Its place in the tree is where our match ends, and its next page has our next tokens; a step later the match is longer.
        """
        size, at = self.limits.page_size, match.num_pages * self.limits.page_size
        if at + size >= len(request.ids):  # the last token is computed in any case
            return False
        ours = request.ids[at : at + size]
        for slot in self._prefilling:
            leader = self.running[int(self.table.uid[slot])][1]
            if int(self.table.n_shared[slot]) == match.num_pages and self.table.handle[slot] is match.node:
                theirs = leader.ids[at : at + size]
                if len(theirs) == size and (theirs == ours).all():
                    return True
        return False

    # ---------------- statistics and checks
    def stats(self) -> dict[str, int]:
        """Where things stand, and what has happened since the start.  Tokens unless the name says otherwise."""
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
