"""Admission control: who is let in where places are short, when the others may come back, and that no place is lost."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
from conftest import World, fake_config, prompt, talker

from minisgl.api.admission import RESERVE, AdmissionControl, Places
from minisgl.api.engine import TokenPrompt
from minisgl.config import ServerConfig
from minisgl.errors import RequestError
from minisgl.sampling_params import Finish, RequestOptions, SamplingParams

ALICE, BOB, CAROL = RequestOptions(client=1), RequestOptions(client=2), RequestOptions(client=3)


def crowded(**server: int) -> World:
    """A server with one slot, which is taken."""
    config = fake_config(max_running=1, step_tokens=9, tp=1)
    w = World(None, dataclasses.replace(config, server=ServerConfig(**server)))
    w.submit(talker(4, 40), 40)
    while not w.gateway._admission._running:
        w.system.step()
    return w


def submit(w: World, n: int, options: RequestOptions = ALICE, tokens: int = 5) -> int:
    """So many requests; returns how many of them were admitted."""
    for i in range(n):
        if (e := refusal(lambda i=i: w.submit(prompt(tokens, i), 2, options))) is not None:  # type: ignore[misc]
            assert (e.status, e.code) == (429, "server_overloaded")
            assert e.retry_after is not None
            assert 1 <= e.retry_after <= 30
            return i
    return n


def refusal(act: Callable[[], object]) -> RequestError | None:
    try:
        act()
    except RequestError as e:
        return e
    return None


def finish(w: World) -> None:
    """Everything that was admitted is answered, and every place is free."""
    w.system.run()
    assert w.answers.keys() == w.ends.keys()
    assert all(end in (Finish.STOP, Finish.LENGTH) for end in w.ends.values())
    check_empty(w.gateway._admission)
    w.close()


def check_empty(a: AdmissionControl) -> None:
    assert (a.open.taken, a.waiting.taken, a.tokens.taken, a._running, a._counted) == (0, 0, 0, 0, {})
    assert (a.open._held, a.waiting._held, a.tokens._held) == ({}, {}, {})


# ---------------- the bounds
def test_a_queue_that_is_full_answers_429_with_a_time_to_come_back() -> None:
    w = crowded(max_queue=3)
    assert submit(w, 6) == 3
    w.system.run()
    assert submit(w, 1) == 1
    finish(w)


def test_a_burst_that_finds_free_slots_does_not_wait_and_is_not_refused() -> None:
    w = World(None, dataclasses.replace(fake_config(max_running=5, step_tokens=9, tp=1), server=ServerConfig(max_queue=1)))
    assert submit(w, 9) == 6
    finish(w)


def test_a_queue_is_bounded_by_its_tokens_and_an_empty_one_takes_any_request() -> None:
    w = crowded(max_queued_tokens=30)
    assert submit(w, 1, tokens=40) == 1
    assert submit(w, 1, tokens=2) == 0
    finish(w)
    w = crowded(max_queued_tokens=30)
    assert submit(w, 5, tokens=10) == 3
    finish(w)


def test_without_bounds_nobody_is_refused() -> None:
    w = crowded(max_queue=0, max_queued_tokens=0)
    assert submit(w, 40, tokens=10) == 40
    finish(w)


def test_a_request_that_could_never_fit_does_not_take_a_place() -> None:
    w = crowded(max_queue=3)
    for _ in range(9):
        with pytest.raises(RequestError, match="context"):
            w.submit(prompt(60), 60, ALICE)
    assert submit(w, 6) == 3
    finish(w)


def test_retry_after_is_the_time_that_the_queued_tokens_take_by_the_schedulers_statistics() -> None:
    control, server = AdmissionControl(slots=0), ServerConfig(max_queue=2)
    for uid in (1, 2):
        control.enter(uid, 7, generates=True)
        control.read(uid, 5000, server)

    def told(rate: int) -> int | None:
        control.prefill_rate = rate
        with pytest.raises(RequestError) as e:
            control.check(server, 7, generates=True)
        assert f"try again in {e.value.retry_after} s" in e.value.message
        return e.value.retry_after

    assert [told(rate) for rate in (0, 1000, 100_000, 10, 2500)] == [5, 10, 1, 30, 4]


def test_the_scheduler_reports_its_prefill_rate_and_the_gateway_uses_it() -> None:
    w = crowded(max_queue=60)
    w.machine.prefill_rate.per_second = 1234.4
    submit(w, 3)
    finish(w)
    assert w.gateway.stats["prefill_tokens_per_s"] == 1234
    assert w.gateway._admission.prefill_rate == 1234


def test_what_was_admitted_is_not_refused_when_it_is_sent_again() -> None:
    w = crowded(max_queue=2, max_queued_tokens=12)
    assert submit(w, 9) == 2
    entries = [e for e in w.gateway._ledger.values() if e.options == ALICE]
    assert len(entries) == 2
    for entry in entries:  # as after a crash: its ids are known, or its tokenizer answers a second time
        w.gateway._admission.read(entry.uid, 5, w.gateway.config.server)
    assert w.gateway._admission.tokens.taken == 10
    finish(w)


# ---------------- fair between clients
def test_a_client_that_has_all_places_shuts_nobody_out() -> None:
    for bound in ("max_open_requests", "max_queue", "max_queued_tokens"):
        w = crowded(**{bound: 21})  # the first is of no client
        tokens = 20 if bound == "max_queued_tokens" else 5
        assert submit(w, 100, ALICE, tokens) > 0, bound
        assert submit(w, 1, ALICE, tokens) == 0
        assert submit(w, 1, BOB, tokens) == 1, bound
        assert submit(w, 1, ALICE, tokens) == 0, bound
        finish(w)


def test_the_reserve_is_for_clients_below_their_share_and_bounded() -> None:
    places = Places()
    while places.has_room(100, 1):
        places.take(1)
    assert places.taken == 100
    for client in (*range(2, 40),):
        if places.has_room(100, client):
            places.take(client)
    assert places.taken == 100 + 100 * RESERVE
    assert not places.has_room(100, 99)
    places.give_back(1)
    assert places.has_room(100, 99)
    assert not places.has_room(100, 1)


def test_a_client_above_its_share_gets_a_place_only_where_there_are_some_left() -> None:
    places = Places()
    places.take(1, 60)
    places.take(2, 40)
    assert not places.has_room(100, 1)
    assert places.has_room(100, 2)  # 40 of 50
    places.take(2, 10)
    assert not places.has_room(100, 2)
    assert not places.has_room(100, 3), "the reserve is full"


@pytest.mark.parametrize("most", [1, 2, 9, 10, 500])
def test_alone_a_client_gets_all_places_and_not_one_more(most: int) -> None:
    places, n = Places(), 0
    while places.has_room(most, 7):
        places.take(7)
        n += 1
    assert n == most


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_no_place_is_lost_and_no_bound_is_passed(seed: int) -> None:
    rng = random.Random(seed)
    server = ServerConfig(max_open_requests=20, max_queue=6, max_queued_tokens=300)
    control, live = AdmissionControl(slots=4), set[int]()
    admitted: set[int] = set()
    for uid in range(600):
        client, generates = rng.choice((1, 1, 1, 2, 3)), rng.random() < 0.8
        try:
            control.check(server, client, generates=generates)
            control.enter(uid, client, generates=generates)
            live.add(uid)
            admitted.add(client)
            if generates and rng.random() < 0.9:
                control.read(uid, rng.randrange(1, 90), server)
        except RequestError:
            control.leave(uid)
            live.discard(uid)
        assert control.open.taken == len(live) <= 22
        assert control.waiting.taken <= (6 + 4) * (1 + RESERVE)
        assert control.tokens.taken <= 300 * (1 + RESERVE) + 90
        for known in rng.sample(sorted(live), min(len(live), rng.randrange(3))):
            if rng.random() < 0.5:
                control.start(known)
            else:
                control.leave(known)
                control.leave(known)
                live.discard(known)
    assert admitted == {1, 2, 3}
    for uid in live:
        control.leave(uid)
    check_empty(control)


def test_a_questions_place_is_its_clients() -> None:
    w = crowded(max_open_requests=4)
    for _ in range(3):
        w.gateway.detokenize((1,), False, lambda _: None, ALICE)
    for refused in (
        lambda: w.gateway.detokenize((1,), False, lambda _: None, ALICE),
        lambda: w.gateway.open(TokenPrompt((1,)), SamplingParams(), lambda _: None, ALICE),
        lambda: w.gateway.check_open(ALICE.client),
        lambda: w.gateway.check_open(ALICE.client, generates=False),
    ):
        with pytest.raises(RequestError, match="4 open requests"):
            refused()
    w.gateway.check_open(BOB.client)
    w.gateway.end()
    check_empty(w.gateway._admission)
