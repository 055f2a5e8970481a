"""Who is served next: short prompts before long ones, clients and their calls alike, and a bound that no neighbour can move.

Steps are counted, not seconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import EOS, VOCAB, Loop

from minisgl.actors.scheduler.fair_queue import FairQueue
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.model.fake_runner import expected_tokens
from minisgl.sampling_params import RequestOptions, SamplingParams


def of(client: int, call: int = 0, priority: int = 0) -> RequestOptions:
    return RequestOptions(client=client, call=call, priority=priority)


def ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(1, VOCAB) for _ in range(n)]


def talker(rng: random.Random, n: int, at_least: int) -> list[int]:
    """A prompt of `n` tokens whose answer goes on for `at_least` tokens before its EOS."""
    while True:
        prompt = ids(rng, n)
        if len(expected_tokens(prompt, at_least, VOCAB, (EOS,))) == at_least:
            return prompt


def steps_to_first_token(loop: Loop, uid: int, most: int = 400) -> int:
    for n in range(1, most):
        loop.step()
        if loop.said[uid]:
            return n
    raise AssertionError(f"no token after {most} steps")


# ---------------- one long prompt and small ones
@pytest.mark.parametrize("lag", [1, 2, 4])
@pytest.mark.parametrize("same_client", [True, False])
def test_a_short_prompt_does_not_wait_for_a_long_one_that_is_being_computed(lag: int, same_client: bool) -> None:
    rng = random.Random(lag)
    loop = Loop(slots=4, num_pages=200, max_context=600, step_tokens=12, max_steps_in_flight=lag)
    long = loop.add(ids(rng, 500), 1, of(1))
    for _ in range(5):
        loop.step()
    short = loop.add(ids(rng, 8), 1, of(1 if same_client else 2, 7))
    assert steps_to_first_token(loop, short) <= 1 + lag
    assert not loop.said[long]
    loop.run()
    loop.check_answers()


@pytest.mark.parametrize("clients", [1, 4])
def test_a_long_prompt_is_finished_although_short_ones_never_stop_coming(clients: int) -> None:
    rng = random.Random(clients)
    loop = Loop(slots=8, num_pages=400, max_context=600, step_tokens=12, max_steps_in_flight=1)
    long = loop.add(ids(rng, 240), 1, of(0, 0))
    steps = 0
    while not loop.said[long]:
        for _ in range(2):  # as much as a step computes
            loop.add(ids(rng, 6), 1, of(rng.randrange(clients), 1 + len(loop.asked)))
        loop.step()
        steps += 1
        assert steps < 2000
    assert steps <= 2 + (1 + clients) * 240 / 12, "more than with an equal share for every client"
    loop.run()
    loop.check_answers()


def test_of_two_long_prompts_the_first_is_finished_first() -> None:
    rng = random.Random(1)
    for other in (of(1, 1), of(2, 0)):
        loop = Loop(slots=4, num_pages=200, max_context=300, step_tokens=12)
        first, second = loop.add(ids(rng, 100), 1, of(1)), loop.add(ids(rng, 100), 1, other)
        loop.run()
        assert list(loop.ends) == [first, second]


# ---------------- shares of clients and calls
def test_clients_start_by_turns_however_many_requests_they_have() -> None:
    rng = random.Random(2)
    loop = Loop(slots=2, num_pages=200, step_tokens=9, order="arrival", max_steps_in_flight=1)
    many = [loop.add(ids(rng, 6), 1, of(1, i)) for i in range(20)]
    few = [loop.add(ids(rng, 6), 1, of(2, i)) for i in range(5)]
    loop.run()
    order = list(loop.started)
    assert max(order.index(uid) for uid in few) <= 2 * len(few) + 1
    assert [uid for uid in order if uid in many] == many
    loop.check_answers()


def test_calls_of_a_client_start_by_turns_however_many_rows_they_have() -> None:
    rng = random.Random(3)
    loop = Loop(slots=2, num_pages=200, step_tokens=9, order="arrival", max_steps_in_flight=1)
    for _ in range(20):
        loop.add(ids(rng, 6), 1, of(1, 1))
    single = [loop.add(ids(rng, 6), 1, of(1, 2 + i)) for i in range(3)]
    loop.run()
    assert max(list(loop.started).index(uid) for uid in single) <= 9
    loop.check_answers()


def crowd(loop: Loop, rng: random.Random, rows: int, options: RequestOptions) -> list[int]:
    """Requests with long answers, as many rows of one call, and steps until the slots are taken."""
    uids = [loop.add(talker(rng, 6, 40), 40, options) for _ in range(rows)]
    while len(loop.machine.running) < min(rows, loop.limits.slots):
        loop.step()
    return uids


@pytest.mark.parametrize("newcomer", [of(2), of(1, 9), of(1, 0, 1)], ids=["client", "call", "priority"])
def test_who_holds_no_slot_gets_one_from_who_holds_many(newcomer: RequestOptions) -> None:
    rng = random.Random(4)
    loop = Loop(slots=4, num_pages=100, step_tokens=12)
    crowd(loop, rng, 10, of(1))
    uid = loop.add(ids(rng, 6), 1, newcomer)
    assert steps_to_first_token(loop, uid) <= 4
    loop.run()
    loop.check_answers()


def test_nobodys_last_row_is_taken_and_nothing_is_taken_back() -> None:
    rng = random.Random(5)
    loop = Loop(slots=4, num_pages=100, step_tokens=12)
    rows = [crowd(loop, rng, 1, of(client)) for client in range(4)]
    loop.add(ids(rng, 6), 1, of(9))
    loop.run()
    assert loop.machine.counters.retractions == 0
    assert rows
    loop = Loop(slots=8, num_pages=200, step_tokens=16)
    crowd(loop, rng, 16, of(1))
    for _ in range(16):
        loop.add(talker(rng, 6, 40), 40, of(2))
    for _ in range(10):
        loop.step()
    assert loop.machine.counters.retractions == 3
    assert loop.machine.fair.rows == {1: 5, 2: 3}
    loop.run()
    loop.check_answers()


def test_batches_make_room_for_everybody() -> None:
    rng = random.Random(6)
    loop = Loop(slots=4, num_pages=100, step_tokens=12)
    for client in range(4):
        crowd(loop, rng, 1, of(client, 0, -1))
    uid = loop.add(ids(rng, 6), 1, of(2, 5))
    assert steps_to_first_token(loop, uid) <= 4
    loop.run()
    loop.check_answers()


def test_pages_are_shared_like_slots() -> None:
    rng = random.Random(7)
    loop = Loop(slots=8, num_pages=24, page_size=4, max_context=96, step_tokens=32)
    for _ in range(4):
        loop.add(talker(rng, 10, 60), 60, of(1))
    while len(loop.machine.running) < 2 or loop.machine.pool.free + loop.machine.cache.evictable > 3:
        loop.step()
    uid = loop.add(ids(rng, 8), 1, of(2))
    assert steps_to_first_token(loop, uid) <= 4
    loop.run()
    loop.check_answers()


# ---------------- the bound
LIGHT, HEAVY = 8, 4  # tokens of a light request; heavy clients
ROOM = 24  # tokens a step has for prompts when all slots decode


def neighbours(seed: int) -> float:
    """By how many steps a light client waited longer for its one token than it may, at most, whatever heavy clients do.

    It may wait one step to make way, and those that compute what comes before it in the fair order: for each flow its weight
    times as many tokens as the light request has.  The results of plans in flight come on top.
    """
    rng = random.Random(seed)
    lag, slots, pages = rng.choice((1, 2, 3)), rng.choice((6, 8, 12)), rng.choice((60, 120, 300))
    loop = Loop(slots=slots, num_pages=pages, max_context=200, step_tokens=slots + ROOM, max_steps_in_flight=lag)
    worst, light, since, calls, due, weight = -99.0, 0, 0, 0, 10, 0.0
    for step in range(250):
        for client in range(1, 1 + HEAVY):
            if rng.random() < 0.15 and len(loop.machine.waiting) < 200:
                calls += 1
                kind = rng.choice(("rows", "long", "calls", "batch"))
                same = ids(rng, 12)
                for i in range({"rows": 24, "long": 2, "calls": 12, "batch": 24}[kind]):
                    prompt = (
                        ids(rng, rng.randrange(100, 180)) if kind == "long" else same if rng.random() < 0.3 else ids(rng, 9)
                    )
                    call = calls + (1000 * i if kind == "calls" else 0)
                    loop.add(prompt, rng.choice((1, 20, 60)), of(client, call, -1 if kind == "batch" else 0))
        if rng.random() < 0.05 and loop.asked:
            loop.drop(rng.choice([uid for uid in loop.asked if uid != light]))
        if not light and step >= due:
            light, since, weight = loop.add(ids(rng, LIGHT), 1, of(99, 10_000 + step)), step, 0.0
        loop.step()
        weight = max(weight, loop.machine.fair.weight)
        if light and light in loop.ends:
            worst = max(worst, step - since + 1 - lag - (1 + math.ceil(LIGHT * weight / ROOM)))
            light, due = 0, step + rng.randrange(1, 12)
        assert not light or step - since < 150, "a light request starves"
    return worst


@pytest.mark.parametrize("block", range(3))
def test_a_light_client_waits_a_bounded_number_of_steps_whatever_its_neighbours_do(block: int) -> None:
    for seed in range(block * 6, block * 6 + 6):
        assert neighbours(seed) <= 1


# ---------------- the ideal server
def ideal(calls: list[tuple[int, int, int]]) -> FairQueue:
    """A queue that (client, call, tokens) have entered."""
    queue = FairQueue()
    for uid, (client, call, tokens) in enumerate(calls):
        queue.enter(request(uid, client, call), tokens)
    return queue


def request(uid: int, client: int, call: int) -> Request:
    return Request(uid, np.zeros(1, np.int32), 2, 0, SamplingParams(), of(client, call))


def test_virtual_time_is_that_of_a_server_that_works_on_all_at_once() -> None:
    queue = ideal([(1, 1, 10), (2, 1, 30)])
    queue.serve(10)
    assert queue.time == 5
    queue.serve(20)
    assert queue.time == 20, "10 tokens later the first has gone, and time runs twice as fast"
    late = request(9, 3, 1)
    queue.enter(late, 4)
    assert late.finish == 24
    queue.serve(1000)
    assert (queue.weight, queue.time) == (pytest.approx(0), 30)


def test_a_call_weighs_less_the_more_short_calls_its_client_has() -> None:
    queue = ideal([(1, 1, 100), (1, 2, 100), (1, 3, 100)])
    assert queue.weight == pytest.approx(1 + 1 / 2 + 1 / 3)
    short, other = request(8, 1, 4), request(9, 2, 1)
    queue.enter(short, 4)
    queue.enter(other, 100)
    assert (short.finish, other.finish) == (4, 100), "those that are longer count for nothing"


def test_a_call_of_many_rows_does_not_stand_in_the_way_of_short_calls() -> None:
    queue = ideal([(1, 1, 8) for _ in range(40)])
    short = request(99, 1, 2)
    queue.enter(short, 8)
    assert short.finish == 8


def test_nothing_is_kept_of_those_who_have_gone() -> None:
    queue, rng = FairQueue(), random.Random(0)
    for turn in range(300):
        requests = [request(i, rng.randrange(3), rng.randrange(5)) for i in range(rng.randrange(1, 9))]
        for r in requests:
            queue.enter(r, rng.randrange(1, 50))
        queue.serve(rng.randrange(200))
        for r in requests:
            queue.hold(r, 1)
        for r in requests:
            queue.hold(r, -1)
        if turn % 3 == 0:
            (queue.rest if turn % 2 else lambda: queue.serve(1e9))()
            assert not any((queue._flows, queue._ends, queue._sizes, queue.rows, queue.call_rows))
            assert queue.weight == pytest.approx(0, abs=1e-9)


def test_a_call_weighs_what_all_its_rows_ask_for() -> None:
    """Its first row alone would be the shortest call of its client, and k such calls would weigh k."""
    queue = FairQueue()
    for call in range(1, 5):
        for _ in range(32):
            queue.enter(request(0, 1, call), 9)
    assert queue.weight == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4)


# ---------------- the test notices
def _in_order_of_arrival(self: FairQueue, request: Request, tokens: int) -> None:
    ENTER(self, request, tokens)
    request.finish = 0.0


def _no_time(self: FairQueue, tokens: int) -> None:
    pass


ENTER = FairQueue.enter
MUTANTS: dict[str, tuple[type, str, Any, Callable[[], object]]] = {
    "nobody makes way": (StepMachine, "_victim", lambda *_: None, lambda: max(map(neighbours, range(6))) <= 1),
    "prompts are served in order of arrival": (
        FairQueue,
        "enter",
        _in_order_of_arrival,
        lambda: test_a_short_prompt_does_not_wait_for_a_long_one_that_is_being_computed(2, False),
    ),
    "virtual time stands still": (
        FairQueue,
        "serve",
        _no_time,
        lambda: test_virtual_time_is_that_of_a_server_that_works_on_all_at_once(),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_notices_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, broken, check = MUTANTS[name]
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises(AssertionError):
        assert check() is not False
