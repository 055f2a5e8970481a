"""The step machine against the fake runner: a hypothesis state machine, seeded stress, restarts, and mutants to be caught."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from conftest import EOS, VOCAB, Loop, World, cases, fake_config, random_traffic
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.api.engine import Chunk
from minisgl.api.ledger import Entry
from minisgl.cache.no_cache import CACHES
from minisgl.cache.pages import PagePool
from minisgl.cache.radix import RadixCache
from minisgl.errors import RequestError
from minisgl.model.fake_runner import expected_tokens
from minisgl.sampling_params import Finish, RequestOptions

few_tokens = st.lists(st.integers(1, 2), min_size=1, max_size=22)


class MachineAgainstReference(RuleBasedStateMachine):
    """Requests come and go, results arrive late, time passes.  `Loop.step` checks the books after every step."""

    @initialize(
        lag=st.integers(1, 4),
        page_size=st.sampled_from([1, 2, 4, 8]),
        tokens=st.integers(32, 80),
        slots=st.integers(1, 5),
        extra=st.integers(1, 8),
        modes=st.tuples(st.sampled_from(["radix", "radix", "none"]), st.sampled_from(["prefix", "arrival"]), st.booleans()),
    )
    def start(self, *, lag: int, page_size: int, tokens: int, slots: int, extra: int, modes: tuple[str, str, bool]) -> None:
        cache, order, share = modes
        self.loop = Loop(
            slots=slots,
            num_pages=tokens // page_size,
            page_size=page_size,
            max_context=48,
            step_tokens=slots + extra,
            max_steps_in_flight=lag,
            cache=CACHES[cache],
            order=order,
            wait_for_shared_prefix=share,
        )

    @rule(
        ids=few_tokens,
        max_tokens=st.integers(1, 20),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "", "a"]),
    )
    def add(self, ids: list[int], max_tokens: int, priority: int, salt: str) -> None:
        self.loop.add(ids, max_tokens, RequestOptions(priority=priority, cache_salt=salt))

    @precondition(lambda self: len(self.loop.asked) > len(self.loop.ends))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.loop.drop(data.draw(st.sampled_from(sorted(self.loop.asked))))

    @rule()
    def flush(self) -> None:
        self.loop.flush()

    @rule(deliver=st.integers(0, 4), seconds=st.sampled_from([0.0, 0.5, 2.0]))
    def step(self, deliver: int, seconds: float) -> None:
        self.loop.now += seconds
        self.loop.step(deliver)

    @rule(n=st.integers(2, 12))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.loop.now += 0.1
            self.loop.step()

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.run()
            self.loop.check_answers()


MachineAgainstReference.TestCase.settings = settings(max_examples=cases(60), stateful_step_count=30, deadline=None)
TestMachineAgainstReference = MachineAgainstReference.TestCase


# ---------------- seeded stress
def random_options(rng: random.Random) -> RequestOptions:
    return RequestOptions(
        priority=rng.choice((0, 0, 0, 1, -1)),
        cache_salt=rng.choice(("", "", "a", "b")),
        timeout=rng.choice((0, 0, 0, 0, 2.0, 8.0)),  # kept by the gateway, in the tests with one
    )


def stress(seed: int, **limits: Any) -> Loop:
    """Shared prefixes, second turns, aborts, flushes and late results, drawn from `seed`."""
    rng = random.Random(seed)
    loop = Loop(**({"num_pages": rng.choice((12, 16, 40)), "order": rng.choice(("prefix", "arrival"))} | limits))
    trunks = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 17))] for _ in range(2)]
    for _ in range(8):
        ids = rng.choice(trunks) + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 12))]
        if loop.ends and rng.random() < 0.4:
            uid = rng.choice(list(loop.ends))
            ids = [*(loop.asked[uid][0] + loop.said[uid])[:42], rng.randrange(1, VOCAB)]
        for _ in range(rng.choice((1, 1, 1, 2))):
            loop.add(ids, rng.randrange(1, 36), random_options(rng))
        for _ in range(rng.randrange(0, 8)):
            loop.now += rng.random() / 2
            loop.step(rng.choice((0, 1, 1, 2)))
        if rng.random() < 0.2:
            loop.drop(rng.choice(list(loop.asked)))
        if rng.random() < 0.05:
            loop.flush()
    loop.run()
    loop.check_answers()
    return loop


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_the_machine_answers_like_the_reference_under_seeded_stress(lag: int) -> None:
    """The mutants below are found within 24 seeds."""
    for seed in range(cases(120)):
        stress(1000 * lag + seed, max_steps_in_flight=lag)


def test_the_stress_reaches_what_it_is_meant_to_reach() -> None:
    loops = [stress(seed, max_steps_in_flight=1 + seed % 4) for seed in range(40)]
    counters = [loop.machine.counters for loop in loops]
    assert sum(c.retractions for c in counters) > 10
    assert sum(c.wasted_rows for c in counters) > 10
    assert sum(c.cached_tokens for c in counters) > 100
    assert sum(loop.machine.cache.evicted_pages for loop in loops) > 50
    assert {Finish.STOP, Finish.LENGTH, Finish.ABORT} == {e for loop in loops for e in loop.ends.values()}


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_the_whole_system_answers_like_the_reference_with_options_mixed_in(lag: int) -> None:
    for seed in range(cases(30)):
        rng = random.Random(seed)
        w = World(seed, fake_config(lag=lag, kv_tokens=rng.choice((72, 96, 160)), tp=1))
        want: dict[int, list[int]] = {}
        trunk = [rng.randrange(1, VOCAB) for _ in range(12)]
        for _ in range(8):
            ids = trunk[: rng.randrange(1, 13)] + [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 10))]
            most = rng.randrange(1, 20)
            uid = w.submit(ids, most, random_options(rng))
            want[uid] = expected_tokens(ids, most, VOCAB, (EOS,))
            for _ in range(rng.randrange(0, 30)):
                w.system.clock += 0.02
                w.system.step()
            if rng.random() < 0.15:
                w.gateway.close(uid)
                w.ends.setdefault(uid, Finish.ABORT)
        w.system.run()
        assert w.ends.keys() == want.keys(), "a request was never answered"
        for uid, end in w.ends.items():
            got = w.answers[uid]
            if isinstance(end, RequestError):
                assert end.code == "timeout"
                assert got == want[uid][: len(got)]
            elif end is Finish.ABORT:
                assert got == want[uid][: len(got)]
            else:
                assert got == want[uid]
        assert w.machine.idle
        assert w.gateway.open_requests == 0
        w.close()


# ---------------- restarts
@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_after_a_restart_a_replayed_request_goes_on_where_its_text_stopped(lag: int) -> None:
    replayed = 0
    for seed in range(40):
        rng = random.Random(seed)
        first = World(seed, fake_config(lag=lag, kv_tokens=rng.choice((72, 160)), tp=1))
        asked: dict[int, tuple[list[int], int]] = {}
        for _ in range(6):
            ids, most = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 24))], rng.randrange(4, 24)
            asked[first.submit(ids, most)] = (ids, most)
            for _ in range(rng.randrange(0, 40)):
                first.system.step()
        open_entries = list(first.gateway._ledger.values())
        first.close()
        second = World(seed + 1, fake_config(lag=lag, kv_tokens=160, tp=1))
        replayed += sum(bool(e.delivered) for e in open_entries)
        for old in open_entries:
            rest: list[int] = []

            def deliver(chunk: Chunk | RequestError, rest: list[int] = rest) -> None:
                assert isinstance(chunk, Chunk)
                rest.extend(chunk.token_ids)

            second.answers[old.uid] = rest
            entry = Entry(old.uid, old.params, old.options, deliver, old.source, old.ids, old.max_tokens, old.seed)
            entry.delivered = list(old.delivered)
            second.gateway._ledger[old.uid] = entry
            second.gateway._dispatcher.submit(entry)
        second.system.run()
        assert not second.gateway._ledger, "a replayed request was never answered"
        for old in open_entries:
            ids, most = asked[old.uid]
            assert first.answers[old.uid] + second.answers[old.uid] == expected_tokens(ids, most, VOCAB, (EOS,))
        second.close()
    assert replayed > 20


# ---------------- the tests notice: each mutant breaks one rule, and the stress must find it
def _extend_without_lock(self: RadixCache, handle: Any, ids: np.ndarray, pages: np.ndarray) -> Any:
    node, canonical, duplicates = EXTEND(self, handle, ids, pages)
    walk = node
    while walk is not handle:  # give the references back that extend took
        walk.refs -= 1
        if walk.refs == 0:
            self.evictable += len(walk.pages)
            self._unused[walk] = None
        walk = walk.parent
    return node, canonical, duplicates


def _evict_whatever_is_there(self: RadixCache, n: int) -> np.ndarray:
    leaves = [node for node in self.nodes() if not node.children]
    for leaf in leaves:
        self._unused.setdefault(leaf)
    return EVICT(self, n)


def _grant_a_page_twice(self: PagePool, n: int) -> np.ndarray:
    pages = ALLOC(self, n)
    if n > 1:
        pages[-1] = pages[0]
    return pages


def _never_evict(self: StepMachine, n: int) -> bool:
    return True  # "there will be room"


def _lose_the_retracted_tokens(self: StepMachine) -> None:
    before = {uid: request.ids for uid, (_, request) in self.running.items()}
    RETRACT(self)
    for request in self.waiting.front(99):
        if request.uid in before:
            self.waiting.tokens += len(before[request.uid]) - len(request.ids)
            request.ids = before[request.uid]


def _end_without_freeing(self: StepMachine, uid: int, finish: Finish, out: Any) -> bool:
    if uid in self.running:
        del self.running[uid]
    return END(self, uid, finish, out)


EXTEND, EVICT, ALLOC = RadixCache.extend, RadixCache.evict, PagePool.alloc
RETRACT, END = StepMachine._retract, StepMachine._end
MUTANTS = {
    "a published prefix is not locked": (RadixCache, "extend", _extend_without_lock),
    "eviction takes what is in use": (RadixCache, "evict", _evict_whatever_is_there),
    "a page is granted twice": (PagePool, "alloc", _grant_a_page_twice),
    "nobody makes room": (StepMachine, "_make_room", _never_evict),
    "a retracted request forgets what it said": (StepMachine, "_retract", _lose_the_retracted_tokens),
    "an ended request keeps its slot": (StepMachine, "_end", _end_without_freeing),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_stress_notices_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, broken = MUTANTS[name]
    monkeypatch.setattr(owner, method, broken)
    caught = 0
    for seed in range(24):
        try:
            stress(seed, max_steps_in_flight=1 + seed % 3)
        except Exception:  # whatever breaks first: a check, an assertion, an index
            caught += 1
    assert caught > 0


def test_random_traffic_leaves_no_waiting_tokens_behind() -> None:
    for seed in range(20):
        w = World(seed, fake_config(kv_tokens=72, tp=1))
        random_traffic(w, seed)
        assert w.machine.waiting.tokens == 0
        w.close()
