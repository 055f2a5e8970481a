"""Who runs when: admission, fairness, priorities, deadlines, shared prefixes, memory.  On virtual steps and virtual time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import EOS, VOCAB, Loop, World, fake_config, fake_spec, prompt, talker

from minisgl.actors.messages import Wake
from minisgl.actors.scheduler import admission
from minisgl.actors.scheduler.interface import Add, Drop, SchedulerLimits
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.actors.scheduler.waiting_queue import WaitQueue
from minisgl.cache.radix import Match, RadixCache
from minisgl.config import Config, EngineConfig
from minisgl.model.fake_runner import expected_tokens
from minisgl.plan import StepResult
from minisgl.sampling_params import Finish, RequestOptions, SamplingParams


# ---------------- equal prompts share what is computed
def burst_computes_once() -> None:
    loop = Loop(slots=8, num_pages=200, step_tokens=30)
    for _ in range(6):
        loop.add(prompt(40), 4)
    loop.run()
    loop.check_answers()
    assert loop.prefilled() == 40 + 5 * 4  # the followers compute the last page: its last token must give logits


def test_a_burst_of_equal_prompts_computes_the_prefix_once() -> None:
    burst_computes_once()


def test_those_who_wait_for_a_prefix_do_not_stand_in_the_way_of_others() -> None:
    loop = Loop(slots=40, num_pages=200, step_tokens=60)
    for _ in range(30):  # more than a window of followers behind one leader
        loop.add([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], 2)
    other = loop.add([9, 9, 9], 2)
    loop.step()
    assert other in loop.started
    loop.run()
    loop.check_answers()


def test_without_sharing_a_burst_in_one_step_is_computed_by_each_and_still_right() -> None:
    loop = Loop(slots=8, num_pages=200, step_tokens=250, wait_for_shared_prefix=False)
    for _ in range(6):
        loop.add(prompt(40), 4)
    loop.run()
    loop.check_answers()
    assert loop.prefilled() == 6 * 40


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_equal_prompts_prefilled_together_never_own_a_freed_page(lag: int) -> None:
    loop = Loop(slots=6, num_pages=60, step_tokens=200, wait_for_shared_prefix=False, max_steps_in_flight=lag)
    for _ in range(3):
        loop.add(talker(18, 12), 12)
    for _ in range(6):
        loop.step()
    for first in range(2, 7):  # strangers take whatever was freed
        loop.add(prompt(16, first), 8)
    loop.run()
    loop.check_answers()


def test_the_chunks_of_a_long_prompt_are_visible_before_its_end() -> None:
    loop = Loop(num_pages=100, step_tokens=12)
    loop.add(prompt(60), 2)
    loop.step()
    loop.step()
    assert loop.machine.cache.match(np.array(prompt(60), np.int32)).num_pages == 6
    follower = loop.add([*prompt(12), 22, 22, 22], 2)
    loop.run()
    loop.check_answers()
    assert loop.started[follower] == 12


@pytest.mark.parametrize("lag", [1, 2, 4])
@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("how", ["abort", "flush", "retract"])
def test_followers_finish_when_their_leader_ends_midway(lag: int, steps: int, how: str) -> None:
    loop = Loop(num_pages=30, step_tokens=9, max_steps_in_flight=lag)
    leader = loop.add(prompt(40), 4)
    followers = [loop.add([*prompt(36), 7, 8, 9], 6) for _ in range(3)]
    for _ in range(steps):
        loop.step()
        loop.now += 1
    if how == "abort":
        loop.drop(leader)
    elif how == "retract" and loop.machine.running:
        loop.machine._retract()
    elif how == "flush":
        loop.drop(leader)
        loop.flush()
    loop.run()
    loop.check_answers()
    assert all(loop.ends[f] in (Finish.STOP, Finish.LENGTH) for f in followers)


# ---------------- the end of a request
def test_nothing_comes_after_an_eos_and_nothing_from_a_stopped_request() -> None:
    ids = next(p for n in range(3, 400) if EOS in expected_tokens(p := talker(3, 3, n), 12, VOCAB, (EOS,)))
    want = expected_tokens(ids, 30, VOCAB, (EOS,))
    for lag in (1, 2, 3, 4):
        loop = Loop(max_steps_in_flight=lag)
        uid = loop.add(ids, 30)
        loop.run()
        assert loop.said[uid] == want
        assert want[-1] == EOS
        assert loop.machine.counters.wasted_rows == lag - 1
        loop = Loop(max_steps_in_flight=lag)
        uid = loop.add(ids, 30, stop_token_ids=(want[1],))
        loop.run()
        assert loop.said[uid] == want[: want.index(want[1]) + 1]
        assert loop.ends[uid] is Finish.STOP


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
@pytest.mark.parametrize("others", [0, 2])
def test_an_abort_in_any_step_returns_everything_also_with_results_in_flight(lag: int, others: int) -> None:
    for when in range(26):
        loop = Loop(max_steps_in_flight=lag, num_pages=24)
        uid = loop.add(talker(22, 14), 14)
        for i in range(others):
            loop.add(talker(22, 14)[:16] + prompt(3, i + 2), 9)  # a cached beginning
        for _ in range(when):
            loop.step()
        loop.drop(uid)
        loop.drop(uid)
        loop.run()
        loop.check_answers()
        assert loop.machine.pool.free + loop.machine.cache.num_pages == 24
        assert loop.machine.cache.evictable == loop.machine.cache.num_pages


@pytest.mark.parametrize("abort_first", [True, False])
def test_an_abort_in_the_same_inbox_as_the_eos_frees_the_slot_once(abort_first: bool) -> None:
    ids = next(p for n in range(3, 400) if expected_tokens(p := talker(5, 2, n), 9, VOCAB, (EOS,))[-1] == EOS)
    want = expected_tokens(ids, 9, VOCAB, (EOS,))
    loop = Loop(max_steps_in_flight=2)
    uid = loop.add(ids, 9)
    while len(loop.said[uid]) + 1 < len(want):
        loop.step()
    results = [loop.pending.popleft()]
    assert results[0].tokens.tolist() == [EOS]
    drop = Drop(uid)
    loop.machine.step([drop, *results] if abort_first else [*results, drop], 0.0)
    loop.machine.check()
    assert not loop.machine.running
    assert loop.machine.table.free_slots == 4


@pytest.mark.parametrize("lag", [2, 3, 4])
def test_a_slot_that_is_reused_while_results_are_in_flight_gives_the_new_owner_its_own_tokens(lag: int) -> None:
    loop = Loop(slots=1, max_steps_in_flight=lag, step_tokens=40)
    for i in range(12):
        loop.add(prompt(3 + 5 * (i % 5), i + 1), 36)  # one slot: every end hands it on, to longer and shorter prompts
    loop.run()
    loop.check_answers()
    assert loop.machine.counters.wasted_rows > 0


# ---------------- admission and memory
def fabricated(limits: SchedulerLimits, prompts: int, n_prompt: int, answer: int, max_tokens: int) -> int:
    """The most requests that run at once, with a worker that says 5 and ends each answer after `answer` tokens."""
    machine, rng, most = StepMachine(limits), np.random.default_rng(0), 0
    inbox: list[Any] = [
        Add(Request(u, rng.integers(1, 100, n_prompt, np.int32), n_prompt + max_tokens, 0, SamplingParams()))
        for u in range(1, prompts + 1)
    ]
    for _ in range(20_000):
        out = machine.step(inbox, 0.0)
        most = max(most, len(machine.running))
        if machine.idle:
            break
        assert out.plan is not None
        slots = machine.inflight[-1].slots
        last = machine.table.length[slots] + 1 >= n_prompt + answer
        inbox = [StepResult(out.plan.step, np.where(last, EOS, 5).astype(np.int32))]
    machine.check()
    assert machine.counters.retractions < prompts
    return most


def test_admission_does_not_reserve_max_tokens() -> None:
    limits = SchedulerLimits(512, 300_000 // 16, 16, 40_000, 8192, 1, 100, (EOS,))
    assert fabricated(limits, 400, 1000, 200, 32_768) >= 200


def test_admission_counts_pages_and_not_tokens() -> None:
    limits = SchedulerLimits(8, 4, 256, 1024, 600, 1, 100, (EOS,))
    assert fabricated(limits, 5, 100, 100, 100) <= 4


def test_the_pool_never_overflows_whatever_the_page_size() -> None:
    for page_size in (1, 4, 16, 32):
        loop = Loop(slots=6, page_size=page_size, num_pages=64 // page_size, step_tokens=50)
        for i in range(8):
            loop.add(prompt(9 + i, i), 20)
        loop.run()
        loop.check_answers()


def unfittable_head() -> tuple[Loop, int]:
    """One request holds most of the pool, the next in the queue needs all of it."""
    loop = Loop(slots=8, num_pages=24, max_context=96, step_tokens=60)
    loop.add(talker(40, 30), 30, RequestOptions(priority=9))
    loop.step()
    big = loop.add(prompt(70, 3), 2)
    return loop, big


def test_a_head_that_does_not_fit_lets_those_behind_it_pass() -> None:
    loop, big = unfittable_head()
    small = [loop.add(prompt(5, i), 2) for i in range(4, 9)]
    loop.run()
    loop.check_answers()
    order = list(loop.ends)
    assert all(order.index(s) < order.index(big) for s in small)


def overtaken(monkeypatch: pytest.MonkeyPatch, options: RequestOptions, others: RequestOptions) -> int:
    """How many of 60 small requests start before a big one that does not fit while one after another of them runs."""
    monkeypatch.setattr(admission, "MAX_OVERTAKEN", 10)
    loop = Loop(slots=8, num_pages=24, max_context=96, step_tokens=60)
    loop.add(prompt(5), 3)
    loop.step()
    early = [loop.add(prompt(9, i), 3 + 5 * i % 11, others) for i in range(30)]  # of many lengths: the pool is never empty
    big = loop.add(prompt(90, 3), 2, options)
    late = []
    while big not in loop.started:
        if len(late) < 400:
            late.append(loop.add(prompt(9, len(late)), 3 + 5 * len(late) % 11, others))
        loop.step()
    assert early
    loop.run()
    loop.check_answers()
    return list(loop.started).index(big)


def test_a_request_that_was_overtaken_often_enough_is_not_overtaken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overtaken(monkeypatch, RequestOptions(), RequestOptions()) <= 31 + 10 + 8


def test_an_important_request_that_does_not_fit_is_not_passed_by_all_the_others_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (
        overtaken(monkeypatch, RequestOptions(priority=1), RequestOptions()) <= 1 + 10 + 8
    )  # slots: those that start in the same step


def test_a_request_that_waits_for_pages_leaves_the_order_of_eviction_alone() -> None:
    loop = Loop(slots=4, num_pages=40, max_context=160, step_tokens=100)
    for first in (1, 2, 3):
        loop.add(prompt(12, first), 1)
        loop.run()
    loop.add(talker(80, 30, 9), 30)
    loop.step()
    order = list(loop.machine.cache._unused)
    waiting = loop.add([*prompt(12, 1), *prompt(70, 11)], 2)
    for _ in range(8):
        loop.step()
        assert waiting not in loop.started
        assert list(loop.machine.cache._unused) == order
    loop.run()
    loop.check_answers()


def test_looking_past_the_head_costs_a_bounded_number_of_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = unfittable_head()
    for i in range(300):
        loop.add(prompt(70, i), 2)
    loop.step()  # one look at the cache for each that comes: what it has costs nothing in the fair order
    looks = 0

    def counting(self: RadixCache, ids: Any, salt: str = "") -> Match:
        nonlocal looks
        looks += 1
        return MATCH(self, ids, salt)

    monkeypatch.setattr(RadixCache, "match", counting)
    for _ in range(10):
        loop.step()
    assert looks <= 10 * 2 * admission.WINDOW


# ---------------- decodes and prompts
@pytest.mark.parametrize("lag", [1, 2, 4])
def test_a_decode_gets_its_token_in_every_step_of_a_steady_stream_of_long_prompts(lag: int) -> None:
    loop = Loop(num_pages=400, step_tokens=10, max_steps_in_flight=lag)
    talking = loop.add(talker(3, 50), 50)
    while talking not in loop.said or not loop.said[talking]:
        loop.step()
    slot = loop.machine.running[talking][0]
    while talking not in loop.ends:
        if len(loop.machine.waiting) < 2:
            loop.add(prompt(50, len(loop.asked)), 1)
        asked = loop.machine.table.planned[slot] + 1 >= loop.machine.table.limit[slot]
        out = loop.step()
        if out.plan is not None and not asked and talking not in loop.ends:
            assert slot in loop.machine.inflight[-1].slots.tolist(), "a running decode got nothing in a step"
    assert loop.machine.counters.prefill_tokens > 100


def test_prompts_get_on_beside_a_full_house_of_decodes() -> None:
    loop = Loop(slots=5, step_tokens=6, num_pages=200)
    for i in range(4):
        loop.add(talker(3, 40, i * 50 + 1), 40)
    for _ in range(12):
        loop.step()
    uid = loop.add(prompt(10), 2)
    for _ in range(14):
        loop.step()
    assert loop.said[uid]


def itl_steps(target: float | None) -> list[tuple[float, int]]:
    """(seconds, prompt tokens) of the steps with decodes, under planted costs, while long prompts come in."""

    def cost(prefill: int, rows: int, context: int) -> float:
        return 2e-3 + 2e-4 * prefill + 1e-4 * rows + 1e-6 * context

    loop = Loop(slots=8, num_pages=1000, max_context=400, step_tokens=128, itl_target=target, max_steps_in_flight=1)
    for i in range(3):
        loop.add(talker(20, 60, 60 * i + 1), 60)
    steps: list[tuple[float, int]] = []
    for n in range(70):
        if n >= 20 and n % 8 == 0:
            loop.add(prompt(300, n), 1)
        table = loop.machine.table
        before = table.planned.copy()
        out = loop.step()
        if out.plan is None:
            continue
        prefill, rows = len(out.plan.ids), len(loop.machine.inflight[-1].slots) - int(out.plan.prefill["sample"].sum())
        decoding = [s for s in range(8) if table.planned[s] == before[s] + 1]
        seconds = cost(prefill, rows, int(table.planned[decoding].sum()))
        loop.pending[-1].busy_us = round(seconds * 1e6)
        if n >= 20 and rows:
            steps.append((seconds, prefill))
    return steps


def test_chunks_shrink_so_that_steps_with_decodes_keep_to_the_target() -> None:
    steps = [s for s in itl_steps(0.008) if s[1]]
    assert len(steps) > 20
    assert max(seconds for seconds, _ in steps) <= 0.008 * 1.25, "until the first long chunks have been seen"
    assert max(seconds for seconds, _ in steps[3:]) <= 0.008 * 1.02
    assert min(n for _, n in steps[:-1]) > 15, "the time that the target leaves is not used"
    assert max(seconds for seconds, _ in itl_steps(0.0)) > 0.02, "without a target the chunks are long"


def test_a_target_that_cannot_be_met_still_lets_prompts_on_by_a_page_a_step() -> None:
    chunks = [n for _, n in itl_steps(0.0001) if n]
    assert len(chunks) > 20
    assert min(chunks) >= 1
    assert max(chunks) <= 4


def test_without_a_target_of_ones_own_decodes_take_at_most_twice_as_long_beside_steady_prompts() -> None:
    """The default of the server (None): the planted cost of these decodes alone is 2.3 ms and a little."""
    steps = itl_steps(None)
    alone = [seconds for seconds, n in steps if not n]
    beside = [seconds for seconds, n in steps if n][4:]
    assert len(beside) > 20
    assert np.median(beside) <= 2 * min(alone, default=0.0024)
    assert np.mean(beside) <= 2.2 * min(alone, default=0.0024)
    assert max(beside) < 0.07
    assert np.mean([n for _, n in steps if n][4:]) >= 8


def test_without_decodes_a_target_is_no_bound_and_the_default_only_ends_steps_for_those_who_come() -> None:
    for target in (None, 0.001):
        loop = Loop(slots=8, num_pages=1000, max_context=400, step_tokens=128, itl_target=target, max_steps_in_flight=1)
        for first in range(12):
            loop.add(prompt(300, first), 1)
        chunks = []
        for _ in range(24):
            out = loop.step()
            if out.plan is not None:
                loop.pending[-1].busy_us = 3000 + 5000 * len(out.plan.ids)
                chunks.append(len(out.plan.ids))
        assert max(chunks[-4:]) == (128 if target else 39), "0.2 s hold 39 tokens of 5 ms"


# ---------------- priorities
def admitted_by_priority() -> None:
    loop = Loop(slots=1, max_steps_in_flight=1)
    loop.add(prompt(4), 3)
    loop.step()
    low, middle, high, second = (loop.add(prompt(4, i + 2), 2, RequestOptions(priority=p)) for i, p in enumerate((-3, 0, 7, 7)))
    loop.run()
    loop.check_answers()
    assert list(loop.started)[1:] == [high, second, middle, low]


def test_higher_priorities_start_first() -> None:
    admitted_by_priority()


def retracted_by_priority() -> None:
    loop = Loop(slots=3, num_pages=12, step_tokens=40, max_steps_in_flight=2)
    order = [loop.add(talker(8, 24, i * 90 + 1), 24, RequestOptions(priority=p)) for i, p in enumerate((0, -1, 5))]
    gone: list[int] = []
    retract = loop.machine._retract

    def spy() -> None:
        before = set(loop.machine.running)
        retract()
        gone.extend(before - set(loop.machine.running))

    loop.machine._retract = spy  # type: ignore[method-assign]
    loop.run()
    loop.check_answers()
    assert gone, "the pool was large enough for all"
    assert gone[0] == order[1]
    assert order[2] not in gone


def test_the_least_important_is_retracted_first_and_the_most_important_never() -> None:
    retracted_by_priority()


def test_among_equals_the_youngest_is_retracted_and_resumes_with_the_same_text() -> None:
    loop = Loop(slots=3, num_pages=12, step_tokens=40, max_steps_in_flight=2)
    for i in range(3):
        loop.add(talker(8, 24, i * 90 + 1), 24)
    while not loop.machine.counters.retractions:
        loop.step()
    assert 1 in loop.machine.running
    assert 3 in loop.machine.waiting
    loop.run()
    loop.check_answers()
    assert list(loop.started) == [1, 2, 3], "a resumed request is not announced again"


def test_requests_with_a_cached_prefix_start_first_but_nobody_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_OVERTAKEN", 6)
    for order, most in (("prefix", 6), ("arrival", 0)):
        loop = Loop(slots=1, num_pages=60, order=order)
        loop.add(prompt(16), 1)
        loop.run()
        stranger = loop.add(prompt(12, 9), 1)
        for i in range(20):
            loop.add([*prompt(16), i + 1, 3], 1)
        loop.run()
        loop.check_answers()
        assert list(loop.started).index(stranger) - 1 == most


# ---------------- waiting
def test_a_client_is_told_how_long_its_request_waited_for_its_first_step() -> None:
    w = World(3, fake_config(max_running=1))
    w.system.clock = 7.0
    first = w.submit(talker(6, 40), 40)
    while not w.answers[first]:
        w.system.step()
    second = w.submit(prompt(6, 3), 4)
    while not len(w.machine.waiting):
        w.system.step()
    w.system.clock += 2.5
    while not w.answers[second]:
        w.system.step()
    w.system.clock += 9
    w.system.run()
    assert (w.queued[first], w.queued[second]) == (0.0, 2.5)
    w.close()


# ---------------- salts
def salts_are_kept_apart() -> None:
    loop = Loop(num_pages=60)
    for salt, cached in (("a", 0), ("b", 0), ("", 0), ("a", 16), ("b", 16), ("", 16)):
        uid = loop.add(prompt(18), 2, RequestOptions(cache_salt=salt))
        loop.run()
        assert loop.started[uid] == cached
    loop.check_answers()


def test_a_cached_prefix_is_found_under_its_own_salt_only() -> None:
    salts_are_kept_apart()


def test_nobody_waits_for_a_prefix_that_another_salt_is_computing() -> None:
    loop = Loop(num_pages=100, step_tokens=100)
    for salt in ("a", "b", "a"):
        loop.add(prompt(30), 2, RequestOptions(cache_salt=salt))
    loop.step()
    assert list(loop.started) == [1, 2]
    loop.run()
    loop.check_answers()
    assert loop.started[3] == 28


# ---------------- statistics
def test_cached_and_missed_tokens_add_up_and_say_why() -> None:
    loop = Loop(num_pages=16, step_tokens=40)
    for ids in (prompt(20), prompt(21), prompt(3, 2), prompt(50, 5), prompt(20)):
        loop.add(ids, 1)
        loop.run()
    c = loop.machine.counters
    assert c.prompt_tokens == 20 + 21 + 3 + 50 + 20
    assert c.cached_tokens + sum(c.misses.values()) == c.prompt_tokens
    assert c.misses["new"] >= 20 + 50
    assert c.misses["whole"] == 1
    assert c.misses["short"] == 3
    assert c.misses["evicted"] > 0
    assert loop.machine.stats()["prompt_tokens"] == 114


def test_the_cache_can_be_flushed_while_requests_run() -> None:
    loop = Loop(num_pages=40)
    loop.add(prompt(20), 1)
    loop.run()
    running = loop.add([*prompt(12), 5, 5, 5], 12)
    loop.step()
    loop.flush()
    loop.step()
    assert loop.machine.cache.num_pages == loop.machine.table.n_shared[loop.machine.running[running][0]]
    loop.run()
    loop.check_answers()
    loop.flush()
    loop.step()
    assert loop.machine.pool.free == 40


# ---------------- the tests notice: every policy can be broken without breaking a text, so each has a check that sees it
def _any_salt(self: RadixCache, ids: Any, salt: str = "") -> Match:
    return MATCH(self, ids)


def _retract_the_youngest(self: StepMachine) -> None:
    for _, request in self.running.values():
        request.options = dataclasses.replace(request.options, priority=0)
    RETRACT(self)


def _first_come(self: WaitQueue, request: Request, front: bool = False) -> None:
    request.options = dataclasses.replace(request.options, priority=0)
    QUEUE_ADD(self, request, front)


def _never_passed(self: StepMachine, *args: Any) -> None:
    ADMIT(self, *args)
    for request in self.waiting.front(1000):
        request.overtaken_by = 0


def _whole_budget(self: StepMachine, decode_rows: int, context: int) -> int:
    return self.limits.step_tokens - decode_rows


def _reserve_all(self: StepMachine, request: Request, *args: Any) -> int | None:
    promised = sum(r.limit for _, r in self.running.values()) + request.limit
    return TRY(self, request, *args) if promised <= self.limits.num_pages * self.limits.page_size else None


def _endless_pages(self: StepMachine, request: Request, *args: Any) -> int | None:
    real, self.pool = self.pool, SimpleNamespace(free=1 << 30)  # type: ignore[assignment]
    try:
        return TRY(self, request, *args)
    finally:
        self.pool = real


def _prompts_first(self: StepMachine) -> Any:
    if not self._prefilling and not len(self.waiting):
        return PLAN_DECODE(self)
    return np.zeros(0, np.int32)


def _touch(self: StepMachine, request: Request, *args: Any) -> int | None:
    handle, _ = self.cache.acquire(self._match(request))
    self.cache.release(handle)
    return TRY(self, request, *args)


MATCH, RETRACT, QUEUE_ADD = RadixCache.match, StepMachine._retract, WaitQueue.add
ADMIT, TRY, PLAN_DECODE = StepMachine._prefill, StepMachine._try_admit, StepMachine._plan_decode
Check = Callable[..., Any]
MUTANTS: dict[str, tuple[type, str, Any, Check]] = {
    "nobody sees what is being computed": (StepMachine, "_is_being_computed", lambda *_: False, burst_computes_once),
    "salts are ignored": (RadixCache, "match", _any_salt, salts_are_kept_apart),
    "priorities are ignored in retraction": (StepMachine, "_retract", _retract_the_youngest, retracted_by_priority),
    "priorities are ignored in the queue": (WaitQueue, "add", _first_come, admitted_by_priority),
    "nobody counts who was overtaken": (
        StepMachine,
        "_prefill",
        _never_passed,
        test_a_request_that_was_overtaken_often_enough_is_not_overtaken_again,
    ),
    "the latency target is ignored": (
        StepMachine,
        "_prefill_budget",
        _whole_budget,
        test_chunks_shrink_so_that_steps_with_decodes_keep_to_the_target,
    ),
    "max_tokens are reserved": (StepMachine, "_try_admit", _reserve_all, test_admission_does_not_reserve_max_tokens),
    "pages are not counted at admission": (
        StepMachine,
        "_try_admit",
        _endless_pages,
        test_admission_counts_pages_and_not_tokens,
    ),
    "prompts go before decodes": (
        StepMachine,
        "_plan_decode",
        _prompts_first,
        lambda: test_a_decode_gets_its_token_in_every_step_of_a_steady_stream_of_long_prompts(2),
    ),
    "a waiting request touches the cache": (
        StepMachine,
        "_try_admit",
        _touch,
        test_a_request_that_waits_for_pages_leaves_the_order_of_eviction_alone,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_notices_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, broken, check = MUTANTS[name]
    needs = "monkeypatch" in check.__code__.co_varnames[: check.__code__.co_argcount]
    run = (lambda: check(monkeypatch)) if needs else check
    run()
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises((AssertionError, KeyError)):
        run()


def test_the_queue_of_a_config_with_a_long_context_starts() -> None:
    config = Config(fake_spec(512), EngineConfig(page_size=16, max_running=4, step_tokens=64, kv_tokens=512, tp=1))
    w = World(None, config)
    uid = w.submit(prompt(500), 12)
    w.system.clock += 1
    w.scheduler.ctx.send("scheduler", Wake())
    w.system.run()
    assert w.answers[uid] == expected_tokens(prompt(500), 12, VOCAB, (EOS,))
    w.close()
