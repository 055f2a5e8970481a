"""Who is served next: short prompts before long ones, clients and their calls alike, and a bound that no neighbour can move.

Steps are counted, not seconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from conftest import EOS, VOCAB, Loop

from minisgl.actors.scheduler.fair_queue import FairQueue
from minisgl.actors.scheduler.request import Request
from minisgl.actors.scheduler.step_machine import StepMachine
from minisgl.model.fake_runner import expected_tokens
from minisgl.sampling_params import RequestOptions


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


def neighbours(seed: int) -> int:
    """The most steps that a light client's one-token request waits for its token, whatever heavy clients do."""
    rng = random.Random(seed)
    lag, slots = rng.choice((1, 2, 3)), rng.choice((6, 8, 12))
    pages = rng.choice((60, 120, 300))
    loop = Loop(slots=slots, num_pages=pages, max_context=200, step_tokens=slots + ROOM, max_steps_in_flight=lag)
    worst, light, since, calls = 0, 0, 0, 0
    light_is_due = 10
    for step in range(250):
        for client in range(1, 1 + HEAVY):
            waiting = sum(1 for uid in loop.asked if uid not in loop.ends and uid % 7 == client)
            if rng.random() < 0.15 and waiting < 60:
                calls += 1
                kind = rng.choice(("rows", "long", "calls", "batch"))
                n = {"rows": 24, "long": 2, "calls": 12, "batch": 24}[kind]
                same = ids(rng, 12)
                for i in range(n):
                    prompt = (
                        ids(rng, rng.randrange(100, 180)) if kind == "long" else same if rng.random() < 0.3 else ids(rng, 9)
                    )
                    call = calls + (1000 * i if kind == "calls" else 0)
                    loop.add(prompt, rng.choice((1, 20, 60)), of(client, call, -1 if kind == "batch" else 0))
        if rng.random() < 0.05 and loop.asked:
            loop.drop(rng.choice([uid for uid in loop.asked if uid != light]))
        if not light and step >= light_is_due:
            light, since = loop.add(ids(rng, LIGHT), 1, of(99, 10_000 + step)), step
        loop.step()
        if light and (loop.said[light] or light in loop.ends):
            worst = max(worst, step - since + 1 - lag)
            light, light_is_due = 0, step + rng.randrange(1, 12)
        assert not light or step - since < 150, "a light request starves"
    return worst


def bound() -> int:
    """In steps, results not counted: one to make way, and those that compute what comes before it in the fair order.

    That is from every client as many tokens as the light one asks for, times the logarithm of its calls (see docs/adr/0021).
    """
    calls = sum(1 / i for i in range(1, 61))
    return 2 + math.ceil(HEAVY * LIGHT * calls / ROOM)


@pytest.mark.parametrize("block", range(3))
def test_a_light_client_waits_a_bounded_number_of_steps_whatever_its_neighbours_do(block: int) -> None:
    for seed in range(block * 6, block * 6 + 6):
        assert neighbours(seed) <= bound()


# ---------------- the test notices
def _in_order_of_arrival(self: FairQueue, request: Request, tokens: int) -> None:
    ENTER(self, request, tokens)
    request.finish = 0.0


def _no_time(self: FairQueue, tokens: int) -> None:
    pass


ENTER = FairQueue.enter
MUTANTS: dict[str, tuple[type, str, Any, Callable[[], object]]] = {
    "nobody makes way": (StepMachine, "_victim", lambda *_: None, lambda: max(map(neighbours, range(6))) <= bound()),
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
        lambda: test_a_long_prompt_is_finished_although_short_ones_never_stop_coming(1),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_test_notices_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, broken, check = MUTANTS[name]
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises(AssertionError):
        assert check() is not False
